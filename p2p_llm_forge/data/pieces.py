"""The tokens of pieces that are done, on disk: what a preparation that is killed resumes from.

A piece is named after all that decides its tokens: the file as it stood, the tokenizer, the
options. So whatever lies here from a run that was killed is either just what is needed or not
looked at, and several machines with one folder agree without any message.
"""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple
from weakref import WeakValueDictionary

from p2p_llm_forge.data.parts import Part, values_and_offsets
from p2p_llm_forge.data.splits import TRAIN, VALIDATION, SplitCounts
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import fingerprint, read_json, write_file, write_json

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PIECES_OF_A_PART = 1 << 32  # more than any part has: pieces are numbered part by part


class PieceId(NamedTuple):
    """Which piece: the number of its part, the part, its own number there."""

    part_number: int
    part: Part
    place: int

    @property
    def number(self) -> int:
        """Its number among the pieces of all parts."""
        return self.part_number * PIECES_OF_A_PART + self.place


@dataclass(frozen=True)
class Record:
    """What is known of a piece that is done.

    splits: what it adds to each; digest: of its documents; checksum: of its tokens; skipped: rows;
    is_last: of its part.
    """

    splits: dict[str, SplitCounts]
    digest: str
    checksum: str
    skipped: int
    is_last: bool


class Pieces:
    """The tokens of pieces, in `folder`. decides: all that decides them besides the text."""

    def __init__(self, folder: Path, decides: dict[str, Any], dtype: str) -> None:
        self._folder = folder
        self._decides = decides
        self._dtype = dtype
        self._records: dict[str, Record] = {}
        # Tokens that were written just now and are still in somebody's hands.
        self._fresh: WeakValueDictionary[str, np.ndarray] = WeakValueDictionary()
        self._part_keys: dict[int, tuple[Part, str]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, piece: PieceId) -> Record | None:
        """The record of a piece, if it is done and its tokens are as they were written."""
        name = self._name(piece)
        if name not in self._records:
            try:
                content = read_json(self._folder / f"{name}.json")
                splits = {key: SplitCounts(**counts) for key, counts in content["splits"].items()}
                record = Record(**content | {"splits": splits})
            except (OSError, ValueError):
                return None
            if self._read(name, record) is None:
                return None
            self._records[name] = record
        return self._records[name]

    def has_all_of(self, part_number: int, part: Part) -> bool:
        """Whether all pieces of a part are done."""
        place = 0
        while record := self.record(PieceId(part_number, part, place)):
            if record.is_last:
                return True
            place += 1
        return False

    def write(self, piece: PieceId, tokens: np.ndarray, record: Record) -> None:
        """Keep the tokens of a piece: those to train on, then those held out. Raises OSError."""
        name = self._name(piece)
        # Not durable: a crash of the machine can damage these, which the checksum shows.
        write_file(self._folder / f"{name}.tokens", tokens.data, durable=False)
        write_json(self._folder / f"{name}.json", asdict(record), durable=False)
        self._fresh[name] = tokens
        self._records[name] = record

    def tokens(self, piece: PieceId) -> dict[str, np.ndarray]:
        """The tokens of a piece that is done, by split."""
        name = self._name(piece)
        record, tokens = self._records[name], self._fresh.get(name)
        if tokens is None:
            tokens = self._read(name, record)
            if tokens is None:
                raise ForgeError(
                    f"{self._folder / name}.tokens was damaged on the disk",
                    "run the same command again: the piece is tokenized from scratch",
                )
        train = record.splits[TRAIN].tokens
        return {TRAIN: tokens[:train], VALIDATION: tokens[train:]}

    def _read(self, name: str, record: Record) -> np.ndarray | None:
        """The tokens in a file, if they are as they were written."""
        import numpy as np

        try:
            tokens = np.fromfile(self._folder / f"{name}.tokens", self._dtype)
        except OSError:
            return None
        return tokens if digest(tokens) == record.checksum else None

    def _name(self, piece: PieceId) -> str:
        known = self._part_keys.get(piece.part_number)
        if known is None or known[0] is not piece.part:
            key = fingerprint([piece.part_number, asdict(piece.part), self._decides])[:20]
            known = self._part_keys[piece.part_number] = (piece.part, key)
        return f"{known[1]}-{piece.place:06d}"


def digest(*arrays: np.ndarray) -> str:
    """A hash of what lies in memory (XXH3, 128 bits).

    Not against forgers: it tells texts apart at 5 GB/s, where SHA-256 would take a seventh of all
    the time that tokenizing takes.
    """
    import xxhash

    state = xxhash.xxh3_128()
    for array in arrays:
        state.update(array.data)
    return state.hexdigest()


def digest_of(documents: pa.LargeBinaryArray) -> str:
    """A hash of documents, their text and their borders."""
    return digest(*values_and_offsets(documents))
