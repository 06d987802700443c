"""Files on their way here: what has come stays for the next try, and only what is whole counts."""

from __future__ import annotations

import errno
import hashlib
import re
import threading
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from io import FileIO
from pathlib import Path

from p2p_llm_forge.files import fsync, sha256_of

PIECE_BYTES = 4 << 20
READ_BYTES = 1 << 20
PART, PIECES = ".part", ".part.pieces"  # what is added to the name of a file


@dataclass(frozen=True)
class FileFacts:
    """One file of a set, as manifests name it."""

    size: int
    sha256: str

    def is_valid(self) -> bool:
        """Whether there can be such a file: facts may come from another machine."""
        is_size = isinstance(self.size, int) and 0 <= self.size < 2**60
        return is_size and bool(re.fullmatch(r"[0-9a-f]{64}", str(self.sha256)))


def with_parts(names: Iterable[str]) -> set[str]:
    """Files, and what lies in their place while they come."""
    return {name + added for name in names for added in ("", PART, PIECES)}


def bytes_missing(folder: Path, files: Mapping[str, FileFacts]) -> int:
    """What has still to come of these; a whole file is known by its size."""
    missing = 0
    for name, facts in files.items():
        path = folder / name
        if not path.is_file() or path.stat().st_size != facts.size:
            partial = PartialFile(path, facts)
            partial.look()
            missing += partial.bytes_missing()
    return missing


class PartialFile:
    """A file of which some pieces are here, in `<name>.part`; `<name>.part.pieces` says which.

    The record belongs to one content: for another one everything comes again. A piece is noted
    after it was written; should a crash of the machine lose it all the same, the hash shows it.
    Methods raise OSError. `write` and `note` may be called from several threads.
    """

    def __init__(self, path: Path, facts: FileFacts) -> None:
        self.path, self.facts = path, facts
        self.count = -(-facts.size // PIECE_BYTES)  # of pieces
        # 1 for a piece that is here; empty while none can be: sizes may come from another machine.
        self.has = bytearray()
        self.was_begun = False  # by an earlier try
        self.attempt = 0  # counts how often it has begun again
        self._part = path.with_name(path.name + PART)
        self._record = path.with_name(path.name + PIECES)
        self._files: list[FileIO] = []  # both, while pieces come
        self._is_closed = False
        self._lock = threading.Lock()

    def is_whole(self) -> bool:
        """Whether the file lies at its place already."""
        if not self.path.is_file() or self.path.stat().st_size != self.facts.size:
            return False
        return sha256_of(self.path) == self.facts.sha256

    def tidy(self) -> None:
        """Remove what a kill between the last two steps of `publish` has left."""
        self._part.unlink(missing_ok=True)
        self._record.unlink(missing_ok=True)

    def bytes_missing(self) -> int:
        """What has still to come."""
        if not self.has:
            return self.facts.size
        return sum(self.span(piece)[1] for piece in range(self.count) if not self.has[piece])

    def span(self, piece: int) -> tuple[int, int]:
        """Where a piece begins, and its size."""
        start = piece * PIECE_BYTES
        return start, min(PIECE_BYTES, self.facts.size - start)

    def look(self) -> None:
        """See what an earlier try has left; changes nothing."""
        head = self._head()
        try:
            noted = self._record.read_bytes()
            size = self._part.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return
        pieces = noted[len(head) :]
        if noted[: len(head)] == head and len(pieces) == self.count and set(pieces) <= {0, 1}:
            ends = [sum(self.span(piece)) for piece in range(self.count)]
            here = (has and end <= size for has, end in zip(pieces, ends, strict=True))
            self.has = bytearray(here)
            self.was_begun = any(self.has)

    def open(self) -> None:
        """Go on with what an earlier try has left, or begin, once there is room for it."""
        if self.path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "a folder is in the way", str(self.path))
        self.path.parent.mkdir(parents=True, exist_ok=True)
        if not self.was_begun:
            self._part.write_bytes(b"")
        self.has = self.has or bytearray(self.count)
        self._record.write_bytes(self._head() + self.has)

    def write(self, offset: int, content: memoryview, attempt: int = 0) -> bool:
        """Write a part of a piece. False: it is of an earlier attempt, or its piece is here
        already, perhaps hashed, and stays as it is."""
        with self._lock:
            is_late = self._is_closed or self.attempt != attempt
            if is_late or self.has[offset // PIECE_BYTES]:
                return False
            part, _ = self._opened()
            part.seek(offset)
            while len(content):
                content = content[part.write(content) :]
            return True

    def note(self, piece: int) -> None:
        """Remember that a piece is here."""
        with self._lock:
            if self._is_closed:
                return
            self.has[piece] = 1
            _, record = self._opened()
            record.seek(len(self._head()) + piece)
            record.write(b"\1")
            if 0 not in self.has:
                self._close_files()

    def digest(self, wait_for: Callable[[int], None]) -> str:
        """The SHA-256 of the content. wait_for: returns when a piece is here."""
        digest, buffer = hashlib.sha256(), memoryview(bytearray(READ_BYTES))
        with self._part.open("rb", buffering=0) as file:
            for piece in range(self.count):
                wait_for(piece)
                left = self.span(piece)[1]
                while left and (size := file.readinto(buffer[:left])):
                    digest.update(buffer[:size])
                    left -= size
        return digest.hexdigest()

    def forget(self) -> None:
        """Begin again: nothing of what has come is worth anything."""
        with self._lock:
            self.attempt += 1
            if self._is_closed:
                return
            self.has[:] = bytes(self.count)
            self.was_begun = False
            _, record = self._opened()
            record.seek(0)
            record.write(self._head() + self.has)

    def publish(self) -> None:
        """Put the file, which is whole, at its place, durably."""
        self.close()
        fsync(self._part)
        self._part.replace(self.path)
        self._record.unlink()
        fsync(self.path.parent)

    def close(self) -> None:
        """Leave what has come for the next try."""
        with self._lock:
            self._is_closed = True
            self._close_files()

    def _opened(self) -> list[FileIO]:
        """Both files: open only while pieces come, since there may be more than can be open."""
        if not self._files:
            self._files = [one.open("r+b", buffering=0) for one in (self._part, self._record)]
        return self._files

    def _close_files(self) -> None:
        for file in self._files:
            file.close()
        self._files = []

    def _head(self) -> bytes:
        return f"{self.facts.sha256} {self.facts.size} {PIECE_BYTES}\n".encode()
