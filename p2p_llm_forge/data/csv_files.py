"""CSV as RFC 4180 has it, quotes and lines inside fields, whatever stands between the fields; and
TSV, which has no quotes."""

from __future__ import annotations

import codecs
import csv
import io
from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv

from p2p_llm_forge.data import columns, conversations
from p2p_llm_forge.data.formats import suffix_of
from p2p_llm_forge.data.input_file import (
    BYTE_ORDER_MARK,
    TO_UTF8,
    Columns,
    InputFile,
    first_line,
)
from p2p_llm_forge.data.parts import column_of
from p2p_llm_forge.data.table_files import joined_by_size, utf8_of
from p2p_llm_forge.errors import ForgeError

DELIMITERS = {",": "a comma", ";": "a semicolon", "\t": "a tab", "|": "a bar"}
ROWS_BYTES = 1 << 18  # of a file that are divided into rows at once
LONGEST_ROW = 64 << 20  # bytes in which a quote is closed; the parser reads only shorter rows
TSV = (".tsv", "\t")  # has no quotes: iana.org/assignments/media-types/text/tab-separated-values
QUOTED_TSV = "quotes around fields, which .tsv has not, call it .csv: its tabs are found"
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
    has_quotes = (suffix_of(file.path), delimiter) != TSV
    names = _names(_header(head, delimiter, has_quotes), delimiter, file)
    piece_bytes = file.options.piece_bytes
    with file.decompressed() as (stream, raw):
        whole_rows = WholeRows(stream, file, delimiter, has_quotes)
        try:
            batches = pyarrow.csv.open_csv(
                io.BufferedReader(whole_rows, ROWS_BYTES),
                pyarrow.csv.ReadOptions(use_threads=False, block_size=piece_bytes),
                pyarrow.csv.ParseOptions(
                    delimiter=delimiter,
                    quote_char='"' if has_quotes else False,
                    newlines_in_values=has_quotes,
                    invalid_row_handler=skip,
                ),
                # One row that is not UTF-8 would end the parser's work: that is checked here.
                pyarrow.csv.ConvertOptions(
                    column_types=dict.fromkeys(names, pa.large_binary()), include_columns=names
                ),
            )
            read = 0
            documents_of = _conversations_of if file.options.train_on else _utf8_of
            for column in joined_by_size(documents_of(batches, file), piece_bytes):
                yield column, raw.tell() - read
                read = raw.tell()
        except (pa.ArrowException, KeyError) as error:
            if not whole_rows.damage:
                _refuse(file, error, delimiter)
        file.skipped += whole_rows.left_out
        if whole_rows.damage:
            raise whole_rows.damage


class WholeRows(io.RawIOBase):
    """A stream of CSV without rows whose quotes are wrong, that ends after the last row before
    damage, which is kept for later.

    A quote is wrong where none closes it, or where what follows the one that closes it is not the
    end of a field. The line of the wrong quote ends such a row. With --skip-bad-rows these are
    counted in `left_out`, else the first one is the damage.
    """

    def __init__(self, stream: Any, file: InputFile, delimiter: str, has_quotes: bool) -> None:
        self._stream = stream
        self._file = file
        self._ends = delimiter.encode() + b"\r\n" if has_quotes else b""  # of fields
        self._rows = memoryview(b"")
        self._begun = b""  # a row
        self._is_begin = True
        self._lines = 0  # that ended before `_begun`
        self.left_out = 0
        self.damage: Exception | None = None

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        is_end = False
        while not self._rows and not self.damage and not is_end:
            is_end = not self._read()
            try:
                self._divide(is_end)
            except ForgeError as error:
                self.damage = error
        taken = self._rows[: len(buffer)]
        buffer[: len(taken)] = taken
        self._rows = self._rows[len(taken) :]
        return len(taken)

    def _read(self) -> bool:
        """Add to the row that has begun as much as is known of it: so the time for a long one is
        in proportion to its length. Returns False at the end."""
        begun, read = len(self._begun), [self._begun]
        wanted = max(ROWS_BYTES, min(begun, LONGEST_ROW - begun))
        try:
            while wanted > 0 and (more := self._stream.read(wanted)):
                read.append(more)
                wanted -= len(more)
        except OSError as error:
            self.damage = error
        self._begun = b"".join(read)
        if self._is_begin:
            self._begun, self._is_begin = self._begun.removeprefix(BYTE_ORDER_MARK), False
        return len(read) > 1 or self.damage is not None

    def _divide(self, is_end: bool) -> None:
        """Take the rows that end in what was read; at the end of the file the last one, too."""
        text, good, start = self._begun, [], 0
        is_full = len(text) >= LONGEST_ROW
        row = after = 0  # where a row begins; the byte after all fields that are known
        if not is_end and len(text) <= 2 * ROWS_BYTES:
            row = after = _end_of_regular_rows(text, self._ends)
        while self._ends and (quote := text.find(b'"', after)) >= 0:
            row = max(row, _line_end(text, after, quote))
            if quote > row and text[quote - 1] not in self._ends:
                after = quote + 1  # one inside a field without quotes means itself
                continue
            after = _after_quotes(text, quote)
            is_known = after > 0 and (after < len(text) or is_end)
            if is_known and (text[after : after + 1] or b"\n") in self._ends:
                continue
            line_end = text.find(b"\n", quote) + 1
            is_wrong = is_known or (is_full and row == 0)
            if not is_end and not (is_wrong and line_end):
                break  # what comes next will show
            self._leave_out(text, quote)
            good.append(text[start:row])
            start = row = after = line_end or len(text)
        else:
            row = len(text) if is_end else max(row, _line_end(text, after, len(text)))
        if is_full and row == 0:
            row = len(text)  # too long for the parser, which will say so
        good.append(text[start:row])
        self._lines += text.count(b"\n", 0, row)
        self._rows, self._begun = memoryview(b"".join(good)), text[row:]

    def _leave_out(self, text: bytes, quote: int) -> None:
        """Count a row with a wrong quote. Raises ForgeError unless such are skipped."""
        if self._file.options.skip_bad_rows:
            self.left_out += 1
            return
        line = self._lines + text.count(b"\n", 0, quote) + 1
        field = text[quote : quote + 40].splitlines()[0].decode(errors="replace")
        self._file.skip(
            f"{self._file.path}, line {line}: a quote opens a field that none closes: {field}",
            'put a quote at the end of the field, too, and "" for each quote inside it',
        )


