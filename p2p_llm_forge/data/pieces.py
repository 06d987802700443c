"""The tokens of pieces that are done, on disk: what a preparation that is killed resumes from.

A piece is named after all that decides its tokens: the file as it stood, the tokenizer, the
options. So whatever lies here from a run that was killed is either just what is needed or not
looked at, and several machines with one folder agree without any message.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, NamedTuple
from weakref import WeakValueDictionary

import numpy as np
import pyarrow as pa
import xxhash

from p2p_llm_forge.data.parts import Part, values_and_offsets
from p2p_llm_forge.data.splits import ROW, TRAIN, VALIDATION, SplitCounts
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import fingerprint, read_json, write_file, write_json


class PieceId(NamedTuple):
    """Which piece: the number of its part, and its own number there."""

    part: int
    place: int

    @property
    def number(self) -> int:
        """Its number among the pieces of all parts, none of which has 2**32."""
        return (self.part << 32) + self.place


@dataclass(frozen=True)
class Record:
    """What is known of a piece that is done.

    splits: what it adds to each; left_out: what to none, by the reason; digest: of its documents;
    checksum: of its tokens; documents_checksum: of what is known of each; skipped: rows; is_last:
    of its part.
    """

    splits: dict[str, SplitCounts]
    digest: str
    checksum: str
    documents_checksum: str
    skipped: int
    is_last: bool
    left_out: dict[str, SplitCounts] = field(default_factory=dict)


class Pieces:
    """The tokens of the pieces of `parts`, in `folder`.

    decides: all that decides the tokens besides the text.
    """

    def __init__(self, folder: Path, parts: list[Part], decides: dict[str, Any], dtype: str):
        self.folder = folder
        self._dtype = dtype
        self._keys = [
            fingerprint([number, asdict(part), decides])[:20] for number, part in enumerate(parts)
        ]
        self._records: dict[PieceId, Record] = {}
        # Tokens that were written just now and are still in somebody's hands.
        self._fresh: WeakValueDictionary[PieceId, np.ndarray] = WeakValueDictionary()
        folder.mkdir(exist_ok=True)  # not its parents: the main rank may have cleared up

    def record(self, piece: PieceId) -> Record | None:
        """The record of a piece, if it is done and its tokens are as they were written."""
        if piece not in self._records:
            try:
                content = read_json(self._path(piece, "json"))
            except (OSError, ValueError):
                return None
            for name in ("splits", "left_out"):
                content[name] = {key: SplitCounts(**of) for key, of in content[name].items()}
            record = Record(**content)
            if self._read(piece, record) is None or self._documents(piece, record) is None:
                return None
            self._records[piece] = record
        return self._records[piece]

    def has_all_of(self, part: int) -> bool:
        """Whether all pieces of a part are done."""
        piece = PieceId(part, 0)
        while (record := self.record(piece)) and not record.is_last:
            piece = PieceId(part, piece.place + 1)
        return record is not None

    def write(
        self, piece: PieceId, tokens: np.ndarray, documents: np.ndarray, record: Record
    ) -> None:
        """Keep the tokens of a piece: those to train on, then those held out. Raises OSError.

        documents: what is known of each, in that order (see `EncodedPiece`).
        """
        # Not durable: a crash of the machine can damage these, which the checksum shows.
        write_file(self._path(piece, "tokens"), tokens.data, durable=False)
        write_file(self._path(piece, "documents"), documents.data, durable=False)
        write_json(self._path(piece, "json"), asdict(record), durable=False)
        self._fresh[piece] = tokens
        self._records[piece] = record

    def tokens(self, piece: PieceId) -> dict[str, np.ndarray]:
        """The tokens of a piece that is done, by split."""
        record, tokens = self._records[piece], self._fresh.get(piece)
        if tokens is None:
            tokens = self._read(piece, record)
        if tokens is None:
            raise self._damaged(piece, "tokens")
        train = record.splits[TRAIN].tokens
        return {TRAIN: tokens[:train], VALIDATION: tokens[train:]}

    def documents(self, piece: PieceId) -> np.ndarray:
        """What was written of each document of a piece that is done."""
        record = self._records[piece]
        documents = self._documents(piece, record)
        if documents is None:
            raise self._damaged(piece, "documents")
        count = sum(counts.documents for counts in record.splits.values())
        return documents.reshape(count, -1) if count else documents.reshape(0, ROW + 3)

    def keep_text(self, piece: PieceId, column: pa.LargeBinaryArray) -> None:
        """Keep the documents of a piece, where reading them once more would be dear."""
        batch = pa.record_batch([column], names=["documents"])
        file = pa.BufferOutputStream()
        options = pa.ipc.IpcWriteOptions(compression="zstd")
        with pa.ipc.new_stream(file, batch.schema, options=options) as stream:
            stream.write_batch(batch)
        write_file(self._path(piece, "text"), file.getvalue(), durable=False)

    def text(self, piece: PieceId) -> pa.LargeBinaryArray | None:
        """The documents of a piece, if they were kept and are as they were written."""
        try:
            stream = pa.ipc.open_stream(self._path(piece, "text").read_bytes())
            column = stream.read_next_batch().column(0)
        except (OSError, pa.ArrowException, StopIteration):
            return None
        return column if digest_of(column) == self._records[piece].digest else None

    def _damaged(self, piece: PieceId, kind: str) -> ForgeError:
        return ForgeError(
            f"{self._path(piece, kind)} was damaged on the disk",
            "run the same command again: the piece is tokenized from scratch",
        )

    def _documents(self, piece: PieceId, record: Record) -> np.ndarray | None:
        return self._intact(piece, "documents", "<u8", record.documents_checksum)

    def _read(self, piece: PieceId, record: Record) -> np.ndarray | None:
        return self._intact(piece, "tokens", self._dtype, record.checksum)

    def _intact(self, piece: PieceId, kind: str, dtype: str, checksum: str) -> np.ndarray | None:
        """What a file holds, if it is as it was written."""
        try:
            content = np.fromfile(self._path(piece, kind), dtype)
        except OSError:
            return None
        return content if digest(content) == checksum else None

    def _path(self, piece: PieceId, kind: str) -> Path:
        return self.folder / f"{self._keys[piece.part]}-{piece.place:06d}.{kind}"


def digest(*arrays: np.ndarray) -> str:
    """A hash of what lies in memory (XXH3, 128 bits).

    Not against forgers: it tells texts apart at 5 GB/s, where SHA-256 would take a seventh of all
    the time that tokenizing takes.
    """
    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(array.data)
    return state.hexdigest()


def digest_of(documents: pa.LargeBinaryArray) -> str:
    """A hash of documents, their text and their borders."""
    return digest(*values_and_offsets(documents))
