"""Compressed files: their decompressed bytes as a stream, cut into pieces, or unpacked."""

from __future__ import annotations

import contextlib
import re
import shutil
import tempfile
from collections.abc import Iterator
from typing import Any

import pyarrow as pa

from p2p_llm_forge.data.parts import BadRows, Span, compression_of


@contextlib.contextmanager
def open_decompressed(span: Span, bad_rows: BadRows) -> Iterator[tuple[Any, Any]]:
    """(the file's decompressed bytes, the file itself, whose place is the progress)."""
    try:
        with pa.OSFile(span.path) as file:
            name = compression_of(span.path)
            yield (pa.CompressedInputStream(file, name) if name else file), file
    except OSError as error:  # also what pyarrow raises for damaged streams
        bad_rows.add_damaged(span.path, error)


def decompressed_pieces(
    span: Span, pattern: re.Pattern[bytes] | None, piece_bytes: int, bad_rows: BadRows
) -> Iterator[tuple[bytes, int]]:
    """A compressed file's text in pieces that end after `pattern` (None: one piece), each with the
    bytes of the file that it took. piece_bytes: of text, of each piece but the last, at least."""
    waiting, read = b"", 0
    with open_decompressed(span, bad_rows) as (stream, file):
        while True:
            more = stream.read(piece_bytes)
            waiting += more
            if pattern and more:
                # At the very end a separator may continue in the next bytes.
                found = pattern.search(waiting, min(piece_bytes, len(waiting)))
                if not found or found.end() == len(waiting):
                    continue
                yield waiting[: found.end()], file.tell() - read
                waiting, read = waiting[found.end() :], file.tell()
            elif not more:
                break
    if waiting:
        yield waiting, span.end - read


@contextlib.contextmanager
def open_seekable(span: Span, bad_rows: BadRows) -> Iterator[Any]:
    """The file, unpacked into a temporary one if it is compressed: parquet is read from its end."""
    if not compression_of(span.path):
        with open(span.path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        with open_decompressed(span, bad_rows) as (stream, _):
            shutil.copyfileobj(stream, unpacked)
        unpacked.seek(0)
        yield unpacked
