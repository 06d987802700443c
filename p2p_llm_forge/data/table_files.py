"""Tables: CSV and parquet, whose text is in one of their columns."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from p2p_llm_forge.data.columns import column_of, is_utf8, values_and_offsets
from p2p_llm_forge.data.compression import open_decompressed, open_seekable
from p2p_llm_forge.data.parts import (
    TO_UTF8,
    BadRows,
    Columns,
    ReadOptions,
    Span,
    compression_of,
    first_line,
)
from p2p_llm_forge.errors import ForgeError

# --- columns of any table -------------------------------------------------------------------------


def require_column(schema: Any, name: str, options: ReadOptions) -> None:
    """Raise ForgeError unless a table has the column of the text."""
    if options.text_column not in schema.names:
        raise ForgeError(
            f"{name} has no text column '{options.text_column}': found {', '.join(schema.names)}",
            "choose one with --text-column",
        )


def texts(
    columns: Iterable[pa.Array], name: str, options: ReadOptions, bad_rows: BadRows, row: int = 1
) -> Iterator[pa.LargeBinaryArray]:
    """Columns of strings as UTF-8. name, row: of the file and the first row, for errors."""
    for column in columns:
        yield _as_text(column, name, row, options, bad_rows)
        row += len(column)


def _as_text(
    column: pa.Array, path: str, first_row: int, options: ReadOptions, bad_rows: BadRows
) -> pa.LargeBinaryArray:
    """A column of strings as UTF-8. Nulls are bad rows; another type is refused for the file."""
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        if not pa.types.is_null(kind):
            raise ForgeError(
                f"{path}: column '{options.text_column}' holds {column.type}, expected strings",
                "choose another with --text-column",
            )
        column = column.cast(pa.large_string())
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        found = f"{path}, row {row}: '{options.text_column}' is null, expected a string"
        bad_rows.add(found, rows=column.null_count)
        column = pc.drop_null(column)
    return column.cast(pa.large_string()).cast(pa.large_binary())


def joined_by_size(
    columns: Iterable[pa.LargeBinaryArray], piece_bytes: int
) -> Iterator[pa.LargeBinaryArray]:
    """Small columns joined to such of `piece_bytes` of text, or little more."""
    waiting: list[pa.LargeBinaryArray] = []
    size, damage = 0, None
    try:
        for column in columns:
            waiting.append(column)
            size += len(values_and_offsets(column)[0])
            if size >= piece_bytes:
                yield pa.concat_arrays(waiting)
                waiting, size = [], 0
    except (pa.ArrowException, OSError) as error:
        damage = error  # what was read before it is not lost
    if waiting:
        yield pa.concat_arrays(waiting)
    if damage:
        raise damage


# --- CSV ------------------------------------------------------------------------------------------


def csv(span: Span, options: ReadOptions, bad_rows: BadRows) -> Columns:
    """The documents of a CSV file."""

    def skip(row: Any) -> str:
        if not options.skip_bad_rows:
            return "error"
        bad_rows.count += 1
        return "skip"

    name = options.text_column
    with open_decompressed(span, bad_rows) as (stream, file):
        try:
            rows = pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(use_threads=False, block_size=options.piece_bytes),
                pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
                # One row that is not UTF-8 would end the parser's work: that is checked here.
                pyarrow.csv.ConvertOptions(
                    column_types={name: pa.large_binary()}, include_columns=[name]
                ),
            )
            read, documents = 0, _utf8_of_batches(rows, span.path, options, bad_rows)
            for column in joined_by_size(documents, options.piece_bytes):
                yield column, file.tell() - read
                read = file.tell()
        except (pa.ArrowException, KeyError) as error:
            _refuse_csv(span.path, error, options, bad_rows)


def _utf8_of_batches(
    batches: Iterable[Any], path: str, options: ReadOptions, bad_rows: BadRows
) -> Iterator[pa.LargeBinaryArray]:
    """The only column of every batch; rows that are not UTF-8 are bad, or get U+FFFD."""
    first_row = 2  # after the header
    for batch in batches:
        column = batch.column(0)
        try:
            column.cast(pa.large_string())  # checks that it is UTF-8
        except pa.ArrowInvalid:
            documents = []
            for row, document in enumerate(column.to_pylist(), start=first_row):
                if options.encoding_errors == "replace":
                    document = document.decode(errors="replace").encode()
                if is_utf8(document):
                    documents.append(document)
                else:
                    found = f"{path}, row {row} (the header is row 1) is not UTF-8"
                    bad_rows.add(found, TO_UTF8)
            column = column_of(documents)
        yield column
        first_row += len(batch)


def _refuse_csv(path: str, error: Exception, options: ReadOptions, bad_rows: BadRows) -> None:
    reason = first_line(error)
    if reason == "Empty CSV file":  # seen so late because it is compressed
        return
    if "straddling" in reason:
        raise ForgeError(
            f"{path}: a row is longer than {options.piece_bytes >> 20} MiB, which is not read from"
            " CSV",
            "write such text as .jsonl or .parquet",
        ) from error
    if isinstance(error, KeyError) or "does not exist" in reason:
        raise ForgeError(
            f"{path} has no text column '{options.text_column}'", "choose one with --text-column"
        ) from error
    if isinstance(error, (pa.ArrowInvalid, OSError)):
        bad_rows.add(f"{path}: {reason}")


# --- parquet --------------------------------------------------------------------------------------


def parquet(span: Span, options: ReadOptions, bad_rows: BadRows) -> Columns:
    """The documents of row groups of a parquet file; of all of them, if it is compressed."""
    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(open_seekable(span, bad_rows))
            table = pq.ParquetFile(file, buffer_size=1 << 20)
            require_column(table.schema_arrow, span.path, options)
            groups = range(table.num_row_groups)
            if not compression_of(span.path):
                groups = range(span.start, span.end)
            for group in groups:
                yield from _rows_of_group(table, group, span, options, bad_rows)
        except (pa.ArrowException, OSError) as error:
            bad_rows.add_damaged(span.path, error)


def _rows_of_group(
    table: Any, group: int, span: Span, options: ReadOptions, bad_rows: BadRows
) -> Columns:
    facts = table.metadata.row_group(group)
    row_bytes = max(1, facts.total_byte_size // max(1, facts.num_rows))
    batches = table.iter_batches(
        batch_size=max(1, min(1 << 16, options.piece_bytes // row_bytes)),
        row_groups=[group],
        columns=[options.text_column],
        use_threads=False,
    )
    rows_left, bytes_left = facts.num_rows, span.bytes
    first_row = 1 + sum(table.metadata.row_group(other).num_rows for other in range(group))

    def columns() -> Iterator[pa.Array]:
        nonlocal rows_left
        for batch in batches:
            rows_left -= len(batch)
            yield batch.column(0)

    documents = texts(columns(), span.path, options, bad_rows, first_row)
    try:
        for column in joined_by_size(documents, options.piece_bytes):
            progress = min(bytes_left, len(values_and_offsets(column)[0]))
            bytes_left -= progress
            yield column, progress
    except (pa.ArrowException, OSError) as error:
        bad_rows.add_damaged(span.path, error, rows_left)
