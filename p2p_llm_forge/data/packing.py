"""From the tokens of pieces to the finished dataset: order, weights of a mixture, blocks."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_llm_forge.data import dataset as corpus
from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data.dataset import TRAIN, BlockWriter, Manifest, SplitFacts
from p2p_llm_forge.data.parts import Part
from p2p_llm_forge.data.pieces import Pieces, Record

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
    eos_token_id: int
    dtype: str
    tokenizer_fingerprint: str
    arguments: dict[str, Any]


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
    """The pieces in the order of a mixture, each with the most training tokens that it may give.

    Weights hold for the training text; what is held out is kept whole, so pieces come even where
    they may give none.
    """
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


class Packer:
    """Writes the dataset of `parts` into `folder`, anew, while their pieces get done.

    It takes the pieces in the order of the text. Those of a mixture are taken at the end, for its
    order follows from the sizes of all.
    """

    def __init__(
        self,
        folder: Path,
        parts: list[Part],
        pieces: Pieces,
        weights: tuple[float, ...],
        tokenizer: Any,
        labels: Labels,
    ) -> None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        self._folder = folder
        self._parts = parts
        self._pieces = pieces
        self._weights = weights
        self._tokenizer = tokenizer
        self._labels = labels
        self._splits = [_Split(name, folder, labels) for name in labels.splits]
        self._done: list[Done] = []
        self._next = (0, 0)  # part and piece

    @property
    def has_all(self) -> bool:
        """Whether every piece is done and taken."""
        return self._next[0] == len(self._parts)

    def catch_up(self) -> None:
        """Take the pieces that are done, up to the first that is not. Raises OSError."""
        while not self.has_all:
            number, place = self._next
            part = self._parts[number]
            record = self._pieces.record(number, part, place)
            if not record:
                return
            self._done.append(Done(number, part, place, record))
            self._next = (number + 1, 0) if record.is_last else (number, place + 1)
            if not self._weights:
                self._add(self._done[-1], record.splits[TRAIN].tokens)

    def _add(self, piece: Done, limit: int) -> None:
        """Write a piece, of its training tokens at most `limit`."""
        tokens = self._pieces.tokens(piece.number, piece.part, piece.piece)
        require_room(self._folder, sum(of_split.nbytes for of_split in tokens.values()))
        for split in self._splits:
            allowed = limit if split.name == TRAIN else len(tokens[split.name])
            counts = piece.record.splits[split.name]
            split.add(tokens[split.name], allowed, counts, self._tokenizer)

    def finish(self) -> Manifest:
        """Write what is left to write when it has all: metadata, tokenizer and manifest."""
        if self._weights:
            for piece, limit in mixed(self._done, self._weights):
                self._add(piece, limit)
        labels, tokenizer = self._labels, self._tokenizer
        manifest = Manifest(
            sequence_length=labels.sequence_length,
            vocab_size=labels.vocab_size,
            eos_token_id=labels.eos_token_id,
            dtype=labels.dtype,
            splits={
                split.name: split.finish(tokenizer, labels.sequence_length)
                for split in self._splits
            },
            tokenizer_fingerprint=labels.tokenizer_fingerprint,
            content_fingerprint=content_fingerprint(piece.record.digest for piece in self._done),
            arguments=labels.arguments,
            skipped_rows=sum(piece.record.skipped for piece in self._done),
        )
        checksums: dict[str, str] = {}
        for split in self._splits:
            name = f"{manifest.fingerprint[:16]}-{split.name}"
            checksums |= split.writer.describe(split.name, name)
        names = {"splits": list(labels.splits)}
        corpus.write_json(self._folder / corpus.DATASET_DICT, names)
        tokenizer.save_pretrained(self._folder / corpus.TOKENIZER)
        manifest = manifest.with_files(corpus.files_of(self._folder, checksums))
        manifest.save(self._folder)
        return manifest

    def close(self) -> None:
        """Give up: end the files that are being written."""
        for split in self._splits:
            with contextlib.suppress(OSError):  # of a full disk, once more
                split.writer.close()


def content_fingerprint(digests: Iterator[str]) -> str:
    """One hash of the pieces' hashes: the text, whatever its files are called and packed in."""
    return hashlib.sha256("".join(digests).encode()).hexdigest()


def require_room(folder: Path, needed: int) -> None:
    """Raise OSError for a full disk unless `needed` bytes and a little more are free."""
    if shutil.disk_usage(folder).free < needed + (1 << 20):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))


def no_room(folder: Path, needed: int, free: int) -> str:
    """What to say when the disk is full."""
    return (
        f"the disk of {folder} is full: {needed / 1e9:.2f} GB are needed to finish, "
        f"{free / 1e9:.2f} GB are free. Make room and run the same command: what is tokenized so "
        "far is kept"
    )
