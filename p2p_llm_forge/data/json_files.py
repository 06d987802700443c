"""Files of JSON: rows as lines or as one array; the text of each is under one of its keys."""

from __future__ import annotations

import codecs
import functools
import json
import re
from collections.abc import Callable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.json

from p2p_llm_forge.data.columns import column_of
from p2p_llm_forge.data.compression import decompressed_pieces, open_decompressed
from p2p_llm_forge.data.parts import (
    BYTE_ORDER_MARK,
    TO_UTF8,
    BadRows,
    Columns,
    ReadOptions,
    Span,
    read_span,
)

CHUNK_BYTES = 1 << 20  # of an array that are read at a time
BETWEEN_VALUES = re.compile(r"[ \t\r\n,]*")  # of an array


# --- lines ----------------------------------------------------------------------------------------


def plain_lines(span: Span, options: ReadOptions, bad_rows: BadRows) -> pa.LargeBinaryArray:
    """The documents of a range of a file of JSON lines."""

    def first_line() -> int:
        return 1 + _count_lines(span.path, span.start)

    return _documents_of_lines(read_span(span), span.path, first_line, options, bad_rows)


def _count_lines(path: str, end: int) -> int:
    lines = 0
    with open(path, "rb") as file:
        while end > 0 and (chunk := file.read(min(end, 1 << 20))):
            lines += chunk.count(b"\n")
            end -= len(chunk)
    return lines


def compressed_lines(span: Span, options: ReadOptions, bad_rows: BadRows) -> Columns:
    """The documents of a compressed file of JSON lines."""
    line, pattern = 1, re.compile(b"\n")
    for raw, source_bytes in decompressed_pieces(span, pattern, options.piece_bytes, bad_rows):
        text = raw.removeprefix(BYTE_ORDER_MARK) if line == 1 else raw
        first_line = functools.partial(int, line)
        yield _documents_of_lines(text, span.path, first_line, options, bad_rows), source_bytes
        line += raw.count(b"\n")


def _documents_of_lines(
    raw: bytes, path: str, first_line: Callable[[], int], options: ReadOptions, bad_rows: BadRows
) -> pa.LargeBinaryArray:
    """The text of JSON lines: by pyarrow, and by Python when a line must be named."""
    if not raw.strip():
        return column_of([])
    schema = pa.schema([(options.text_column, pa.large_string())])
    try:
        table = pyarrow.json.read_json(
            pa.BufferReader(raw),
            pyarrow.json.ReadOptions(use_threads=False, block_size=len(raw) + 1),
            pyarrow.json.ParseOptions(explicit_schema=schema, unexpected_field_behavior="ignore"),
        )
        column = table.column(0).cast(pa.large_binary())
        column.cast(pa.large_string())  # the parser does not check that strings are UTF-8
        # The parser takes `{}{}` for two rows, and a row may go over several lines.
        lines = raw.count(b"\n") + (not raw.endswith(b"\n"))
        if not column.null_count and len(column) == lines:
            return pa.concat_arrays(column.chunks or [column_of([])])
    except pa.ArrowException:
        pass
    return _documents_line_by_line(raw, path, first_line(), options, bad_rows)


def _documents_line_by_line(
    raw: bytes, path: str, line_number: int, options: ReadOptions, bad_rows: BadRows
) -> pa.LargeBinaryArray:
    documents = []
    for number, line in enumerate(raw.split(b"\n"), start=line_number):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8", errors=options.encoding_errors))
        except UnicodeDecodeError as error:
            bad_rows.add(f"{where} is not UTF-8: {error.reason}", TO_UTF8)
            continue
        except (ValueError, RecursionError) as error:
            bad_rows.add(f"{where} is not JSON: {error}")
            continue
        text = _text_of_row(row, where, options, bad_rows)
        if text is not None:
            documents.append(text)
    return column_of(documents)


def _text_of_row(row: Any, where: str, options: ReadOptions, bad_rows: BadRows) -> bytes | None:
    """The text of a row that was JSON; lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    name = options.text_column
    if not isinstance(row, dict):
        kind = type(row).__name__
        bad_rows.add(f"{where} holds a {kind} where an object with '{name}' is expected")
    elif name not in row:
        found = ", ".join(map(str, row)) or "nothing"
        fix = "choose another with --text-column"
        bad_rows.add(f"{where} has no text column '{name}': found {found}", fix)
    elif not isinstance(row[name], str):
        bad_rows.add(f"{where}: '{name}' is {type(row[name]).__name__}, expected a string")
    else:
        try:
            return row[name].encode()
        except UnicodeEncodeError:
            return re.sub("[\ud800-\udfff]", "\ufffd", row[name]).encode()
    return None


# --- arrays ---------------------------------------------------------------------------------------


def values(span: Span, options: ReadOptions, bad_rows: BadRows) -> Columns:
    """The rows of a JSON array, one value at a time; a compressed .json may hold lines instead."""
    head = b""
    with open_decompressed(span, bad_rows) as (stream, _):
        head = stream.read(4096).removeprefix(BYTE_ORDER_MARK).lstrip()[:1]
    if not head:
        return
    if head != b"[":
        yield from compressed_lines(span, options, bad_rows)
        return
    with open_decompressed(span, bad_rows) as (stream, file):
        documents, size, read = [], 0, 0
        rows = _values_of_array(stream, span.path, options, bad_rows)
        for number, row in enumerate(rows, start=1):
            text = _text_of_row(row, f"{span.path}, row {number}", options, bad_rows)
            if text is None:
                continue
            documents.append(text)
            size += len(text)
            if size >= options.piece_bytes:
                yield column_of(documents), file.tell() - read
                documents, size, read = [], 0, file.tell()
        yield column_of(documents), span.end - read


def _values_of_array(
    stream: Any, path: str, options: ReadOptions, bad_rows: BadRows
) -> Iterator[Any]:
    """The values of a JSON array that `stream` holds, decoded one by one as its bytes come."""
    decode = codecs.getincrementaldecoder("utf-8-sig")(errors=options.encoding_errors).decode
    decode_value, rows = json.JSONDecoder().raw_decode, 0
    waiting, place = "", 0
    try:
        while "[" not in waiting:
            waiting += decode(stream.read(CHUNK_BYTES))
        place = waiting.index("[") + 1
        while not waiting.startswith("]", place := _after_space(waiting, place)):
            reason = "the array does not end"
            try:
                value, end = decode_value(waiting, place)
                is_whole = end < len(waiting)  # else a number may continue
            except ValueError as error:
                is_whole, reason = False, getattr(error, "msg", str(error))
            if is_whole:
                yield value
                rows, place = rows + 1, end
                continue
            # Half of a long value is not read again and again: what is read doubles.
            more = stream.read(max(CHUNK_BYTES, len(waiting) - place))
            if not more:
                bad_rows.add(f"{path} is not a whole JSON array: row {rows + 1}: {reason}")
                return
            waiting, place = waiting[place:] + decode(more), 0
        if waiting[place + 1 :].strip() or stream.read(CHUNK_BYTES).strip():
            bad_rows.add(f"{path} continues after the end of its JSON array, after row {rows}")
    except UnicodeDecodeError as error:
        bad_rows.add(f"{path} is not UTF-8 ({error.reason}), after row {rows}", TO_UTF8)


def _after_space(text: str, place: int) -> int:
    return BETWEEN_VALUES.match(text, place).end()  # type: ignore[union-attr]
