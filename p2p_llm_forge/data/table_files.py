"""Tables, whose text is in one of their columns: CSV, parquet, datasets of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv
import pyarrow.parquet as pq

from p2p_llm_forge.data.input_file import TO_UTF8, Columns, InputFile, first_line
from p2p_llm_forge.data.parts import column_of, compression_of, is_utf8, values_and_offsets
from p2p_llm_forge.errors import ForgeError

# --- columns of any table -------------------------------------------------------------------------


def _require_column(schema: Any, file: InputFile) -> None:
    name = file.options.text_column
    if name not in schema.names:
        raise ForgeError(
            f"{file.path} has no text column '{name}': found {', '.join(schema.names)}",
            "choose one with --text-column",
        )


def _texts(
    columns: Iterable[pa.Array], file: InputFile, row: int = 1
) -> Iterator[pa.LargeBinaryArray]:
    """Columns of strings as UTF-8. row: the number of the first. Nulls are bad rows."""
    name = file.options.text_column
    for column in columns:
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise ForgeError(
                f"{file.path}: column '{name}' holds {column.type}, expected strings",
                "choose another with --text-column",
            )
        if column.null_count:
            place = row + column.is_null().index(True).as_py()
            found = f"{file.path}, row {place}: '{name}' is null, expected a string"
            file.skip(found, rows=column.null_count)
        row += len(column)
        yield pc.drop_null(column).cast(pa.large_string()).cast(pa.large_binary())


def _joined_by_size(
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


def csv(file: InputFile) -> Columns:
    """The documents of a CSV file."""

    def skip(row: Any) -> str:
        if not file.options.skip_bad_rows:
            return "error"
        file.skipped += 1
        return "skip"

    name, piece_bytes = file.options.text_column, file.options.piece_bytes
    with file.decompressed() as (stream, raw):
        try:
            rows = pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(use_threads=False, block_size=piece_bytes),
                pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
                # One row that is not UTF-8 would end the parser's work: that is checked here.
                pyarrow.csv.ConvertOptions(
                    column_types={name: pa.large_binary()}, include_columns=[name]
                ),
            )
            read = 0
            for column in _joined_by_size(_utf8_of_batches(rows, file), piece_bytes):
                yield column, raw.tell() - read
                read = raw.tell()
        except (pa.ArrowException, KeyError) as error:
            _refuse_csv(file, error)


def _utf8_of_batches(batches: Iterable[Any], file: InputFile) -> Iterator[pa.LargeBinaryArray]:
    """The only column of every batch; rows that are not UTF-8 are bad, or get U+FFFD."""
    first_row = 2  # after the header
    for batch in batches:
        column = batch.column(0)
        try:
            column.cast(pa.large_string())  # checks that it is UTF-8
        except pa.ArrowInvalid:
            documents = []
            for row, document in enumerate(column.to_pylist(), start=first_row):
                if file.options.encoding_errors == "replace":
                    document = document.decode(errors="replace").encode()
                if is_utf8(document):
                    documents.append(document)
                else:
                    found = f"{file.path}, row {row} (the header is row 1) is not UTF-8"
                    file.skip(found, TO_UTF8)
            column = column_of(documents)
        yield column
        first_row += len(batch)


def _refuse_csv(file: InputFile, error: Exception) -> None:
    reason = first_line(error)
    if reason == "Empty CSV file":  # seen so late because it is compressed
        return
    if "straddling" in reason:
        size = f"{file.options.piece_bytes >> 20} MiB"
        found = f"{file.path}: a row is longer than {size}, which is not read from CSV"
        raise ForgeError(found, "write such text as .jsonl or .parquet") from error
    if isinstance(error, KeyError) or "does not exist" in reason:
        raise ForgeError(
            f"{file.path} has no text column '{file.options.text_column}'",
            "choose one with --text-column",
        ) from error
    file.skip(f"{file.path}: {reason}")


# --- parquet --------------------------------------------------------------------------------------


def parquet(file: InputFile) -> Columns:
    """The documents of row groups of a parquet file; of all of them, if it is compressed."""
    try:
        with file.seekable() as stream:
            table = pq.ParquetFile(stream, buffer_size=1 << 20)
            _require_column(table.schema_arrow, file)
            groups = range(table.num_row_groups)
            if not compression_of(file.path):
                groups = range(file.span.start, file.span.end)
            for group in groups:
                yield from _rows_of_group(table, group, file)
    except (pa.ArrowException, OSError) as error:
        file.skip_damaged(error)


def _rows_of_group(table: Any, group: int, file: InputFile) -> Columns:
    facts = table.metadata.row_group(group)
    row_bytes = max(1, facts.total_byte_size // max(1, facts.num_rows))
    batches = table.iter_batches(
        batch_size=max(1, min(1 << 16, file.options.piece_bytes // row_bytes)),
        row_groups=[group],
        columns=[file.options.text_column],
        use_threads=False,
    )
    rows_left, bytes_left = facts.num_rows, file.span.bytes
    first_row = 1 + sum(table.metadata.row_group(other).num_rows for other in range(group))

    def columns() -> Iterator[pa.Array]:
        nonlocal rows_left
        for batch in batches:
            rows_left -= len(batch)
            yield batch.column(0)

    documents = _texts(columns(), file, first_row)
    try:
        for column in _joined_by_size(documents, file.options.piece_bytes):
            progress = min(bytes_left, len(values_and_offsets(column)[0]))
            bytes_left -= progress
            yield column, progress
    except (pa.ArrowException, OSError) as error:
        file.skip_damaged(error, rows_left)


# --- datasets of Hugging Face ---------------------------------------------------------------------


def saved(file: InputFile) -> Columns:
    """Rows of a folder that `save_to_disk` of datasets wrote."""
    import datasets

    try:
        rows = datasets.load_from_disk(file.path)
    except Exception as error:  # what datasets raises for damaged folders is not one class
        raise ForgeError(
            f"{file.path} cannot be read: {first_line(error)}",
            "save the dataset again with save_to_disk, or give another folder",
        ) from error
    if isinstance(rows, datasets.DatasetDict):
        split = file.options.dataset_split
        if split not in rows:
            raise ForgeError(
                f"{file.path} has no split '{split}': found {', '.join(rows)}",
                "choose one with --dataset-split",
            )
        rows = rows[split]
    yield from _rows_of_dataset(rows, file)


def streamed(file: InputFile) -> Columns:
    """Rows of a dataset of the Hub, streamed."""
    import datasets

    name, split = file.options.dataset_config, file.options.dataset_split
    try:
        rows = datasets.load_dataset(file.path, name, split=split, streaming=True)
    except Exception as error:  # the Hub, the network and the dataset fail in their own ways
        raise ForgeError(
            f"--dataset-path {file.path}: no such file, and no dataset of that name could be read "
            f"from the Hub ({first_line(error)})",
            "give a file, a folder or a glob that exists, or what the Hub has (--dataset-config, "
            "--dataset-split) and this machine can reach",
        ) from error
    yield from _rows_of_dataset(rows, file)


def _rows_of_dataset(rows: Any, file: InputFile) -> Columns:
    def columns() -> Iterator[pa.Array]:
        for table in rows.with_format("arrow").iter(batch_size=1000):
            _require_column(table.schema, file)
            yield from table.column(file.options.text_column).chunks

    for column in _joined_by_size(_texts(columns(), file), file.options.piece_bytes):
        yield column, 0
