"""Decompressing: several members one after the other, padding between them, and damage.

pyarrow, and Python's own readers of such files, lose what they had read just before damage, and
take padding for damage or for the end.
"""

from __future__ import annotations

import abc
import bz2
import io
import lzma
import zlib
from typing import Any

import pyarrow as pa

CHUNK_BYTES = 1 << 17  # of the file that are read at a time
ZSTD_BYTES = 1 << 12  # of text that are decompressed at a time
XZ_MEMORY_BYTES = 1 << 30  # of a dictionary; `xz -9` needs 65 MB, and a header can ask for 4 GB


def open_compressed(file: Any, compression: str) -> io.RawIOBase:
    """What a compressed file holds, as a stream. compression: gzip, bz2, xz or zstd."""
    return ZstdStream(file) if compression == "zstd" else MemberStream(file, compression)


class DamagedStream(io.RawIOBase):
    """A stream that raises OSError where it is damaged or ends too early, after all that could be
    read before."""

    _damage: OSError | None = None

    def readable(self) -> bool:
        return True

    def read(self, size: int = -1) -> bytes:
        """The next `size` bytes (below 0: all), fewer only at the end or before damage."""
        parts: list[bytes] = []
        left = size
        while left and not self._damage:
            try:
                part = self._decoded(left)
            except (OSError, lzma.LZMAError, zlib.error) as error:
                self._damage = OSError(str(error))
                break
            if part is None:
                break
            parts.append(part)
            left -= len(part) if size >= 0 else 0
        found = b"".join(parts)
        if self._damage and left and (size < 0 or not found):
            raise self._damage
        return found

    def readinto(self, buffer: Any) -> int:
        part = self.read(len(buffer))
        buffer[: len(part)] = part
        return len(part)

    @abc.abstractmethod
    def _decoded(self, most: int) -> bytes | None:
        """Some bytes, perhaps none; None at the end of the file. most: below 0 for any number."""


class ZstdStream(DamagedStream):
    """What a .zst file holds: several frames, also such as hold no content."""

    def __init__(self, file: Any) -> None:
        self._stream = pa.CompressedInputStream(file, "zstd")

    def _decoded(self, most: int) -> bytes | None:
        # Of what is asked for at once, pyarrow gives nothing where it meets damage.
        return self._stream.read(ZSTD_BYTES if most < 0 else min(most, ZSTD_BYTES)) or None


class MemberStream(DamagedStream):
    """What a .gz, .bz2 or .xz file holds: several members, with zeros as padding after each."""

    def __init__(self, file: Any, compression: str) -> None:
        self._file = file
        self._compression = compression
        self._decoder: Any = None  # of the member that is being read
        self._waiting = b""  # of the file, before the next member

    def _decoded(self, most: int) -> bytes | None:
        decoder = self._decoder
        if decoder is None:
            found = self._waiting or self._file.read(CHUNK_BYTES)
            if not found:
                return None
            self._waiting = found.lstrip(b"\0")  # padding
            if self._waiting:
                self._decoder = _decoder(self._compression)
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


def _decoder(compression: str) -> Any:
    if compression == "xz":
        return lzma.LZMADecompressor(lzma.FORMAT_XZ, XZ_MEMORY_BYTES)
    return bz2.BZ2Decompressor() if compression == "bz2" else GzipDecoder()


class GzipDecoder:
    """One member of a .gz file, with the interface of the decoders of bz2 and lzma."""

    def __init__(self) -> None:
        self._decoder = zlib.decompressobj(16 + zlib.MAX_WBITS)
        self.needs_input = True

    def decompress(self, given: bytes, most: int) -> bytes:
        """Some bytes. most: below 0 for any number."""
        given = self._decoder.unconsumed_tail + given
        part = self._decoder.decompress(given, max(0, most))
        # What was full may have more.
        self.needs_input = not self._decoder.unconsumed_tail and len(part) != most
        return part

    @property
    def eof(self) -> bool:
        return self._decoder.eof

    @property
    def unused_data(self) -> bytes:
        return self._decoder.unused_data
