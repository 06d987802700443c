"""Tables, whose text is in some of their columns: parquet, datasets of Hugging Face."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p2p_llm_forge.data import columns
from p2p_llm_forge.data.formats import compression_of
from p2p_llm_forge.data.input_file import Columns, InputFile, first_line
from p2p_llm_forge.data.parts import values_and_offsets
from p2p_llm_forge.errors import ForgeError

# --- columns of any table -------------------------------------------------------------------------


def _text_of(batch: Any, file: InputFile) -> Any:
    """The text of the rows of a batch or table, strings or null. Raises ForgeError."""
    asked = file.options.text_column
    texts = []
    for name in columns.names_of(asked, batch.schema.names):
        path = columns.path_in(batch.schema, name)
        if path is None:
            found = columns.found_names(columns.leaves(batch.schema))
            raise ForgeError(
                f"{file.path} has no text column '{name}': found {found}",
                "choose one with --text-column",
            )
        column = columns.inside(batch, path)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise ForgeError(
                f"{file.path}: column '{name}' holds {column.type}, expected strings",
                "choose another with --text-column",
            )
        texts.append(column.cast(pa.large_string()))
    return columns.joined(texts)


def _texts(batches: Iterable[Any], file: InputFile, row: int = 1) -> Iterator[pa.LargeBinaryArray]:
    """The text of batches, or tables, as UTF-8. row: the number of the first. Nulls are bad."""
    for batch in batches:
        column = _text_of(batch, file)
        if column.null_count:
            place = row + column.is_null().index(True).as_py()
            found = f"{file.path}, row {place}: '{file.options.text_column}' is null"
            file.skip(f"{found}, expected a string", rows=column.null_count)
        row += len(column)
        column = pc.drop_null(column).cast(pa.large_binary())
        yield from column.chunks if isinstance(column, pa.ChunkedArray) else [column]


def joined_by_size(
    texts: Iterable[pa.LargeBinaryArray], piece_bytes: int
) -> Iterator[pa.LargeBinaryArray]:
    """Small columns joined to such of `piece_bytes` of text, or little more."""
    waiting: list[pa.LargeBinaryArray] = []
    size, damage = 0, None
    try:
        for column in texts:
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


# --- parquet --------------------------------------------------------------------------------------


def parquet(file: InputFile) -> Columns:
    """The documents of row groups of a parquet file; of all of them, if it is compressed."""
    try:
        with file.seekable() as stream:
            table = pq.ParquetFile(stream, buffer_size=1 << 20)
            _text_of(table.schema_arrow.empty_table(), file)  # raises for what is not there
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
        # Of nested ones too these names are enough, and of two that one may mean both are read.
        columns=columns.all_names(file.options.text_column),
        use_threads=False,
    )
    rows_left, bytes_left = facts.num_rows, file.span.bytes
    first_row = 1 + sum(table.metadata.row_group(other).num_rows for other in range(group))

    def counted() -> Iterator[pa.RecordBatch]:
        nonlocal rows_left
        for batch in batches:
            rows_left -= len(batch)
            yield batch

    documents = _texts(counted(), file, first_row)
    try:
        for column in joined_by_size(documents, file.options.piece_bytes):
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
    tables = rows.with_format("arrow").iter(batch_size=1000)
    for column in joined_by_size(_texts(tables, file), file.options.piece_bytes):
        yield column, 0
