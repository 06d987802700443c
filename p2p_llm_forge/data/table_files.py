"""Tables, whose text is in some of their columns: parquet, datasets of Hugging Face."""

from __future__ import annotations

import contextlib
import os
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from p2p_llm_forge.data import columns, conversations
from p2p_llm_forge.data.formats import compression_of
from p2p_llm_forge.data.input_file import (
    LONGEST_DOCUMENT,
    TO_UTF8,
    Columns,
    InputFile,
    first_line,
)
from p2p_llm_forge.data.parts import column_of, is_utf8, values_and_offsets
from p2p_llm_forge.errors import ForgeError

MOST_ROWS = 1 << 14  # of a parquet file that are decoded at once
BYTES_DECODED_AT_ONCE = 32 << 20  # of their text, or little more

# --- columns of any table -------------------------------------------------------------------------


def _text_of(batch: Any, file: InputFile) -> Any:
    """The text of the rows of a batch or table, strings or null. Raises ForgeError."""
    asked = file.options.text_column
    texts = []
    for name in columns.names_of(asked, batch.schema.names):
        path = columns.path_in(batch.schema, name)
        if path is None:
            found = columns.found_names(columns.leaves(batch.schema))
            fix = "choose one with --text-column"
            if conversations.form_of(batch.schema.names):
                fix += ", or read the conversations with --train-on assistant"
            raise ForgeError(f"{file.path} has no text column '{name}': found {found}", fix)
        column = columns.inside(batch, path)
        kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
        if kind not in (pa.string(), pa.large_string(), pa.string_view(), pa.null()):
            raise ForgeError(
                f"{file.path}: column '{name}' holds {column.type}, expected strings",
                "choose another with --text-column",
            )
        texts.append(column.cast(pa.large_binary()))  # what is no UTF-8 is seen later
    return columns.joined(texts)


def _texts(batches: Iterable[Any], file: InputFile, row: int = 1) -> Iterator[pa.LargeBinaryArray]:
    """The text of batches, or tables, as UTF-8. row: the number of the first. Nulls are bad."""
    if file.options.train_on:
        yield from _conversations(batches, file, row)
        return
    for batch in batches:
        column = _text_of(batch, file)
        for chunk in column.chunks if isinstance(column, pa.ChunkedArray) else [column]:
            if chunk.null_count:
                place = row + chunk.is_null().index(True).as_py()
                found = f"{file.path}, row {place}: '{file.options.text_column}' is null"
                file.skip(f"{found}, expected a string", rows=chunk.null_count)
            yield utf8_of(chunk, file, row)
            row += len(chunk)


def _conversations(
    batches: Iterable[Any], file: InputFile, row: int
) -> Iterator[pa.LargeBinaryArray]:
    """The conversations of batches, or tables, as documents. row: the number of the first."""
    names = set(conversations.column_names(file.options))
    for batch in batches:
        documents = []
        rows = batch.select([name for name in batch.schema.names if name in names]).to_pylist()
        for number, values in enumerate(rows, start=row):
            documents += conversations.document_in(values, f"{file.path}, row {number}", file)
        row += len(batch)
        yield column_of(documents)


def _asked(file: InputFile) -> list[str]:
    """The names of all columns that are read."""
    if file.options.train_on:
        return conversations.column_names(file.options)
    return columns.all_names(file.options.text_column)


def utf8_of(
    column: pa.LargeBinaryArray, file: InputFile, row: int, note: str = ""
) -> pa.LargeBinaryArray:
    """The rows that hold text, as UTF-8: one that is not is bad, or gets U+FFFD; so is one that is
    too long. row: the number of the first; note: on these numbers, for messages."""
    is_long = pc.fill_null(pc.greater(pc.binary_length(column), LONGEST_DOCUMENT), False)
    if pc.any(is_long).as_py():
        place, size = row + is_long.index(True).as_py(), LONGEST_DOCUMENT >> 20
        found = f"{file.path}, row {place}{note} has more than {size} MiB of text"
        file.skip(found, "divide it among several rows", pc.sum(is_long).as_py())
        column = pc.if_else(is_long, None, column)
    try:
        column.cast(pa.large_string())  # checks UTF-8, 20 times as fast as Python
        return pc.drop_null(column)
    except pa.ArrowInvalid:
        pass
    documents = []
    for number, value in enumerate(column, start=row):
        document = value.as_py()
        if document is not None and file.options.encoding_errors == "replace":
            document = document.decode(errors="replace").encode()
        if document is not None and is_utf8(document):
            documents.append(document)
        elif document is not None:
            file.skip(f"{file.path}, row {number}{note} is not UTF-8", TO_UTF8)
    return column_of(documents)


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
            if not file.options.train_on:
                _text_of(table.schema_arrow.empty_table(), file)  # raises for what is not there
            groups = range(table.num_row_groups)
            if not compression_of(file.path):
                groups = range(file.span.start, file.span.end)
            for group in groups:
                rows_at_a_time = _rows_at_a_time(stream, table.metadata, group, file)
                if rows_at_a_time:
                    yield from _rows_of_group(table, group, file, rows_at_a_time)
    except (pa.ArrowException, OSError) as error:
        file.skip_damaged(error)


