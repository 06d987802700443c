"""Files of JSON: rows as lines, as one array or as objects over several lines."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json

from p2p_llm_forge.data import columns, conversations
from p2p_llm_forge.data.formats import suffix_of
from p2p_llm_forge.data.input_file import (
    BYTE_ORDER_MARK,
    LONGEST_DOCUMENT,
    TO_UTF8,
    Columns,
    InputFile,
)
from p2p_llm_forge.data.parts import ReadOptions, column_of

CHUNK_BYTES = 1 << 20  # of a file that are read at a time
LINE_END = re.compile(b"\n")
HEAD_BYTES = 1 << 16
BRACKETS = re.compile(r'"(?:[^"\\]|\\.)*"|[][{}]', re.DOTALL)  # outside of strings
BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")  # of an array


# --- lines ----------------------------------------------------------------------------------------


def plain_lines(file: InputFile) -> pa.LargeBinaryArray:
    """The documents of a range of a file of JSON lines."""
    raw = file.read(LINE_END)
    column = _parsed(raw, file.options)
    return _line_by_line(raw, file, 1 + _lines_before(file)) if column is None else column


def compressed_lines(file: InputFile) -> Columns:
    """The documents of a compressed file of JSON lines."""
    line = 1
    for raw, source_bytes in file.pieces(LINE_END):
        text = raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
        column = _parsed(text, file.options)
        yield _line_by_line(text, file, line) if column is None else column, source_bytes
        line += raw.count(b"\n")


def _lines_before(file: InputFile) -> int:
    lines, end = 0, file.span.start
    with open(file.path, "rb") as stream:
        while chunk := stream.read(min(end, CHUNK_BYTES)):
            lines += chunk.count(b"\n")
            end -= len(chunk)
    return lines


def _parsed(raw: bytes, options: ReadOptions) -> pa.LargeBinaryArray | None:
    """The text of JSON lines by pyarrow's parser; None where a line must be looked at."""
    if not raw.strip():
        return column_of([])
    text_column = options.text_column
    schema = columns.schema_of(text_column)
    if schema is None or options.train_on:
        return None
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(raw),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(raw) + 1),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        text = columns.text_of_rows(table, text_column)
        if text is None:
            return None
        column = text.cast(pa.large_binary())
        column.cast(pa.large_string())  # the parser does not check that strings are UTF-8
    except pa.ArrowException:
        return None
    # The parser takes `{}{}` for two rows, and a row may go over several lines.
    lines = raw.count(b"\n") + (not raw.endswith(b"\n"))
    is_whole = not column.null_count and len(column) == lines
    return pa.concat_arrays(column.chunks) if is_whole else None


def _line_by_line(raw: bytes, file: InputFile, first_line: int) -> pa.LargeBinaryArray:
    documents = []
    for number, line in enumerate(raw.split(b"\n"), start=first_line):
        if not line.strip():
            continue
        where = f"{file.path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8", errors=file.options.encoding_errors))
        except UnicodeDecodeError as error:
            file.skip(f"{where} is not UTF-8: {error.reason}", TO_UTF8)
        except RecursionError:
            file.skip(f"{where} is nested too deep")
        except ValueError as error:
            file.skip(f"{where} is not JSON: {error}")
        else:
            documents += _text_of_row(row, where, file)
    return column_of(documents)


def _text_of_row(row: Any, where: str, file: InputFile) -> list[bytes]:
    """The document of a row that was JSON, if it has one; lone surrogates, which UTF-8 cannot hold,
    as U+FFFD."""
    if file.options.train_on:
        return conversations.document_in(row, where, file)
    try:
        text = columns.text_in(row, file.options.text_column)
    except columns.NoTextError as error:
        file.skip(where + error.found, error.fix)
        return []
    return [re.sub("[\ud800-\udfff]", "\ufffd", text).encode()]


def first_row(file: InputFile, is_stream: bool) -> dict[str, Any] | None:
    """The first object in a file; None where there is none. is_stream: of values, not lines."""
    with file.decompressed() as (stream, _):
        rows = (row for _, row in _values_of(stream, file)) if is_stream else _lines_of(stream)
        return next((row for row in rows if isinstance(row, dict)), None)
    return None


def _lines_of(stream: Any) -> Iterator[Any]:
    """The values of lines, null for what is not JSON."""
    begun = b""
    while (more := stream.read(CHUNK_BYTES)) and len(begun) < LONGEST_DOCUMENT:
        *lines, begun = (begun + more).split(b"\n")
        for line in lines:
            yield _value_of(line.removeprefix(BYTE_ORDER_MARK).decode(errors="replace").strip())
    yield _value_of(begun.removeprefix(BYTE_ORDER_MARK).decode(errors="replace").strip())


# --- arrays, and values that go over several lines ------------------------------------------------


