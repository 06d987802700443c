"""Files of JSON: rows as lines or as one array; the text of each is under one of its keys."""

from __future__ import annotations

import codecs
import json
import re
from collections.abc import Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json

from p2p_llm_forge.data import columns
from p2p_llm_forge.data.input_file import BYTE_ORDER_MARK, TO_UTF8, Columns, InputFile
from p2p_llm_forge.data.parts import column_of

CHUNK_BYTES = 1 << 20  # of a file that are read at a time
BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")  # of an array


# --- lines ----------------------------------------------------------------------------------------


def plain_lines(file: InputFile) -> pa.LargeBinaryArray:
    """The documents of a range of a file of JSON lines."""
    raw = file.read()
    column = _parsed(raw, file.options.text_column)
    return _line_by_line(raw, file, 1 + _lines_before(file)) if column is None else column


def compressed_lines(file: InputFile) -> Columns:
    """The documents of a compressed file of JSON lines."""
    line = 1
    for raw, source_bytes in file.pieces(re.compile(b"\n")):
        text = raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
        column = _parsed(text, file.options.text_column)
        yield _line_by_line(text, file, line) if column is None else column, source_bytes
        line += raw.count(b"\n")


def _lines_before(file: InputFile) -> int:
    lines, end = 0, file.span.start
    with open(file.path, "rb") as stream:
        while chunk := stream.read(min(end, CHUNK_BYTES)):
            lines += chunk.count(b"\n")
            end -= len(chunk)
    return lines


def _parsed(raw: bytes, text_column: str) -> pa.LargeBinaryArray | None:
    """The text of JSON lines by pyarrow's parser; None where a line must be looked at."""
    if not raw.strip():
        return column_of([])
    schema = columns.schema_of(text_column)
    if schema is None:
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
        except (ValueError, RecursionError) as error:
            file.skip(f"{where} is not JSON: {error}")
        else:
            documents += _text_of_row(row, where, file)
    return column_of(documents)


def _text_of_row(row: Any, where: str, file: InputFile) -> list[bytes]:
    """The text of a row that was JSON, if it has one; lone surrogates, which UTF-8 cannot hold, as
    U+FFFD."""
    try:
        text = columns.text_in(row, file.options.text_column)
    except columns.NoTextError as error:
        file.skip(where + error.found, error.fix)
        return []
    return [re.sub("[\ud800-\udfff]", "\ufffd", text).encode()]


# --- arrays ---------------------------------------------------------------------------------------


def values(file: InputFile) -> Columns:
    """The rows of a JSON array, one value at a time."""
    with file.decompressed() as (stream, raw):
        documents, size, read = [], 0, 0
        for number, row in enumerate(_values_of_array(stream, file), start=1):
            text = _text_of_row(row, f"{file.path}, row {number}", file)
            documents += text
            size += sum(map(len, text))
            if size >= file.options.piece_bytes:
                yield column_of(documents), raw.tell() - read
                documents, size, read = [], 0, raw.tell()
        yield column_of(documents), file.span.end - read


def _values_of_array(stream: Any, file: InputFile) -> Iterator[Any]:
    """The values of a JSON array that `stream` holds, decoded one by one as its bytes come."""
    decode = codecs.getincrementaldecoder("utf-8-sig")(errors=file.options.encoding_errors).decode
    decode_value, rows = json.JSONDecoder().raw_decode, 0
    try:
        waiting = decode(stream.read(CHUNK_BYTES))
        place = waiting.find("[") + 1
        while not waiting.startswith("]", place := _after_space(waiting, place)):
            reason = "the array does not end"
            try:
                value, end = decode_value(waiting, place)
                is_whole = end < len(waiting)  # else a number may continue
            except (ValueError, RecursionError) as error:
                is_whole, reason = False, getattr(error, "msg", str(error))
            if is_whole:
                yield value
                rows, place = rows + 1, end
                continue
            # Half of a long value is not read again and again: what is read doubles.
            more = stream.read(max(CHUNK_BYTES, len(waiting) - place))
            if not more:
                file.skip(f"{file.path} is not a whole JSON array: row {rows + 1}: {reason}")
                return
            waiting, place = waiting[place:] + decode(more), 0
        if waiting[place + 1 :].strip() or stream.read(CHUNK_BYTES).strip():
            file.skip(f"{file.path} continues after the end of its JSON array, after row {rows}")
    except UnicodeDecodeError as error:
        file.skip(f"{file.path} is not UTF-8 ({error.reason}), after row {rows}", TO_UTF8)


def _after_space(text: str, place: int) -> int:
    return BETWEEN_VALUES.match(text, place).end()  # type: ignore[union-attr]
