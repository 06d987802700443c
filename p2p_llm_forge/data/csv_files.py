"""CSV as RFC 4180 has it, quotes and lines inside fields, whatever stands between the fields."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

import pyarrow as pa
import pyarrow.csv

from p2p_llm_forge.data import columns
from p2p_llm_forge.data.formats import suffix_of
from p2p_llm_forge.data.input_file import LONGEST_DOCUMENT, Columns, InputFile, first_line
from p2p_llm_forge.data.table_files import joined_by_size, utf8_of
from p2p_llm_forge.errors import ForgeError

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
ROWS_BYTES = 1 << 18  # of a file that are divided into rows at once
HEAD_BYTES = 1 << 18  # of a file, in which its first row ends


def rows(file: InputFile) -> Columns:
    """The documents of a CSV file."""

    def skip(row: Any) -> str:
        if not file.options.skip_bad_rows:
            return "error"
        file.skipped += 1
        return "skip"

    head = _head(file)
    if not head:
        return
    delimiter = delimiter_of(head, file)
    names = _names(_header(head, delimiter), delimiter, file)
    piece_bytes = file.options.piece_bytes
    with file.decompressed() as (stream, raw):
        whole_rows = WholeRows(stream)
        try:
            batches = pyarrow.csv.open_csv(
                io.BufferedReader(whole_rows, ROWS_BYTES),
                pyarrow.csv.ReadOptions(use_threads=False, block_size=piece_bytes),
                pyarrow.csv.ParseOptions(
                    delimiter=delimiter, newlines_in_values=True, invalid_row_handler=skip
                ),
                # One row that is not UTF-8 would end the parser's work: that is checked here.
                pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.large_binary()), include_columns=names
                ),
            )
            read = 0
            for column in joined_by_size(_utf8_of(batches, file), piece_bytes):
                yield column, raw.tell() - read
                read = raw.tell()
        except (pa.ArrowException, KeyError) as error:
            _refuse(file, error, delimiter)
        if whole_rows.damage:
            raise whole_rows.damage


class WholeRows(io.RawIOBase):
    """A stream of CSV that ends after the last row before damage, which is kept for later."""

    def __init__(self, stream: Any) -> None:
        self._stream = stream
        self._rows = memoryview(b"")
        self._begun = b""  # a row
        self.damage: OSError | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not self._rows and not self.damage:
            try:
                more = self._stream.read(ROWS_BYTES)
            except OSError as error:
                self.damage = error
                break
            text = self._begun + more
            end = _end_of_rows(text) if more and len(text) < LONGEST_DOCUMENT else len(text)
            self._rows, self._begun = memoryview(text)[:end], text[end:]
            if not more:
                break
        taken = self._rows[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rows = self._rows[len(taken) :]
        return len(taken)


def _end_of_rows(text: bytes) -> int:
    """The byte after the last line end that is not inside quotes."""
    quotes, end = text.count(b'"'), len(text)
    while (place := text.rfind(b"\n", 0, end)) >= 0:
        quotes -= text.count(b'"', place, end)
        if quotes % 2 == 0:
            return place + 1
        end = place
    return 0


# --- the header -----------------------------------------------------------------------------------


def _head(file: InputFile) -> str:
    """The beginning of a file, as far as it can be read."""
    head, probe = b"", InputFile(file.span, file.options)
    with probe.decompressed() as (stream, _):
        while len(head) < HEAD_BYTES and (more := stream.read(HEAD_BYTES >> 6)):
            head += more
    if not head:
        file.skipped += probe.skipped  # nothing else will be read of it
    return head.decode("utf-8-sig", errors="replace")


def _header(head: str, delimiter: str) -> list[str]:
    """The fields of the first row that has any."""
    try:
        lines = csv.reader(io.StringIO(head, newline=""), delimiter=delimiter)
        return next((fields for fields in lines if fields), [])
    except csv.Error:
        return []


def delimiter_of(head: str, file: InputFile) -> str:
    """What divides a file's fields: as asked, a tab in .tsv, else that by which its first row has
    the columns that are asked for, or else most columns."""
    if file.options.csv_delimiter or suffix_of(file.path) == ".tsv":
        return file.options.csv_delimiter or "\t"

    def fits(delimiter: str) -> tuple[int, int]:
        header = _header(head, delimiter)
        names = columns.names_of(file.options.text_column, header)
        return len(set(names) & set(header)), len(header)

    return max(DELIMITERS, key=fits)


def _names(header: list[str], delimiter: str, file: InputFile) -> list[str]:
    """The columns that are asked for. Raises ForgeError for those that are not there."""
    names = columns.names_of(file.options.text_column, header)
    for name in names:
        if name not in header:
            raise ForgeError(
                f"{file.path} has no text column '{name}': found {columns.found_names(header)}"
                f" (divided by {_in_words(delimiter)})",
                "choose one with --text-column, or what divides the columns with --csv-delimiter",
            )
    return names


def _in_words(delimiter: str) -> str:
    return DELIMITERS.get(delimiter, repr(delimiter))


# --- rows -----------------------------------------------------------------------------------------


def _utf8_of(batches: Iterable[Any], file: InputFile) -> Iterator[pa.LargeBinaryArray]:
    """The text of every batch; rows that are not UTF-8 are bad, or get U+FFFD."""
    first_row = 2  # after the header
    for batch in batches:
        column = columns.joined(batch.columns)
        yield utf8_of(column, file, first_row, " (the header is row 1)")
        first_row += len(batch)


def _refuse(file: InputFile, error: Exception, delimiter: str) -> None:
    reason = first_line(error)
    if "straddling" in reason:
        size = f"{file.options.piece_bytes >> 20} MiB"
        found = f"{file.path}: a row is longer than {size}, which is not read from CSV"
        raise ForgeError(found, "write such text as .jsonl or .parquet") from error
    if isinstance(error, KeyError) or "does not exist" in reason:
        raise ForgeError(
            f"{file.path} has no text column '{file.options.text_column}'",
            "choose one with --text-column",
        ) from error
    fix = f"put quotes around fields that hold {_in_words(delimiter)}, or give --csv-delimiter"
    file.skip(f"{file.path}: {reason}", fix)
