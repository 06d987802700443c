"""From the tokens of pieces to the finished dataset: order, weights of a mixture, blocks."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_llm_forge import corpus, tokenization
from p2p_llm_forge.corpus import TRAIN, BlockWriter, Manifest, SplitFacts
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.sources import Part
from p2p_llm_forge.unfinished import Pieces, Record

if TYPE_CHECKING:
    import numpy as np


@dataclass(frozen=True)
class Done:
    """A piece that is tokenized: the number of its part, the part, its number there, its record."""

    number: int
    part: Part
    piece: int
    record: Record


@dataclass(frozen=True)
class Labels:
    """What the dataset is to be, besides what is counted."""

    splits: tuple[str, ...]
    sequence_length: int
    vocab_size: int
    dtype: str
    arguments: dict[str, Any]


def all_done(parts: list[Part], pieces: Pieces) -> list[Done]:
    """Every piece of every part, in order; raises KeyError when one is missing."""
    done = []
    for number, part in enumerate(parts):
        records = pieces.records(number, part)
        if not records:
            raise KeyError(number)
        done += [Done(number, part, place, record) for place, record in enumerate(records)]
    return done


# --- mixtures -------------------------------------------------------------------------------------


def quotas(totals: list[int], weights: tuple[float, ...]) -> list[int]:
    """The most tokens that each source can give, none twice, so that their shares are `weights`.

    The source that is shortest for its weight gives all that it has.
    """
    scale = min(total / weight for total, weight in zip(totals, weights, strict=True))
    shares = (scale * weight for weight in weights)
    return [min(total, round(share)) for total, share in zip(totals, shares, strict=True)]


def blended(sizes: list[list[int]], limits: list[int]) -> list[tuple[int, int]]:
    """An order (source, place) that takes sizes[source] in turn, keeping shares near the limits'.

    Next is always a piece of the source that has given the smallest part of its limit.
    """
    given = [0] * len(sizes)
    places = [0] * len(sizes)
    order: list[tuple[int, int]] = []
    while True:
        open_sources = [
            source
            for source, size in enumerate(sizes)
            if places[source] < len(size) and given[source] < limits[source]
        ]
        if not open_sources:
            return order
        source = min(open_sources, key=lambda s: (given[s] / limits[s], s))
        order.append((source, places[source]))
        given[source] += sizes[source][places[source]]
        places[source] += 1


def mixed(done: list[Done], weights: tuple[float, ...]) -> Iterator[tuple[Done, int]]:
    """The pieces in the order of the dataset, each with the most training tokens that it may give.

    Without weights that is the order of the text, and all tokens. Weights hold for the training
    text; what is held out is kept whole, so pieces come even where they may give none.
    """
    if not weights:
        yield from ((piece, piece.record.splits[TRAIN].tokens) for piece in done)
        return
    of_source = [[piece for piece in done if piece.part.source == s] for s in range(len(weights))]
    sizes = [[piece.record.splits[TRAIN].tokens for piece in pieces] for pieces in of_source]
    left = quotas([sum(size) for size in sizes], weights)
    order = blended(sizes, list(left)) if min(left) > 0 else []
    for source, place in order:
        piece = of_source[source][place]
        size = min(piece.record.splits[TRAIN].tokens, left[source])
        left[source] -= size
        yield piece, size
    used = set(order)
    for source, pieces in enumerate(of_source):
        yield from ((p, 0) for place, p in enumerate(pieces) if (source, place) not in used)
    yield from ((piece, 0) for piece in done if piece.part.is_validation)


# --- writing --------------------------------------------------------------------------------------


class _Split:
    """One split while it is written."""

    def __init__(self, name: str, folder: Path, labels: Labels) -> None:
        self.name = name
        self.writer = BlockWriter(folder / name, labels.sequence_length, labels.dtype)
        self.documents = self.bytes = self.left_out = 0

    def add(self, tokens: np.ndarray, limit: int, counts: Any, tokenizer: Any) -> None:
        """Add a piece's tokens, at most `limit`, to the end of a document."""
        import numpy as np

        self.documents += counts.documents
        self.bytes += counts.bytes
        if limit < len(tokens):
            ends = np.flatnonzero(tokens == tokenizer.eos_token_id) + 1
            kept = int(np.searchsorted(ends, limit, side="right"))
            tokens, rest = np.split(tokens, [ends[kept - 1] if kept else 0])
            self.documents -= counts.documents - kept
            self.bytes -= tokenization.bytes_of_text(tokenizer, rest)
            self.left_out += len(rest)
        self.writer.append(tokens)

    def finish(self, tokenizer: Any, sequence_length: int) -> SplitFacts:
        tail = self.writer.finish()
        return SplitFacts(
            documents=self.documents,
            blocks=self.writer.blocks,
            tokens=self.writer.blocks * sequence_length,
            bytes=self.bytes - tokenization.bytes_of_text(tokenizer, tail),
            dropped_tokens=len(tail),
            left_out_tokens=self.left_out,
        )