def is_stream_of_values(file: InputFile) -> bool:
    """Whether a file called .json is an array, or one of JSON holds values over several lines."""
    head = b""
    with file.decompressed() as (stream, _):
        while len(head) < CHUNK_BYTES and b"\n" not in head and (more := stream.read(HEAD_BYTES)):
            head = (head + more).removeprefix(BYTE_ORDER_MARK).lstrip()
    text = head.decode("utf-8", errors="replace")
    if text.startswith("["):
        return suffix_of(file.path) == ".json"
    first_line, _, rest = text.partition("\n")
    if not rest.strip() or _value_of(first_line) is not None:
        return False
    # An object that begins on a line of its own may be longer than this head.
    return first_line.strip() == "{" or _value_of(text) is not None


def _value_of(text: str) -> Any:
    """The value of JSON with which a text begins; None where there is none."""
    try:
        return json.JSONDecoder().raw_decode(text)[0]
    except (ValueError, RecursionError):
        return None


def values(file: InputFile) -> Columns:
    """The rows of a JSON array, or of values one after the other, one at a time."""
    documents, size, read = [], 0, 0
    with file.decompressed() as (stream, raw):
        for number, row in _values_of(stream, file):
            text = _text_of_row(row, f"{file.path}, row {number}", file)
            documents += text
            size += sum(map(len, text))
            if size >= file.options.piece_bytes:
                yield column_of(documents), raw.tell() - read
                documents, size, read = [], 0, raw.tell()
    yield column_of(documents), file.span.end - read


class _Ahead:
    """The text of a stream from a place in it, decoded as its bytes come."""

    def __init__(self, stream: Any, encoding_errors: str) -> None:
        self.text, self.place = "", 0
        self._stream = stream
        self._decoder = codecs.getincrementaldecoder("utf-8-sig")(errors=encoding_errors)

    def read_on(self) -> bool:
        """Read more, and forget what is before the place; False at the end."""
        # Half of a long value is not read again and again: what is read doubles, up to what is
        # just too long.
        left = len(self.text) - self.place
        more = self._stream.read(max(CHUNK_BYTES, min(left, LONGEST_DOCUMENT + 1 - left)))
        self.text = self.text[self.place :] + self._decoder.decode(more, not more)
        self.place = 0
        return bool(more)

    def next_sign(self) -> str:
        """The next character that is no space or comma, which stays; empty at the end."""
        while True:
            self.place = BETWEEN_VALUES.match(self.text, self.place).end()  # type: ignore[union-attr]
            if self.place < len(self.text):
                return self.text[self.place]
            if not self.read_on():
                return ""


def _values_of(stream: Any, file: InputFile) -> Iterator[tuple[int, Any]]:
    """The values that `stream` holds, in an array or not, with their numbers, one by one."""
    ahead, row = _Ahead(stream, file.options.encoding_errors), 0
    try:
        is_array = ahead.next_sign() == "["
        ahead.place += is_array
        while (sign := ahead.next_sign()) and not (is_array and sign == "]"):
            row += 1
            yield from ((row, value) for value in _next_value(ahead, row, file))
        ahead.place += is_array
        if is_array and not sign:
            raise _NotReadError(f"row {row + 1}: the array does not end")
        if is_array and ahead.next_sign():
            file.skip(f"{file.path} continues after the end of its JSON array, after row {row}")
    except _NotReadError as error:
        what = "a whole JSON array" if is_array else "whole JSON"
        file.skip(f"{file.path} is not {what}: {error}")
    except UnicodeDecodeError as error:
        found = f"{file.path} is not UTF-8 ({error.reason}), after row {row}"
        file.skip(found, TO_UTF8)


class _NotReadError(Exception):
    """Neither a value nor any that follows it can be read."""


def _next_value(ahead: _Ahead, row: int, file: InputFile) -> list[Any]:
    """The next value, none where it is left out. Raises _NotReadError."""
    while True:
        try:
            value, end = json.JSONDecoder().raw_decode(ahead.text, ahead.place)
            # A number at the end of what is read may continue.
            if isinstance(value, dict | list) or end < len(ahead.text) or not ahead.read_on():
                ahead.place = end
                return [value]
            continue
        except RecursionError:
            if end := _end_of_nested(ahead.text, ahead.place):
                file.skip(f"{file.path}, row {row} is nested too deep")
                ahead.place = end
                return []
            reason = "it is nested too deep"
        except ValueError as error:
            reason = getattr(error, "msg", str(error))
        if len(ahead.text) - ahead.place > LONGEST_DOCUMENT:
            reason = f"it is longer than {LONGEST_DOCUMENT >> 20} MiB"
        elif ahead.read_on():
            continue
        raise _NotReadError(f"row {row}: {reason}")


def _end_of_nested(text: str, place: int) -> int:
    """Where an object or list ends; 0 where it does not."""
    depth = 0
    for found in BRACKETS.finditer(text, place):
        sign = found[0]
        depth += (sign in "[{") - (sign in "]}")
        if not depth:
            return found.end()
    return 0
