"""From the tokens of pieces to the finished dataset: order, weights of a mixture, blocks."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from p2p_llm_forge.data import duplicates
from p2p_llm_forge.data.blocks import BlockWriter
from p2p_llm_forge.data.dataset import DATASET_DICT, MANIFEST, TOKENIZER, Manifest, SplitFacts
from p2p_llm_forge.data.parts import Part
from p2p_llm_forge.data.pieces import PieceId, Pieces, Record
from p2p_llm_forge.data.preparation import Preparation
from p2p_llm_forge.data.splits import TRAIN, SplitCounts, total
from p2p_llm_forge.data.tokenizer import bytes_of_text
from p2p_llm_forge.data.unfinished import require_room
from p2p_llm_forge.files import fingerprint, write_json


class Done(NamedTuple):
    """A piece that is tokenized."""

    id: PieceId
    part: Part
    record: Record
    is_kept: np.ndarray | None = None  # by document; None: all are

    @property
    def train_tokens(self) -> int:
        return self.record.splits[TRAIN].tokens


def quotas(totals: list[int], weights: tuple[float, ...]) -> list[int]:
    """The most tokens that each source can give, none twice, so that they are as `weights`.

    The source that is shortest for its weight gives all that it has.
    """
    scale = min(total / weight for total, weight in zip(totals, weights, strict=True))
    return [min(size, round(scale * part)) for size, part in zip(totals, weights, strict=True)]


def blended(sizes: list[list[int]], limits: list[int]) -> list[tuple[int, int]]:
    """An order (source, place) that takes sizes[source] in turn, in proportion to the limits.

    Next is always a piece of the source that has given the smallest part of its limit.
    """
    order = []
    for source, (of_source, limit) in enumerate(zip(sizes, limits, strict=True)):
        given_before = itertools.accumulate(of_source[:-1], initial=0)
        order += [(given / limit, source, place) for place, given in enumerate(given_before)]
    return [(source, place) for given, source, place in sorted(order) if given < 1]


def mixed(done: list[Done], weights: tuple[float, ...]) -> Iterator[tuple[Done, int]]:
    """The pieces in the order of a mixture, each with the most training tokens that it may give.

    Weights hold for the training text; what is held out is kept whole, so pieces come even where
    they may give none.
    """
    train = [piece for piece in done if not piece.part.is_validation]
    of_source = [[piece for piece in train if piece.part.source == s] for s in range(len(weights))]
    sizes = [[piece.train_tokens for piece in pieces] for pieces in of_source]
    left = quotas([sum(size) for size in sizes], weights)
    order = blended(sizes, list(left)) if min(left) > 0 else []
    for source, place in order:
        piece = of_source[source][place]
        size = min(piece.train_tokens, left[source])
        left[source] -= size
        yield piece, size
    used = {of_source[source][place].id for source, place in order}
    yield from ((piece, 0) for piece in done if piece.id not in used)


class _Split:
    """One split while it is written."""

    def __init__(self, folder: Path, manifest: Manifest, tokenizer: Any) -> None:
        self.name = folder.name
        self.writer = BlockWriter(folder, manifest.sequence_length, manifest.dtype)
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._documents = self._bytes = self._left_out = 0

    def add(self, tokens: np.ndarray, limit: int, counts: SplitCounts) -> None:
        """Add a piece's tokens, at most `limit`, to the end of a document."""
        self._documents += counts.documents
        self._bytes += counts.bytes
        if limit < len(tokens):
            ends = np.flatnonzero(tokens == self._manifest.eos_token_id) + 1
            kept = int(np.searchsorted(ends, limit, side="right"))
            tokens, rest = np.split(tokens, [ends[kept - 1] if kept else 0])
            self._documents -= counts.documents - kept
            self._bytes -= bytes_of_text(self._tokenizer, rest)
            self._left_out += len(rest)
        self.writer.append(tokens)

    def finish(self) -> SplitFacts:
        tail = self.writer.finish()
        return SplitFacts(
            documents=self._documents,
            blocks=self.writer.blocks,
            tokens=self.writer.blocks * self._manifest.sequence_length,
            bytes=self._bytes - bytes_of_text(self._tokenizer, tail),
            dropped_tokens=len(tail),
            left_out_tokens=self._left_out,
        )