def write_dataset(
    folder: Path,
    done: list[Done],
    pieces: Pieces,
    weights: tuple[float, ...],
    tokenizer: Any,
    labels: Labels,
) -> Manifest:
    """Write splits, tokenizer and manifest of the pieces that are done into `folder`, anew.

    Raises ForgeError when the disk has not room enough for it, before anything is written.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    require_room(folder, tokens_bytes(done, labels.dtype))
    splits = {name: _Split(name, folder, labels) for name in labels.splits}
    for piece, limit in mixed(done, weights):
        tokens = pieces.tokens(piece.number, piece.part, piece.piece)
        for name, split in splits.items():
            allowed = limit if name == TRAIN else len(tokens[name])
            split.add(tokens[name], allowed, piece.record.splits[name], tokenizer)
    facts = {
        name: split.finish(tokenizer, labels.sequence_length) for name, split in splits.items()
    }
    manifest = Manifest(
        sequence_length=labels.sequence_length,
        vocab_size=labels.vocab_size,
        eos_token_id=tokenizer.eos_token_id,
        dtype=labels.dtype,
        splits=facts,
        tokenizer_fingerprint=tokenization.tokenizer_fingerprint(tokenizer),
        content_fingerprint=content_fingerprint(piece.record.digest for piece in done),
        arguments=labels.arguments,
        skipped_rows=sum(piece.record.skipped for piece in done),
    )
    checksums: dict[str, str] = {}
    for name, split in splits.items():
        checksums |= split.writer.describe(name, f"{manifest.fingerprint[:16]}-{name}")
    corpus.write_json(folder / corpus.DATASET_DICT, {"splits": list(labels.splits)})
    tokenizer.save_pretrained(folder / corpus.TOKENIZER)
    manifest = manifest.with_files(corpus.files_of(folder, checksums))
    manifest.save(folder)
    return manifest


def content_fingerprint(digests: Iterator[str]) -> str:
    """One hash of the pieces' hashes: the text, whatever its files are called and packed in."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def tokens_bytes(done: list[Done], dtype: str) -> int:
    """Bytes that the blocks will take."""
    import numpy as np

    tokens = sum(counts.tokens for piece in done for counts in piece.record.splits.values())
    return tokens * np.dtype(dtype).itemsize


def require_room(folder: Path, needed: int) -> None:
    """Raise ForgeError unless the disk has room for `needed` bytes and a little more."""
    needed += needed // 100 + (1 << 20)
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise ForgeError(no_room(folder, needed, free))


def no_room(folder: Path, needed: int, free: int) -> str:
    """What to say when the disk is full."""
    return (
        f"the disk of {folder} is full: {needed / 1e9:.2f} GB are needed to finish, "
        f"{free / 1e9:.2f} GB are free. Make room and run the same command: what is tokenized so "
        "far is kept"
    )
