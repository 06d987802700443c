"""Text files: documents between separators; what is no UTF-8 is named, replaced or left out."""

from __future__ import annotations

import re

import pyarrow as pa
import pyarrow.compute as pc

from p2p_llm_forge.config.prepare import BLANK_LINES
from p2p_llm_forge.data.formats import compression_of
from p2p_llm_forge.data.input_file import BYTE_ORDER_MARK, TO_UTF8, Columns, InputFile
from p2p_llm_forge.data.parts import column_of, column_of_one, is_utf8, without_empty
from p2p_llm_forge.errors import ForgeError

EMPTY_LINES = r"\n\r?\n[\r\n]*"


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    r"""Where a text may be cut: after this. (Beginning with a literal byte, it is found fast.)"""
    pattern = EMPTY_LINES if separator == BLANK_LINES else re.escape(separator)
    return re.compile(pattern.encode())


def plain(file: InputFile) -> pa.LargeBinaryArray:
    """The documents of a range of a text file."""
    raw = file.read(separator_pattern(file.options.separator))
    return text_column(raw, file, file.span.end - len(raw))


def plain_document(file: InputFile) -> pa.LargeBinaryArray:
    """A file that is one document."""
    raw = file.read()
    return text_column(raw, file, file.span.end - len(raw), is_document=True)


def compressed(file: InputFile) -> Columns:
    """The documents of a compressed text file."""
    return _compressed(file, separator_pattern(file.options.separator))


def compressed_document(file: InputFile) -> Columns:
    """A compressed file that is one document."""
    return _compressed(file, None)


def _compressed(file: InputFile, pattern: re.Pattern[bytes] | None) -> Columns:
    offset = 0
    for raw, source_bytes in file.pieces(pattern):
        text = raw if offset else raw.removeprefix(BYTE_ORDER_MARK)
        offset += len(raw)
        is_document = pattern is None
        yield text_column(text, file, offset - len(text), is_document), source_bytes


def text_column(
    raw: bytes, file: InputFile, offset: int, is_document: bool = False
) -> pa.LargeBinaryArray:
    """The documents of a text that begins at `offset`, or is one. Raises ForgeError, naming a
    byte."""
    separator = None if is_document else file.options.separator
    column = _divided(raw, separator)
    try:
        column.cast(pa.large_string())  # checks UTF-8, 20 times as fast as Python
        return column
    except pa.ArrowInvalid:
        if file.options.encoding_errors == "replace":
            return _divided(raw.decode("utf-8", errors="replace").encode(), separator)
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


def _divided(raw: bytes, separator: str | None) -> pa.LargeBinaryArray:
    r"""The documents of a text, in order; empty ones are left out. separator: None is one document.

    One or more empty lines end a document, whether lines end in LF or CRLF, and line ends at the
    borders of a document are not part of it. A line of spaces is not empty. Inside a document every
    byte stays as it is, CRLF too. Another separator is taken literally.
    """
    if separator is None:
        return without_empty(column_of_one(raw))
    if separator != BLANK_LINES:
        return without_empty(pc.split_pattern(column_of_one(raw), separator).flatten())
    # Not in the middle of the text, but here: leaving out an empty document copies all others.
    raw = raw.strip(b"\r\n")
    documents = pc.split_pattern_regex(column_of_one(raw), EMPTY_LINES).flatten()
    if b"\r" in raw:  # else all line ends at borders are gone
        # Viewed, not cast, for it may be no UTF-8; pyarrow trims only strings.
        trimmed = pc.ascii_trim(documents.view(pa.large_string()), "\r\n")
        documents = trimmed.view(pa.large_binary())
    return without_empty(documents)