def _rows_of_group(table: Any, group: int, file: InputFile, rows_at_a_time: int) -> Columns:
    facts = table.metadata.row_group(group)
    batches = table.iter_batches(
        batch_size=rows_at_a_time,
        row_groups=[group],
        # Of nested ones too these names are enough, and of two that one may mean both are read.
        columns=_asked(file),
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


def _rows_at_a_time(stream: Any, metadata: Any, group: int, file: InputFile) -> int:
    """How many rows of a group are decoded at once, for a small file may hold a very long text; 0
    for none, where they are too long."""
    facts = metadata.row_group(group)
    names = _asked(file)
    chunks = [facts.column(number) for number in range(facts.num_columns)]
    chunks = [chunk for chunk in chunks if _is_asked(chunk.path_in_schema, names)]
    rows = max(1, facts.num_rows)
    row_bytes = max(1, sum(chunk.total_uncompressed_size for chunk in chunks) // rows)
    if row_bytes > LONGEST_DOCUMENT:
        size = f"{row_bytes >> 20} MiB a row, more than {LONGEST_DOCUMENT >> 20} MiB"
        found = f"{file.path}: row group {group + 1} has {size}"
        file.skip(found, "divide its text among several rows", facts.num_rows)
        return 0
    # Not inside lists, as of messages: there a text is not asked for by its path.
    flat = [chunk for chunk in chunks if not file.options.train_on]
    repeated = [chunk.path_in_schema for chunk in flat if chunk.has_dictionary_page]
    row_bytes += sum(_longest_repeated(stream, group, path) for path in repeated)
    return max(1, min(MOST_ROWS, BYTES_DECODED_AT_ONCE // row_bytes))


def _is_asked(path: str, names: list[str]) -> bool:
    return any(path == name or path.startswith(f"{name}.") for name in names)


def _longest_repeated(stream: Any, group: int, path: str) -> int:
    """The bytes of the longest text that is written once, for any number of rows."""
    table = pq.ParquetFile(stream, read_dictionary=[path], buffer_size=1 << 20)
    batches = table.iter_batches(1, row_groups=[group], columns=[path], use_threads=False)
    column = columns.inside(next(iter(batches)), tuple(path.split(".")))
    if not pa.types.is_dictionary(column.type):
        return 0
    return pc.max(pc.binary_length(column.dictionary)).as_py() or 0


# --- datasets of Hugging Face ---------------------------------------------------------------------


def saved(file: InputFile) -> Columns:
    """Rows of a folder that `save_to_disk` of datasets wrote."""
    yield from _rows_of_dataset(open_saved(file), file)


def open_saved(file: InputFile) -> Any:
    """The split of a folder that `save_to_disk` of datasets wrote. Raises ForgeError."""
    import datasets

    try:
        with _named_in_utf8(file.path) as path:
            rows = datasets.load_from_disk(path)  # maps its files, whatever they are called then
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
    return rows


@contextlib.contextmanager
def _named_in_utf8(path: str) -> Iterator[str]:
    """A folder by a name that pyarrow takes: through a link if its own is not UTF-8."""
    if is_utf8(os.fsencode(path)):
        yield path
        return
    with tempfile.TemporaryDirectory() as folder:
        link = Path(folder, "dataset")
        link.symlink_to(Path(path).absolute(), target_is_directory=True)
        yield str(link)


def streamed(file: InputFile) -> Columns:
    """Rows of a dataset of the Hub, streamed."""
    yield from _rows_of_dataset(open_streamed(file), file)


def open_streamed(file: InputFile) -> Any:
    """A dataset of the Hub, to be streamed. Raises ForgeError."""
    import datasets

    name, split = file.options.dataset_config, file.options.dataset_split
    try:
        return datasets.load_dataset(file.path, name, split=split, streaming=True)
    except Exception as error:  # the Hub, the network and the dataset fail in their own ways
        raise ForgeError(
            f"--dataset-path {file.path}: no such file, and no dataset of that name could be read "
            f"from the Hub ({first_line(error)})",
            "give a file, a folder or a glob that exists, or what the Hub has (--dataset-config, "
            "--dataset-split) and this machine can reach",
        ) from error


def _rows_of_dataset(rows: Any, file: InputFile) -> Columns:
    tables = rows.with_format("arrow").iter(batch_size=1000)
    for column in joined_by_size(_texts(tables, file), file.options.piece_bytes):
        yield column, 0
