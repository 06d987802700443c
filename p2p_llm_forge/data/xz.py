"""Decompressing .xz, which pyarrow does not: several streams, padding between them, and damage."""

from __future__ import annotations

import io
import lzma
from typing import Any

CHUNK_BYTES = 1 << 16  # of the file that are read at a time
MEMORY_BYTES = 1 << 30  # of a dictionary; `xz -9` needs 65 MB, and a header can ask for 4 GB


class XzStream(io.RawIOBase):
    """What an .xz file holds, as a stream. Raises OSError where it is damaged or ends too early,
    after all that could be read before.

    lzma.LZMAFile takes whatever follows a stream and is none for the end, padding too.
    """

    def __init__(self, file: Any) -> None:
        self._file = file
        self._decoder: lzma.LZMADecompressor | None = None  # of the stream that is being read
        self._waiting = b""  # of the file, before the next stream
        self._damage: OSError | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes (below 0: all), fewer only at the end or before damage."""
        parts: list[bytes] = []
        left = size
        while left and not self._damage:
            try:
                part = self._decoded(left)
            except (OSError, lzma.LZMAError) as error:
                self._damage = OSError(str(error))
                break
            if part is None:
                break
            parts.append(part)
            left -= len(part) if size >= 0 else 0
        found = b"".join(parts)
        if self._damage and left and not found:
            raise self._damage
        return found

    def readinto(self, buffer: Any) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    def _decoded(self, most: int) -> bytes | None:
        """Some bytes, perhaps none; None at the end of the file. most: below 0 for any number."""
        decoder = self._decoder
        if decoder is None:
            self._waiting = self._waiting.lstrip(b"\0")  # padding between streams
            self._waiting = self._waiting or self._file.read(CHUNK_BYTES)
            if not self._waiting:
                return None
            if self._waiting.strip(b"\0"):
                self._decoder = lzma.LZMADecompressor(lzma.FORMAT_XZ, MEMORY_BYTES)
            return b""
        given, self._waiting = self._waiting, b""
        if not given and decoder.needs_input:
            given = self._file.read(CHUNK_BYTES)
            if not given:
                raise OSError("Truncated compressed stream")
        part = decoder.decompress(given, most)
        if decoder.eof:
            self._waiting, self._decoder = decoder.unused_data, None
        return part
