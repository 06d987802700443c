"""The splits: which documents are held out, and the tokens of a piece for each split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.parts import values_and_offsets

TRAIN, VALIDATION = "train", "validation"


def held_out(piece_number: int, documents: int, fraction: float, seed: int) -> np.ndarray:
    """Which of a piece's documents are for validation (bool): a seeded hash of each one's number.

    A document's number is its piece's number and its place there, so no worker needs to know what
    the others have counted. The hash is SplitMix64 (Steele, Lea and Flood, 2014).
    """
    if fraction == 0:
        return np.zeros(documents, bool)
    of_seed = _splitmix64(np.array([seed % 2**64], np.uint64))
    of_piece = _splitmix64(of_seed + np.uint64(piece_number))
    numbers = _splitmix64(of_piece + np.arange(documents, dtype=np.uint64))
    return numbers < np.uint64(int(fraction * 2**64))


def _splitmix64(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's step and finalizer on uint64, wrapping around."""
    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


@dataclass(frozen=True)
class SplitCounts:
    """What a piece adds to a split: documents, bytes of their text, tokens (EOS included)."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become splits of tokens: what a worker must know besides the text."""

    encode: Callable[[pa.LargeBinaryArray], tuple[np.ndarray, np.ndarray]]
    eos_token_id: int
    dtype: str
    validation_fraction: float
    seed: int


def encode_piece(
    number: int, column: pa.LargeBinaryArray, is_validation: bool, options: EncodeOptions
) -> tuple[np.ndarray, dict[str, SplitCounts]]:
    """Tokenize documents and divide them between the splits.

    number: seeds the choice of the documents that are held out; is_validation: all are. Returns
    the tokens of the documents to train on, then those of the others, and the splits' counts.
    """
    hidden = held_out(number, len(column), options.validation_fraction, options.seed)
    if is_validation:
        hidden[:] = True
    train = len(hidden) - int(hidden.sum())
    if 0 < train < len(hidden):
        # The documents are divided, not their tokens: that moves whole texts, not token by token.
        column = column.take(np.argsort(hidden, kind="stable"))
    tokens, lengths = options.encode(column)
    tokens = with_document_ends(tokens, lengths, options.eos_token_id, options.dtype)
    ends = values_and_offsets(column)[1]
    of_train = SplitCounts(train, int(ends[train]), int(lengths[:train].sum()) + train)
    others = SplitCounts(
        len(hidden) - train, int(ends[-1]) - of_train.bytes, len(tokens) - of_train.tokens
    )
    return tokens, {TRAIN: of_train, VALIDATION: others}


def with_document_ends(
    tokens: np.ndarray, lengths: np.ndarray, eos_token_id: int, dtype: str
) -> np.ndarray:
    """The documents' tokens with EOS after each document, as `dtype`."""
    joined = np.empty(len(tokens) + len(lengths), dtype)
    is_text = np.ones(len(joined), bool)
    ends = np.cumsum(lengths + 1) - 1
    is_text[ends] = False
    joined[is_text] = tokens
    joined[ends] = eos_token_id
    return joined
