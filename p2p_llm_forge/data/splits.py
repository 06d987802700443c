"""The splits: which documents are held out, and the tokens of a piece for each split."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.document_keys import Kind, document_keys
from p2p_llm_forge.data.parts import values_and_offsets
from p2p_llm_forge.data.token_runs import without
from p2p_llm_forge.errors import ForgeError, counted, quoted

TRAIN, VALIDATION = "train", "validation"
TOKENS, BYTES, ROW = range(3)  # columns of `EncodedPiece.documents`; those of keys follow
# Why documents are in no split.
TOO_SHORT, TOO_LONG, REPEATED, HELD_OUT_TOO = "too_short", "too_long", "repeated", "held_out_too"
NOT_ENCODED, BAD_CONVERSATION = "not_encoded", "bad_conversation"
LONGER_THAN_BLOCK = "longer_than_block"
REASONS = {
    TOO_SHORT: "shorter than --min-document-tokens",
    NOT_ENCODED: "that the tokenizer cannot encode",
    BAD_CONVERSATION: "that the chat template or the tokenizer cannot take (--skip-bad-rows)",
    LONGER_THAN_BLOCK: "longer than a block (--long-conversations skip)",
    TOO_LONG: "longer than --max-document-tokens",
    REPEATED: "repeating or resembling an earlier one",
    HELD_OUT_TOO: "to train on, repeating or resembling one that is held out",
}


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
    """What a piece adds to a split: documents, bytes of their text, tokens (EOS included).

    Also what is left out of both.
    """

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class ConversationOptions:
    """How conversations become tokens. encode: tokens with marks, their number, bytes of trained
    text (see `ConversationEncoder`); longest: tokens; long: what becomes of longer ones."""

    encode: Callable[[pa.LargeBinaryArray], tuple[np.ndarray, np.ndarray, np.ndarray]]
    longest: int
    long: str


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become splits of tokens: what a worker must know besides the text."""

    encode: Callable[[pa.LargeBinaryArray], tuple[np.ndarray, np.ndarray]]
    eos_token_id: int
    dtype: str
    validation_fraction: float
    seed: int
    min_document_tokens: int | None = None
    max_document_tokens: int | None = None
    deduplicate: Kind = "none"
    conversations: ConversationOptions | None = None  # None: documents are texts


@dataclass(frozen=True)
class EncodedPiece:
    """A piece's documents as tokens: first those to train on, then those held out.

    left_out: what is in no split, by the reason. documents: tokens (EOS included), bytes and row in
    the piece's column of each, and its key where duplicates are looked for (documents x columns,
    uint64). Of conversations tokens have marks, no EOS is added, and bytes are of trained text.
    """

    tokens: np.ndarray
    splits: dict[str, SplitCounts]
    left_out: dict[str, SplitCounts]
    documents: np.ndarray


def encode_piece(
    number: int, column: pa.LargeBinaryArray, is_validation: bool, options: EncodeOptions
) -> EncodedPiece:
    """Tokenize documents, leave out what is too short or long, divide the rest between the splits.

    number: seeds the choice of the documents that are held out; is_validation: all are.
    """
    hidden = held_out(number, len(column), options.validation_fraction, options.seed)
    if is_validation:
        hidden[:] = True
    train = len(hidden) - int(hidden.sum())
    rows = np.argsort(hidden, kind="stable")
    if 0 < train < len(hidden):
        # The documents are divided, not their tokens: that moves whole texts, not token by token.
        column = column.take(rows)
    if of_conversations := options.conversations:
        tokens, lengths, sizes = of_conversations.encode(column)
        refuse_long(column, lengths, of_conversations)
    else:
        tokens, lengths = options.encode(column)
        sizes = np.diff(values_and_offsets(column)[1])
    ends = 0 if of_conversations else 1  # tokens after each
    out = of_wrong_length(lengths, options)
    if (lengths < 0).any():
        out[BAD_CONVERSATION if of_conversations else NOT_ENCODED] = lengths < 0
    left_out = {why: counts_of(sizes[is_out], lengths[is_out], ends) for why, is_out in out.items()}
    fits = ~np.logical_or.reduce([np.zeros(len(lengths), bool), *out.values()])
    if not fits.all():
        train = int(fits[:train].sum())
        column, (tokens, lengths) = column.filter(pa.array(fits)), without(~fits, (tokens, lengths))
        sizes, rows = sizes[fits], rows[fits]
    splits = {
        TRAIN: counts_of(sizes[:train], lengths[:train], ends),
        VALIDATION: counts_of(sizes[train:], lengths[train:], ends),
    }
    if ends:
        tokens = with_document_ends(tokens, lengths, options.eos_token_id, options.dtype)
    documents = [of.astype("<u8") for of in (lengths + ends, sizes, rows)]
    if options.deduplicate != "none":
        documents.append(document_keys(column, options.deduplicate))
    return EncodedPiece(tokens, splits, left_out, np.column_stack(documents))


def of_wrong_length(lengths: np.ndarray, options: EncodeOptions) -> dict[str, np.ndarray]:
    """Which documents of so many tokens are left out (bool), by every reason that is asked for."""
    least, most = options.min_document_tokens, options.max_document_tokens
    out = {}
    if least is not None:
        out[TOO_SHORT] = (lengths < least) & (lengths >= 0)
    if most is not None:
        out[TOO_LONG] = lengths > most
    if options.conversations and options.conversations.long == "skip":
        out[LONGER_THAN_BLOCK] = lengths > options.conversations.longest
    return out


def refuse_long(
    column: pa.LargeBinaryArray, lengths: np.ndarray, options: ConversationOptions
) -> None:
    """Raise ForgeError for a conversation that is longer than a block, where these are errors."""
    is_long = lengths > options.longest
    if options.long != "error" or not is_long.any():
        return
    first = int(is_long.argmax())
    raise ForgeError(
        f"{counted(int(is_long.sum()), 'conversation')} longer than a block of {options.longest}:"
        f" the first has {lengths[first]:,} tokens ({quoted(column[first].as_py().decode(), 80)})",
        f"use --sequence-length {lengths.max()} or more, or --long-conversations cut or skip",
    )


def counts_of(sizes: np.ndarray, lengths: np.ndarray, ends: int = 1) -> SplitCounts:
    """The counts of documents of so many bytes and tokens each. ends: tokens after each."""
    tokens = int((lengths + ends).clip(0).sum())
    return SplitCounts(len(sizes), int(sizes.sum()), tokens)


def total(left_out: list[dict[str, SplitCounts]]) -> dict[str, SplitCounts]:
    """What many pieces leave out, by the reason."""
    found: dict[str, SplitCounts] = {}
    for why, counts in (item for of_piece in left_out for item in of_piece.items()):
        before = found.get(why, SplitCounts(0, 0, 0))
        found[why] = SplitCounts(
            before.documents + counts.documents,
            before.bytes + counts.bytes,
            before.tokens + counts.tokens,
        )
    return found


def in_words(left_out: dict[str, SplitCounts]) -> str:
    """How many documents are left out, by the reason, for people; empty where there are none."""
    return ", ".join(
        f"{counted(counts.documents, 'document')} {REASONS.get(why, why)} "
        f"({counted(counts.bytes, 'byte')})"
        for why, counts in left_out.items()
        if counts.documents
    )


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
