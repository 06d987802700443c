"""A file that is read: its bytes, decompressed where they must be, and what of it is bad."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from p2p_llm_forge.data.decompress import open_compressed
from p2p_llm_forge.data.formats import compression_of
from p2p_llm_forge.data.parts import ReadOptions, Span
from p2p_llm_forge.errors import ForgeError

# Documents, some at a time, each time with the bytes of the file that they took.
Columns = Iterator[tuple[pa.LargeBinaryArray, int]]

LONGEST_DOCUMENT = 256 << 20  # bytes: encoding one takes several times as much memory
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TO_UTF8 = "convert it to UTF-8, or put U+FFFD in place of such bytes with --encoding-errors replace"


@dataclass
class InputFile:
    """A range of a file, or the name of a dataset. skipped: bad rows since that was last taken."""

    span: Span
    options: ReadOptions
    skipped: int = 0

    @property
    def path(self) -> str:
        return self.span.path

    def skip(self, found: str, fix: str = "correct it", rows: int = 1) -> None:
        """Count bad rows. Raises ForgeError unless they are to be skipped."""
        if not self.options.skip_bad_rows:
            raise ForgeError(found, f"{fix}, or use --skip-bad-rows to leave it out")
        self.skipped += rows

    def skip_damaged(self, error: Exception, rows: int = 1) -> None:
        """Count, or refuse, what a reader could not get out of the file."""
        found = f"{self.path} is damaged or truncated: {first_line(error)}"
        self.skip(found, "copy or download the file again", rows)

    def take_skipped(self) -> int:
        """How many bad rows there were since this was last asked."""
        count, self.skipped = self.skipped, 0
        return count

    def require_unchanged(self) -> None:
        """Raise ForgeError if the file is another one than when it was found."""
        if not self.span.mtime_ns:
            return
        with contextlib.suppress(OSError):
            stat = Path(self.path).stat()
            if (stat.st_size, stat.st_mtime_ns) == (self.span.size, self.span.mtime_ns):
                return
        raise self._changed()

    def _changed(self) -> ForgeError:
        return ForgeError(
            f"{self.path} changed while it was read",
            "run the same command again when nothing writes to it; what was read of others is kept",
        )

    def read(self, pattern: re.Pattern[bytes] | None = None) -> bytes:
        """The bytes of the range, without a byte order mark. Raises ForgeError.

        pattern: after which documents end. Of one that is too long only what stands before it.
        """
        start, size = self.span.start, self.span.end - self.span.start
        is_too_long = size > LONGEST_DOCUMENT + self.options.piece_bytes
        if is_too_long:
            self._skip_long()
        wanted = self.options.piece_bytes if is_too_long else size
        try:
            with open(self.path, "rb") as stream:
                stream.seek(start)
                raw = stream.read(wanted)
        except OSError as error:
            raise ForgeError(
                f"{self.path} cannot be read: {error.strerror}",
                "make the file readable, and run the same command again",
            ) from error
        if len(raw) != wanted:
            raise self._changed()
        raw = raw if start else raw.removeprefix(BYTE_ORDER_MARK)
        return _whole_documents(raw, pattern) if is_too_long else raw

    def _skip_long(self) -> None:
        self.skip(
            f"{self.path} holds a document or line of more than {LONGEST_DOCUMENT >> 20} MiB",
            "divide it, for example by another --document-separator",
        )

    @contextlib.contextmanager
    def decompressed(self) -> Iterator[tuple[Any, Any]]:
        """(the file's decompressed bytes, the file itself, whose place is the progress)."""
        try:
            with open(self.path, "rb") as file:  # pa.OSFile takes only paths of UTF-8
                name = compression_of(self.path)
                yield (open_compressed(file, name) if name else file), file
        except OSError as error:  # also what pyarrow raises for damaged streams
            self.skip_damaged(error)

    def pieces(self, pattern: re.Pattern[bytes] | None) -> Iterator[tuple[bytes, int]]:
        """The decompressed text in pieces that end after `pattern` (None: one piece), each with
        the bytes of the file that it took; all but the last have `piece_bytes` or more.

        Of damaged files and of documents that are too long, what stands before is kept.
        """
        waiting, read, at_least = b"", 0, self.options.piece_bytes
        searched, is_too_long, is_whole = at_least, False, False
        with self.decompressed() as (stream, file):
            while more := stream.read(at_least):
                waiting += more
                found = pattern.search(waiting, searched) if pattern else None
                # At the very end a separator may continue in the next bytes.
                if found and found.end() < len(waiting):
                    if not is_too_long:
                        yield waiting[: found.end()], file.tell() - read
                        read = file.tell()
                    waiting, searched, is_too_long = waiting[found.end() :], at_least, False
                    continue
                # What was searched is not searched again.
                overlap = len(pattern.pattern) if pattern else 0
                searched = found.start() if found else max(searched, len(waiting) - overlap)
                if is_too_long or len(waiting) > LONGEST_DOCUMENT + at_least:
                    if not is_too_long:
                        self._skip_long()
                        yield _whole_documents(waiting[:at_least], pattern), file.tell() - read
                        read = file.tell()
                    waiting, searched, is_too_long = waiting[searched:], 0, True
            is_whole = True
        if is_too_long:
            return
        if not is_whole:
            waiting = _whole_documents(waiting, pattern)
        if waiting:
            yield waiting, self.span.end - read

    @contextlib.contextmanager
    def seekable(self) -> Iterator[Any]:
        """The file, unpacked if it is compressed: parquet is read from its end."""
        if not compression_of(self.path):
            with open(self.path, "rb") as file:
                yield file
            return
        with tempfile.TemporaryFile() as unpacked:
            with self.decompressed() as (stream, _):
                shutil.copyfileobj(stream, unpacked)
            unpacked.seek(0)
            yield unpacked


def _whole_documents(raw: bytes, pattern: re.Pattern[bytes] | None) -> bytes:
    """All up to the end of the last document that ends."""
    ends = [found.end() for found in pattern.finditer(raw)] if pattern else []
    return raw[: ends[-1]] if ends else b""


def first_line(error: Exception) -> str:
    """The first line of an error of a library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
