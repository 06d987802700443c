"""Text files: documents between separators; what is no UTF-8 is named, replaced or left out."""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.input_file import BYTE_ORDER_MARK, TO_UTF8, Columns, InputFile
from p2p_llm_forge.data.parts import BLANK_LINES, ReadOptions, column_of, compression_of, is_utf8
from p2p_llm_forge.errors import ForgeError


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    r"""Where a text may be cut: after this. (Beginning with a literal byte, it is found fast.)"""
    blank_lines = rb"\n\r?\n[\r\n]*"
    return re.compile(blank_lines if separator == BLANK_LINES else re.escape(separator.encode()))


def plain(file: InputFile) -> pa.LargeBinaryArray:
    """The documents of a range of a text file."""
    raw = file.read()
    return text_column(raw, file, file.span.end - len(raw))


def compressed(file: InputFile) -> Columns:
    """The documents of a compressed text file."""
    one = file.options.one_document_per_file
    offset = 0
    for raw, source_bytes in file.pieces(
        None if one else separator_pattern(file.options.separator)
    ):
        text = raw if offset else raw.removeprefix(BYTE_ORDER_MARK)
        offset += len(raw)
        yield text_column(text, file, offset - len(text)), source_bytes


def text_column(raw: bytes, file: InputFile, offset: int) -> pa.LargeBinaryArray:
    """The documents of a text that begins at `offset`. Raises ForgeError, naming a byte."""
    column = _divided(raw, file.options)
    try:
        column.cast(pa.large_string())  # checks UTF-8, 20 times as fast as Python
        return column
    except pa.ArrowInvalid:
        if file.options.encoding_errors == "replace":
            return _divided(raw.decode("utf-8", errors="replace").encode(), file.options)
    if file.options.skip_bad_rows:
        good = [document for document in column.to_pylist() if is_utf8(document)]
        file.skipped += len(column) - len(good)
        return column_of(good)
    name = f"{file.path} (decompressed)" if compression_of(file.path) else file.path
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ForgeError(
            f"{name} is not UTF-8: byte 0x{raw[error.start]:02x} at offset "
            f"{offset + error.start} ({error.reason})",
            TO_UTF8,
        ) from error
    raise ForgeError(
        f"{name}: --document-separator cuts a character in two", "give another separator"
    )


def _divided(raw: bytes, options: ReadOptions) -> pa.LargeBinaryArray:
    if options.one_document_per_file:
        return column_of([raw] if raw else [])
    if options.separator != BLANK_LINES:
        return column_of([part for part in raw.split(options.separator.encode()) if part])
    return _divided_at_blank_lines(raw)


def _divided_at_blank_lines(raw: bytes) -> pa.LargeBinaryArray:
    r"""The documents between blank lines, in order; empty ones are left out.

    One or more empty lines end a document, whether lines end in LF or CRLF, and line ends at the
    borders of a document are not part of it. A line of spaces is not empty. Inside a document every
    byte stays as it is, CRLF too. (As `re.split(rb"\n\r?\n[\r\n]*")` and strip, but faster.)
    """
    text = np.frombuffer(raw, np.uint8)
    stops = np.concatenate([np.empty(0, np.int64), *_ends_before_blank_lines(raw, text)])
    starts = stops + np.where(text[stops + 1] == ord("\n"), 2, 3)
    starts, stops = np.append(0, starts), np.append(stops, len(raw))
    some = stops > starts  # between two empty lines in a row there is nothing
    starts, stops = _stripped(raw, text, starts[some], stops[some])
    # What lies between documents is every other value, and is left out: no Python object is made.
    borders = np.empty(2 * len(starts) + 2, np.int64)
    borders[0], borders[-1] = 0, len(raw)
    borders[1:-1:2], borders[2:-1:2] = starts, stops
    buffers = [None, pa.py_buffer(borders), pa.py_buffer(raw)]
    values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(borders) - 1, buffers)
    return values.take(pa.array(2 * np.flatnonzero(stops > starts) + 1))


def _ends_before_blank_lines(raw: bytes, text: np.ndarray) -> Iterator[np.ndarray]:
    """The places of line ends after which an empty line comes, window by window."""
    window = 64 << 10  # what is computed of it stays in the processor's cache
    for start in range(0, len(raw), window):
        part = text[start : start + window + 2]
        is_end = part == ord("\n")
        is_blank = is_end[:-1] & is_end[1:]
        if raw.find(b"\r", start, start + len(part)) >= 0:
            is_blank[:-1] |= is_end[:-2] & is_end[2:] & (part[1:-1] == ord("\r"))
        yield start + np.flatnonzero(is_blank[:window])


def _stripped(
    raw: bytes, text: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The stretches of a text without the line ends at their borders (rare but in CRLF files)."""
    is_end = np.zeros(256, bool)
    is_end[[ord("\n"), ord("\r")]] = True
    for place in np.flatnonzero(is_end[text[starts]] | is_end[text[stops - 1]]):
        start, stop = int(starts[place]), int(stops[place])
        document = raw[start:stop]
        starts[place] = start + len(document) - len(document.lstrip(b"\r\n"))
        stops[place] = max(int(starts[place]), start + len(document.rstrip(b"\r\n")))
    return starts, stops