def _end_of_regular_rows(text: bytes, ends: bytes) -> int:
    """The byte after the last row, 0 if a quote stands where no quoted field begins or ends.

    Where every other quote begins a field, or a quote follows a quote, and the others end one,
    rows end after an even number of quotes.
    """
    around = np.frombuffer(b"\n" + text + b"\n", np.uint8)
    quotes = np.flatnonzero(around == ord('"'))
    fits = np.isin(np.arange(256), [*ends, ord('"')])
    if not (fits[around[quotes[::2] - 1]].all() and fits[around[quotes[1::2] + 1]].all()):
        return 0
    end = len(text)
    while end := text.rfind(b"\n", 0, end) + 1:
        before = int(np.searchsorted(quotes, end))
        if before % 2 == 0:
            break
        end = int(quotes[before - 1]) - 1
    return end


def _line_end(text: bytes, start: int, end: int) -> int:
    """The byte after the last line end in a range, 0 for none."""
    return max(text.rfind(b"\n", start, end), text.rfind(b"\r", start, end)) + 1


def _after_quotes(text: bytes, quote: int) -> int:
    """The byte after the field that a quote opens, 0 if none closes it."""
    place = quote + 1
    while (place := text.find(b'"', place) + 1) and text[place : place + 1] == b'"':
        place += 1
    return place


# --- the header -----------------------------------------------------------------------------------


def _head(file: InputFile) -> str:
    """The beginning of a file, as far as it can be read."""
    head, probe = b"", InputFile(file.span, file.options)
    with probe.decompressed() as (stream, _):
        while len(head) < HEAD_BYTES and (more := stream.read(HEAD_BYTES >> 6)):
            head += more
    if not head:
        file.skipped += probe.skipped  # nothing else will be read of it
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)):
        mark = head[:2].hex(" ").upper()
        found = f"{file.path} is not UTF-8: it begins with the bytes {mark}, as UTF-16 does"
        raise ForgeError(found, "convert it to UTF-8")
    return head.decode("utf-8-sig", errors="replace")


def _header(head: str, delimiter: str, has_quotes: bool = True) -> list[str]:
    """The fields of the first row that has any."""
    try:
        lines = csv.reader(
            io.StringIO(head, newline=""),
            delimiter=delimiter,
            quoting=csv.QUOTE_MINIMAL if has_quotes else csv.QUOTE_NONE,
        )
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
        return len(set(_asked(header, file)) & set(header)), len(header)

    return max(DELIMITERS, key=fits)


def _asked(header: list[str], file: InputFile) -> list[str]:
    """The columns that are asked for, there or not."""
    if file.options.train_on:
        return conversations.column_names(file.options)
    return columns.names_of(file.options.text_column, header)


def header_of(file: InputFile) -> list[str]:
    """The names of a file's columns; none where it is empty."""
    head = _head(file)
    delimiter = delimiter_of(head, file)
    return _header(head, delimiter, (suffix_of(file.path), delimiter) != TSV)


def _names(header: list[str], delimiter: str, file: InputFile) -> list[str]:
    """The columns that are asked for. Raises ForgeError for those that are not there."""
    names = _asked(header, file)
    if file.options.train_on and (there := [name for name in names if name in header]):
        return there  # what a row needs is seen there
    for name in names:
        if name not in header:
            fix = "choose one with --text-column, or what divides the columns with --csv-delimiter"
            if f'"{name}"' in header:
                fix = f"as it has {QUOTED_TSV}"
            raise ForgeError(
                f"{file.path} has no text column '{name}': found {columns.found_names(header)}"
                f" (divided by {_in_words(delimiter)})",
                fix,
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


def _conversations_of(batches: Iterable[Any], file: InputFile) -> Iterator[pa.LargeBinaryArray]:
    """The conversations of every batch, as documents."""
    row = 2  # after the header
    for batch in batches:
        documents = []
        for number, values in enumerate(batch.to_pylist(), start=row):
            where = f"{file.path}, row {number} (the header is row 1)"
            errors = file.options.encoding_errors
            try:
                texts = {name: text.decode(errors=errors) for name, text in values.items() if text}
            except UnicodeDecodeError:
                file.skip(f"{where} is not UTF-8", TO_UTF8)
            else:
                documents += conversations.document_in(
                    dict.fromkeys(values, "") | texts, where, file
                )
        row += len(batch)
        yield column_of(documents)


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
    if (suffix_of(file.path), delimiter) == TSV:
        fix = f"correct it, or if it has {QUOTED_TSV}"
    file.skip(f"{file.path}: {reason}", fix)
