"""From the tokens of pieces to the finished dataset: order, weights of a mixture, blocks."""

from __future__ import annotations

import contextlib
import itertools
import shutil
import tempfile
from collections import Counter, defaultdict, deque
from collections.abc import Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from p2p_llm_forge.data import duplicates, readers
from p2p_llm_forge.data.blocks import BlockWriter
from p2p_llm_forge.data.conversation_packing import OpenBlocks, parts_of
from p2p_llm_forge.data.dataset import (
    DATASET_DICT,
    MANIFEST,
    TOKENIZER,
    Manifest,
    SourceFacts,
    SplitFacts,
)
from p2p_llm_forge.data.parts import Part
from p2p_llm_forge.data.pieces import PieceId, Record, digest_of
from p2p_llm_forge.data.preparation import name_of
from p2p_llm_forge.data.sources import split_weight
from p2p_llm_forge.data.splits import BYTES, ROW, TOKENS, TRAIN, VALIDATION, total
from p2p_llm_forge.data.text_bytes import CutDocuments
from p2p_llm_forge.data.tokenizer import padding_of, save_tokenizer
from p2p_llm_forge.data.tokenizing import Job
from p2p_llm_forge.data.unfinished import require_room
from p2p_llm_forge.errors import ForgeError
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

    Next is always a piece of the source that has given the smallest part of its limit; the source
    that gives most comes last of several, so that it loses the tail that fills no block.
    """
    order = []
    for source, (of_source, limit) in enumerate(zip(sizes, limits, strict=True)):
        given_before = itertools.accumulate(of_source[:-1], initial=0)
        order += [(given / limit, limit, source, place) for place, given in enumerate(given_before)]
    return [(source, place) for given, _, source, place in sorted(order) if given < 1]


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


def place_to_cut(ends: np.ndarray, limit: int, filled: int, sequence_length: int) -> int:
    """After which token a source that may give `limit` more ends: never far from that many.

    Where a document ends, if one does within half a block; else where a block does, so that nothing
    follows in that block on a document without its end. ends: of the documents; filled: tokens that
    are in the split already.
    """
    ends = np.append(0, ends)
    nearest = int(ends[np.abs(ends - limit).argmin()])
    if 2 * abs(nearest - limit) <= sequence_length:
        return nearest
    return round((filled + limit) / sequence_length) * sequence_length - filled


@dataclass
class _Counts:
    """What a source has given to a split, by the names of `SourceFacts`."""

    documents: int = 0
    bytes: int = 0
    tokens: int = 0
    dropped_tokens: int = 0
    left_out_tokens: int = 0


class _Split:
    """One split while it is written. bytes_before, documents: the methods of Packer."""

    def __init__(
        self, folder: Path, manifest: Manifest, packer: Packer, has_marks: bool = False
    ) -> None:
        self.name = folder.name
        self.writer = BlockWriter(folder, manifest.sequence_length, manifest.dtype, has_marks)
        self.of_source: defaultdict[int, _Counts] = defaultdict(_Counts)
        self._length = manifest.sequence_length
        self._packer = packer
        self._tokens = 0
        self._last: deque[tuple[Done, int]] = deque()  # pieces and their tokens, a block at least

    def add(self, piece: Done, tokens: np.ndarray, limit: int) -> None:
        """Add the tokens of a piece, not many more than `limit`."""
        counts, whole = self.of_source[piece.part.source], piece.record.splits[self.name]
        kept, documents, size = whole.tokens, whole.documents, whole.bytes
        if not limit:
            kept = documents = size = 0
        elif limit < kept:
            ends = np.cumsum(self._packer.documents(piece, self.name)[:, TOKENS])
            kept = place_to_cut(ends, limit, self._tokens, self._length)
            documents = int(np.searchsorted(ends, kept)) + 1 if kept else 0
            size = self._packer.bytes_before(kept, piece, self.name)
        counts.documents += documents
        counts.bytes += size
        counts.tokens += kept
        counts.left_out_tokens += whole.tokens - kept
        self.writer.append(tokens[:kept])
        self._tokens += kept
        if kept:
            self._last.append((piece, kept))
        while self._last and sum(n for _, n in self._last) - self._last[0][1] >= self._length:
            self._last.popleft()

    def finish(self) -> SplitFacts:
        """Write what is left; the tail that fills no block is taken from who gave it."""
        tail = len(self.writer.finish())
        for piece, kept in reversed(self._last):
            counts, dropped = self.of_source[piece.part.source], min(tail, kept)
            if dropped:
                text = self._packer.bytes_before(kept, piece, self.name)
                counts.bytes -= text - self._packer.bytes_before(kept - dropped, piece, self.name)
            counts.tokens -= dropped
            counts.dropped_tokens += dropped
            tail -= dropped
        every = [asdict(counts) for counts in self.of_source.values()]
        totals = {name: sum(one[name] for one in every) for name in asdict(_Counts())}
        return SplitFacts(blocks=self.writer.blocks, **totals)


class _SplitOfConversations(_Split):
    """One split of conversations while it is written, packed whole (see conversation_packing)."""

    def __init__(self, folder: Path, manifest: Manifest, packer: Packer, padding: int) -> None:
        super().__init__(folder, manifest, packer, has_marks=True)
        self._open = OpenBlocks(manifest.sequence_length, padding)
        self._trained = 0
        self.cut = 0  # conversations

    def add(self, piece: Done, tokens: np.ndarray, limit: int) -> None:
        """Add the conversations of a piece whose tokens are nearest to `limit`, all whole."""
        counts, known = (
            self.of_source[piece.part.source],
            self._packer.documents(piece, self.name),
        )
        ends = np.append(0, np.cumsum(known[:, TOKENS]))
        kept = int(np.abs(ends - limit).argmin()) if limit < ends[-1] else len(known)
        counts.documents += kept
        counts.bytes += int(known[:kept, BYTES].sum())
        counts.left_out_tokens += int(ends[-1] - ends[kept])
        for start, end in zip(ends[:kept], ends[1 : kept + 1], strict=True):
            conversation = tokens[start:end]
            parts = list(parts_of(conversation, self._length))
            self.cut += len(conversation) > self._length
            size = sum(map(len, parts))
            counts.tokens += size
            counts.dropped_tokens += max(0, len(conversation) - size)
            for part in parts:
                self._write(self._open.add(part))

    def _write(self, blocks: Iterable[list[np.ndarray]]) -> None:
        for parts in blocks:
            tokens, trained, begins = self._open.block_of(parts)
            self._trained += int(trained.sum())
            self.writer.append(tokens, trained=trained, begins=begins)

    def finish(self) -> SplitFacts:
        """Write the blocks that are not full; nothing is dropped."""
        self._write(self._open.close_all())
        return replace(super().finish(), trained_tokens=self._trained)


class Packer:
    """Writes a dataset into the new folder `written`, from scratch, while its pieces get done.

    It takes the pieces in the order of the text. Those of a mixture are taken at the end, for its
    order follows from the sizes of all. manifest: not yet counted.
    """

    def __init__(self, job: Job, manifest: Manifest, tokenizer: Any) -> None:
        # No other process writes to it, whatever becomes of the lock.
        self.written = Path(tempfile.mkdtemp(prefix="dataset-", dir=job.preparation.folder))
        self._preparation = job.preparation
        self._manifest = manifest
        self._tokenizer = tokenizer
        if template := job.preparation.template(tokenizer):
            tokenizer.chat_template = template.text  # so it is saved, and what is trained uses it
        self._pieces = job.pieces
        self._cut_documents = CutDocuments(tokenizer, job.encode_text)
        folders = [self.written / name for name in job.preparation.splits]
        self._splits: list[_Split] = [self._split(folder) for folder in folders]
        self._done: list[Done] = []
        self._next = PieceId(0, 0)

    def _split(self, folder: Path) -> _Split:
        if self._manifest.conversations is None:
            return _Split(folder, self._manifest, self)
        padding = padding_of(self._tokenizer)
        return _SplitOfConversations(folder, self._manifest, self, padding)

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
        tokens = self._tokens(piece)
        require_room(self.written, sum(of_split.nbytes for of_split in tokens.values()))
        for split in self._splits:
            allowed = limit if split.name == TRAIN else len(tokens[split.name])
            split.add(piece, tokens[split.name], allowed)

    def _tokens(self, piece: Done) -> dict[str, np.ndarray]:
        """The tokens of the documents of a piece that are kept, by split."""
        tokens = self._pieces.tokens(piece.id)
        if piece.is_kept is None:
            return tokens
        lengths = self._pieces.documents(piece.id)[:, TOKENS]
        return duplicates.tokens_kept(tokens, lengths, piece.is_kept)

    def documents(self, piece: Done, split: str) -> np.ndarray:
        """What is known of the documents that a piece gives to a split (see `EncodedPiece`)."""
        known = self._pieces.documents(piece.id).astype(np.int64)
        if piece.is_kept is not None:
            known = known[piece.is_kept]
        train = piece.record.splits[TRAIN].documents
        return {TRAIN: known[:train], VALIDATION: known[train:]}[split]

    def bytes_before(self, cut: int, piece: Done, split: str) -> int:
        """Bytes of the text of the first `cut` tokens that a piece gives to a split."""
        known = self.documents(piece, split)
        ends = np.cumsum(known[:, TOKENS])
        whole = int(np.searchsorted(ends, cut, side="right"))
        before = int(known[:whole, BYTES].sum())
        begin = int(ends[whole - 1]) if whole else 0
        if begin == cut:
            return before
        tokens = self._tokens(piece)[split][begin : ends[whole] - 1]

        def text() -> bytes:
            return self._text(piece, int(known[whole, ROW]))

        size = int(known[whole, BYTES])
        return before + self._cut_documents.bytes_before(cut - begin, tokens, size, text)

    def _text(self, piece: Done, row: int) -> bytes:
        """The text of a document of a piece, read once more."""
        column = self._pieces.text(piece.id)
        if column is None:
            pieces = readers.read_pieces(piece.part, self._preparation.read_options)
            again = next(itertools.islice(pieces, piece.id.place, None), None)
            if again is None or digest_of(again.column) != piece.record.digest:
                raise ForgeError(
                    f"{piece.part.spans[0].path} holds another text than a moment ago",
                    "run the same command again when nothing writes to it",
                )
            column = again.column
        return bytes(column[row].as_py())

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
            sources=self._sources(done),
            # Of the text, whatever its files are called and packed in.
            content_fingerprint=fingerprint([piece.record.digest for piece in done]),
            skipped_rows=sum(piece.record.skipped for piece in done),
            left_out=total([piece.record.left_out for piece in done]),
            conversations=self._conversations(),
        )
        known: dict[str, str] = {}
        for split in self._splits:
            of_files = split.writer.describe(
                split.name, f"{manifest.fingerprint[:16]}-{split.name}"
            )
            known |= {f"{split.name}/{name}": sha256 for name, sha256 in of_files.items()}
        write_json(self.written / DATASET_DICT, {"splits": list(manifest.splits)}, durable=False)
        save_tokenizer(self._tokenizer, self.written / TOKENIZER)
        return manifest.save(self.written, known)

    def _conversations(self) -> dict[str, Any] | None:
        """What is known of conversations, with the number of those that were cut; None: text."""
        known = self._manifest.conversations
        splits = [one for one in self._splits if isinstance(one, _SplitOfConversations)]
        return known and known | {"cut": sum(split.cut for split in splits)}

    def _sources(self, done: list[Done]) -> list[SourceFacts]:
        """What each source has given to train on, when that split is finished."""
        left_out = Counter[int]()
        for piece in (piece for piece in done if not piece.part.is_validation):
            counts = piece.record.left_out.values()
            left_out[piece.part.source] += sum(one.documents for one in counts)
        paths = self._preparation.config.dataset_path
        names = [name_of(split_weight(path)[0]) for path in paths]
        weights = self._preparation.weights or itertools.repeat(None)
        given = self._splits[0].of_source
        return [
            SourceFacts(name, weight, **asdict(given[source]), left_out_documents=left_out[source])
            for source, (name, weight) in enumerate(zip(names, weights, strict=False))
        ]

    def close(self) -> None:
        """End the files that are being written; what is not finished is removed."""
        for split in self._splits:
            with contextlib.suppress(OSError):  # of a full disk, once more
                split.writer.close()
        if not (self.written / MANIFEST).exists():
            shutil.rmtree(self.written, ignore_errors=True)