class Packer:
    """Writes a dataset into the new folder `written`, from scratch, while its pieces get done.

    It takes the pieces in the order of the text. Those of a mixture are taken at the end, for its
    order follows from the sizes of all. manifest: not yet counted.
    """

    def __init__(
        self, preparation: Preparation, manifest: Manifest, tokenizer: Any, pieces: Pieces
    ) -> None:
        # No other process writes to it, whatever becomes of the lock.
        self.written = Path(tempfile.mkdtemp(prefix="dataset-", dir=preparation.folder))
        self._preparation = preparation
        self._manifest = manifest
        self._tokenizer = tokenizer
        self._pieces = pieces
        folders = [self.written / name for name in preparation.splits]
        self._splits = [_Split(folder, manifest, tokenizer) for folder in folders]
        self._done: list[Done] = []
        self._next = PieceId(0, 0)

    @property
    def _waits_for_all(self) -> bool:
        """Whether what becomes of a piece follows from the others."""
        return bool(self._preparation.weights) or self._preparation.config.deduplicate != "none"

    @property
    def has_all(self) -> bool:
        """Whether every piece is done and taken."""
        return self._next.part == len(self._preparation.parts)

    def catch_up(self) -> None:
        """Take the pieces that are done, up to the first that is not. Raises OSError."""
        while not self.has_all:
            number, place = self._next
            record = self._pieces.record(self._next)
            if not record:
                return
            piece = Done(self._next, self._preparation.parts[number], record)
            self._done.append(piece)
            self._next = PieceId(number + 1, 0) if record.is_last else PieceId(number, place + 1)
            if not self._waits_for_all:
                self._add(piece, piece.train_tokens)

    def _add(self, piece: Done, limit: int) -> None:
        """Write a piece, of its training tokens at most `limit`."""
        tokens = self._pieces.tokens(piece.id)
        if piece.is_kept is not None:
            lengths = self._pieces.documents(piece.id)[:, 0]
            tokens = duplicates.tokens_kept(tokens, lengths, piece.is_kept)
        require_room(self.written, sum(of_split.nbytes for of_split in tokens.values()))
        for split in self._splits:
            allowed = limit if split.name == TRAIN else len(tokens[split.name])
            split.add(tokens[split.name], allowed, piece.record.splits[split.name])

    def finish(self) -> Manifest:
        """Write what is left to write when it has all: metadata, tokenizer and manifest."""
        weights, done = self._preparation.weights, self._done
        if self._preparation.config.deduplicate != "none":
            records = [(piece.id, piece.record) for piece in done]
            chosen = duplicates.chosen(records, self._pieces, self.written / "keys")
            done = [
                piece._replace(record=record, is_kept=is_kept)
                for piece, (record, is_kept) in zip(done, chosen, strict=True)
            ]
        if self._waits_for_all:
            in_order = mixed(done, weights) if weights else ((p, p.train_tokens) for p in done)
            for piece, limit in in_order:
                self._add(piece, limit)
        manifest = replace(
            self._manifest,
            splits={split.name: split.finish() for split in self._splits},
            # Of the text, whatever its files are called and packed in.
            content_fingerprint=fingerprint([piece.record.digest for piece in done]),
            skipped_rows=sum(piece.record.skipped for piece in done),
            left_out=total([piece.record.left_out for piece in done]),
        )
        for split in self._splits:
            split.writer.describe(split.name, f"{manifest.fingerprint[:16]}-{split.name}")
        write_json(self.written / DATASET_DICT, {"splits": list(manifest.splits)}, durable=False)
        self._tokenizer.save_pretrained(self.written / TOKENIZER)
        return manifest.save(self.written)

    def close(self) -> None:
        """End the files that are being written; what is not finished is removed."""
        for split in self._splits:
            with contextlib.suppress(OSError):  # of a full disk, once more
                split.writer.close()
        if not (self.written / MANIFEST).exists():
            shutil.rmtree(self.written, ignore_errors=True)
