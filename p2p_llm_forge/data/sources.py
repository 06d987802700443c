"""Where documents come from: files of many formats, folders, globs, the Hub; cut into parts.

A part can be read without the others, so parts are shared among workers and machines, and a run
that was killed goes on with the parts that are missing. Reading a part gives pieces: Arrow
columns of documents, about PIECE_BYTES of text each. Which parts and pieces there are follows from
the input alone, never from who reads them.
"""

from __future__ import annotations

import contextlib
import glob
import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_llm_forge.errors import ForgeError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

PIECE_BYTES = 8 << 20  # text that is read, tokenized and counted as one piece of work
BLANK_LINES = "\n\n"

FORMATS = {
    ".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".csv": "csv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}
NO_TEXT = {".zip", ".tar", ".tgz", ".7z", ".bz2", ".xz", ".arrow", ".pdf", ".docx", ".bin"}
WEIGHTED = re.compile(r"(?P<path>.+):(?P<weight>\d+(\.\d*)?|\.\d+)")


@dataclass(frozen=True)
class ReadOptions:
    """How files are read.

    separator: what ends a document in a text file; text_column: where the text of a row is;
    encoding_errors: `strict` or `replace`; skip_bad_rows: count what cannot be read instead of
    raising; dataset_config, dataset_split: which part of a dataset of the Hub.
    """

    separator: str = BLANK_LINES
    one_document_per_file: bool = False
    text_column: str = "text"
    encoding_errors: str = "strict"
    skip_bad_rows: bool = False
    dataset_config: str | None = None
    dataset_split: str = "train"


@dataclass(frozen=True)
class Span:
    """A range of a file: bytes, or row groups of a parquet file.

    bytes: how much of the file that is, for the progress; size, mtime_ns: of the file when it was
    found, by which a change during the work is seen.
    """

    path: str
    start: int
    end: int
    bytes: int = 0
    size: int = 0
    mtime_ns: int = 0


@dataclass(frozen=True)
class Part:
    """Something that is read by itself. source: which `--dataset-path` it came from."""

    kind: str
    spans: tuple[Span, ...]
    source: int = 0
    is_validation: bool = False

    @property
    def is_one_piece(self) -> bool:
        """Whether it is known to be one piece; the others are read from their start to tell."""
        return self.kind in ("text", "jsonl") and not compression_of(self.spans[0].path)

    @property
    def bytes(self) -> int:
        """Bytes that it takes in its files; 0 where nobody knows."""
        return sum(span.bytes for span in self.spans)


@dataclass
class Piece:
    """Documents of a part, in order: a pyarrow LargeBinaryArray of UTF-8, none empty; the bytes of
    the file that were read for them; the rows that were skipped."""

    column: pa.LargeBinaryArray
    source_bytes: int
    skipped: int = 0
    is_last: bool = False


@dataclass
class _Tally:
    """Counts bad rows, or refuses the first."""

    options: ReadOptions
    skipped: int = 0

    def bad(self, message: str, rows: int = 1) -> None:
        if not self.options.skip_bad_rows:
            raise ForgeError(message + ". Mend it, or use --skip-bad-rows to leave it out")
        self.skipped += rows

    def take(self) -> int:
        skipped, self.skipped = self.skipped, 0
        return skipped


# --- what there is to read ------------------------------------------------------------------------


@dataclass(frozen=True)
class Found:
    """All parts of the sources in their order, and each source's weight (empty: no mixture)."""

    parts: list[Part] = field(default_factory=list)
    weights: tuple[float, ...] = ()
    unreadable: int = 0


def find(paths: list[str], options: ReadOptions, validation: bool = False) -> Found:
    """The parts of all `paths`: files, folders, globs, names of the Hub, each perhaps `:weight`.

    Raises ForgeError, naming the path, for what is not there or not text.
    """
    weighted = [split_weight(path) for path in paths]
    weights = tuple(weight for _, weight in weighted if weight is not None)
    if weights and len(weights) != len(paths):
        without = next(path for path, weight in weighted if weight is None)
        raise ForgeError(
            f"--dataset-path {without} has no weight and others have: give every path one, "
            f"as in {without}:0.5, or none"
        )
    if weights and min(weights) <= 0:
        raise ForgeError(f"--dataset-path: weights must be above 0, found {min(weights):g}")
    tally = _Tally(options)
    parts: list[Part] = []
    for number, (path, _) in enumerate(weighted):
        parts += _parts_of(path, number, validation, options, tally)
    total = sum(weights)
    return Found(parts, tuple(weight / total for weight in weights), tally.skipped)


def split_weight(path: str) -> tuple[str, float | None]:
    """`a.jsonl:0.7` as path and weight; a path that exists as it is written has none."""
    match = WEIGHTED.fullmatch(path)
    if not match or Path(path).exists():
        return path, None
    return match["path"], float(match["weight"])


def _parts_of(
    path: str, source: int, validation: bool, options: ReadOptions, tally: _Tally
) -> list[Part]:
    def part(kind: str, *spans: Span) -> Part:
        return Part(kind, spans, source, validation)

    if Path(path).is_dir():
        if (Path(path) / "state.json").exists() or (Path(path) / "dataset_dict.json").exists():
            return [part("saved", Span(path, 0, 0))]
        files = _files_below(Path(path))
        if not files:
            raise ForgeError(
                f"--dataset-path {path} is a folder without text: found none of "
                f"{', '.join(sorted(FORMATS))} (.gz, .zst); for other names give a glob, '*.md'"
            )
    elif Path(path).exists():
        files = [Path(path)]
    elif glob.has_magic(path):
        files = [Path(name) for name in sorted(glob.glob(path, recursive=True))]
        files = [file for file in files if file.is_file()]
        if not files:
            raise ForgeError(f"--dataset-path {path}: no file matches this pattern")
    elif _may_be_on_the_hub(path):
        return [part("hub", Span(path, 0, 0))]
    else:
        raise ForgeError(f"--dataset-path {path}: no such file. Give a file, a folder or a glob")
    return list(_grouped(_spans_of_files(files, options, tally), part))


def _files_below(folder: Path) -> list[Path]:
    files = (path for path in sorted(folder.rglob("*")) if path.is_file())
    return [path for path in files if format_of(path) or _suffix(path) == ".txt"]


def _may_be_on_the_hub(path: str) -> bool:
    name = re.fullmatch(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", path)
    return bool(name) and not format_of(Path(path)) and _suffix(Path(path)) not in NO_TEXT


def compression_of(path: str | Path) -> str | None:
    """The compression that a file's name tells, in pyarrow's words."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def _suffix(path: Path) -> str:
    """The ending that tells the format: `.jsonl` of a.jsonl and of a.jsonl.gz."""
    return (path.with_suffix("") if compression_of(path) else path).suffix.lower()


def format_of(path: Path) -> str | None:
    """The format that a file's name tells; None where it tells none."""
    return FORMATS.get(_suffix(path))


def _spans_of_files(
    files: list[Path], options: ReadOptions, tally: _Tally
) -> Iterator[tuple[str, Span]]:
    """Every file as (kind, span), large ones of some formats as several."""
    for path in files:
        if _suffix(path) in NO_TEXT:
            raise ForgeError(
                f"--dataset-path {path}: {_suffix(path)} is not text that can be read here: give "
                f"{', '.join(sorted(FORMATS))}, each perhaps .gz or .zst"
            )
        try:
            stat = path.stat()
            if stat.st_size:
                with path.open("rb") as file:
                    cuts = list(_cuts_of(file, path, stat.st_size, options))
                for kind, start, end in cuts:
                    share = stat.st_size // len(cuts) if kind == "parquet" else end - start
                    yield kind, Span(str(path), start, end, share, stat.st_size, stat.st_mtime_ns)
        except OSError as error:
            tally.bad(f"{path} cannot be read: {error.strerror or error}")
        except _Truncated as error:
            tally.bad(str(error))


class _Truncated(Exception):
    """A file ends too early."""


def _cuts_of(
    file: Any, path: Path, size: int, options: ReadOptions
) -> Iterator[tuple[str, int, int]]:
    kind = format_of(path) or "text"
    if compression_of(path):
        yield kind, 0, size
        return
    if kind == "json":
        first = file.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
        kind = "json" if first == b"[" else "jsonl"
    if kind == "parquet":
        for group in range(_row_groups(file, path)):
            yield kind, group, group + 1
    elif kind == "jsonl":
        yield from ((kind, *ends) for ends in _ranges(file, size, re.compile(b"\n")))
    elif kind == "text" and not options.one_document_per_file:
        pattern = separator_pattern(options.separator)
        yield from ((kind, *ends) for ends in _ranges(file, size, pattern))
    else:
        yield kind, 0, size


def _row_groups(file: Any, path: Path) -> int:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        return pq.ParquetFile(file).num_row_groups
    except (pa.ArrowException, OSError) as error:
        raise _Truncated(f"{path} is no whole parquet file: {_first_line(error)}") from error


def _ranges(file: Any, size: int, pattern: re.Pattern[bytes]) -> list[tuple[int, int]]:
    """Cut a file into ranges of about PIECE_BYTES after matches of `pattern`, reading only there.

    The cuts depend on the file and the pattern alone.
    """
    cuts = [0]
    for place in range(PIECE_BYTES, size, PIECE_BYTES):
        if place > cuts[-1]:
            cuts.append(_end_of_document(file, place, size, pattern))
    if cuts[-1] < size:
        cuts.append(size)
    return list(zip(cuts, cuts[1:], strict=False))


def _end_of_document(file: Any, place: int, size: int, pattern: re.Pattern[bytes]) -> int:
    """The byte after the first match at or after `place`, or the end of the file."""
    window = 64 << 10
    while True:
        file.seek(place)
        text = file.read(window)
        found = pattern.search(text)
        # A separator that touches the end of the window may go on behind it.
        if found and (found.end() < len(text) or place + len(text) >= size):
            return place + found.end()
        if place + len(text) >= size or not text:
            return size
        window *= 4


def _grouped(spans: Iterable[tuple[str, Span]], part: Any) -> Iterator[Part]:
    """Parts of the spans; small neighbours of one kind are one part, for there may be millions."""
    group: list[Span] = []
    group_kind, group_bytes = "", 0
    for kind, span in spans:
        alone = kind not in ("text", "jsonl") or bool(compression_of(span.path))
        size = span.bytes
        if group and (alone or kind != group_kind or group_bytes + size > PIECE_BYTES):
            yield part(group_kind, *group)
            group, group_bytes = [], 0
        if alone:
            yield part(kind, span)
        else:
            group.append(span)
            group_kind, group_bytes = kind, group_bytes + size
    if group:
        yield part(group_kind, *group)


# --- reading a part -------------------------------------------------------------------------------


def read_pieces(part: Part, options: ReadOptions) -> Iterator[Piece]:
    """The pieces of a part, the last one marked. There is at least one, perhaps empty.

    Raises ForgeError for what cannot be read (naming file and line or row) unless bad rows are
    skipped, and when a file changes meanwhile.
    """
    tally = _Tally(options)
    for span in part.spans:
        _require_unchanged(span)
    waiting: Piece | None = None
    for column, source_bytes in _columns(part, options, tally):
        if waiting:
            yield waiting
        waiting = Piece(_without_empty(column), source_bytes, tally.take())
    for span in part.spans:
        _require_unchanged(span)
    last = waiting or Piece(_column([]), part.bytes)
    last.is_last = True
    last.skipped += tally.take()
    yield last


def _require_unchanged(span: Span) -> None:
    if not span.mtime_ns:  # no file, but a name
        return
    try:
        stat = Path(span.path).stat()
        same = (stat.st_size, stat.st_mtime_ns) == (span.size, span.mtime_ns)
    except OSError:
        same = False
    if not same:
        raise ForgeError(
            f"{span.path} changed while it was read: run the same command again when it is at "
            "rest; what was read of other files is kept"
        )


def _columns(
    part: Part, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    """The documents of a part as columns, each with the bytes of the file that it took."""
    if part.is_one_piece:
        read = _text_of_span if part.kind == "text" else _json_lines_of_span
        yield _joined([read(span, options, tally) for span in part.spans]), part.bytes
        return
    span = part.spans[0]
    readers = {
        "text": _compressed_text, "jsonl": _compressed_json_lines, "json": _json_values,
        "csv": _csv_rows, "parquet": _parquet_rows, "saved": _saved_rows, "hub": _hub_rows,
    }  # fmt: skip
    yield from readers[part.kind](span, options, tally)


def _column(documents: list[bytes]) -> pa.LargeBinaryArray:
    import pyarrow as pa

    return pa.array(documents, pa.large_binary())


def _joined(columns: list[pa.LargeBinaryArray]) -> pa.LargeBinaryArray:
    import pyarrow as pa

    return columns[0] if len(columns) == 1 else pa.concat_arrays(columns)


def _without_empty(column: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    import pyarrow.compute as pc

    holds_text = pc.greater(pc.binary_length(column), 0)
    return column if pc.all(holds_text).as_py() is not False else column.filter(holds_text)


def values_and_offsets(column: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """A column's text (uint8) and where its documents begin and end in it (int64), not copied."""
    import numpy as np

    _, offsets, values = column.buffers()
    if not len(column):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    text = np.frombuffer(values, np.uint8) if values else np.empty(0, np.uint8)
    return text[ends[0] : ends[-1]], ends - ends[0]


# --- text -----------------------------------------------------------------------------------------


def _bytes_of(span: Span) -> bytes:
    try:
        with open(span.path, "rb") as file:
            file.seek(span.start)
            raw = file.read(span.end - span.start)
    except OSError as error:
        raise ForgeError(f"{span.path} cannot be read: {error.strerror}") from error
    if len(raw) != span.end - span.start:
        raise ForgeError(f"{span.path} became shorter while it was read: start again")
    return raw.removeprefix(b"\xef\xbb\xbf") if span.start == 0 else raw


def _text_of_span(span: Span, options: ReadOptions, tally: _Tally) -> pa.LargeBinaryArray:
    raw = _bytes_of(span)
    return text_column(raw, span.path, span.end - len(raw), options, tally)


def text_column(
    raw: bytes, name: str, offset: int, options: ReadOptions, tally: _Tally | None = None
) -> pa.LargeBinaryArray:
    """The documents of a text. name, offset: where it begins, for the error that names a byte."""
    import pyarrow as pa

    column = _divided(raw, options)
    try:
        column.cast(pa.large_string())  # checks UTF-8, 20 times as fast as Python
        return column
    except pa.ArrowInvalid:
        if options.encoding_errors == "replace":
            return _divided(raw.decode("utf-8", errors="replace").encode(), options)
    if options.skip_bad_rows and tally:
        documents = column.to_pylist()
        good = [document for document in documents if _is_utf8(document)]
        tally.skipped += len(documents) - len(good)
        return _column(good)
    try:
        raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ForgeError(
            f"{name} is not UTF-8: byte 0x{raw[error.start]:02x} at offset "
            f"{offset + error.start} ({error.reason}). Convert the file to UTF-8, or use "
            "--encoding-errors replace to put U+FFFD in the place of such bytes."
        ) from error
    raise ForgeError(
        f"{name}: --document-separator cuts a character in two: give another separator"
    )


def _is_utf8(document: bytes) -> bool:
    try:
        document.decode()
        return True
    except UnicodeDecodeError:
        return False


def _divided(raw: bytes, options: ReadOptions) -> pa.LargeBinaryArray:
    if options.one_document_per_file:
        return _column([raw] if raw else [])
    if options.separator != BLANK_LINES:
        return _column([part for part in raw.split(options.separator.encode()) if part])
    return _divided_at_blank_lines(raw)


def _divided_at_blank_lines(raw: bytes) -> pa.LargeBinaryArray:
    r"""The documents between blank lines, in order; empty ones are left out.

    One or more empty lines end a document, whether lines end in LF or CRLF, and line ends at the
    borders of a document are not part of it. A line of spaces is not empty. Inside a document every
    byte stays as it is, CRLF too. (As `re.split(rb"\n\r?\n[\r\n]*")` and strip, but faster.)
    """
    import numpy as np
    import pyarrow as pa

    text = np.frombuffer(raw, np.uint8)
    stops = np.concatenate([np.empty(0, np.int64), *_ends_before_blank_lines(raw, text)])
    starts = stops + np.where(text[stops + 1] == ord("\n"), 2, 3)
    starts, stops = np.append(0, starts), np.append(stops, len(raw))
    some = stops > starts  # between two empty lines in a row there is nothing
    starts, stops = _stripped(raw, text, starts[some], stops[some])
    # What lies between documents is every other value, and is left out: no Python object is made.
    borders = np.empty(2 * len(starts) + 2, np.int64)
    borders[0], borders[-1] = 0, len(raw)
    borders[1:-1:2], borders[2:-1:2] = starts, stops
    buffers = [None, pa.py_buffer(borders), pa.py_buffer(raw)]
    values = pa.LargeBinaryArray.from_buffers(pa.large_binary(), len(borders) - 1, buffers)
    return values.take(pa.array(2 * np.flatnonzero(stops > starts) + 1))


def _ends_before_blank_lines(raw: bytes, text: np.ndarray) -> Iterator[np.ndarray]:
    """The places of line ends after which an empty line comes, window by window."""
    import numpy as np

    window = 64 << 10  # what is computed of it stays in the processor's cache
    for start in range(0, len(raw), window):
        part = text[start : start + window + 2]
        is_end = part == ord("\n")
        is_blank = is_end[:-1] & is_end[1:]
        if raw.find(b"\r", start, start + len(part)) >= 0:
            is_blank[:-1] |= is_end[:-2] & is_end[2:] & (part[1:-1] == ord("\r"))
        yield start + np.flatnonzero(is_blank[:window])


def _stripped(
    raw: bytes, text: np.ndarray, starts: np.ndarray, stops: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """The stretches of a text without the line ends at their borders (rare but in CRLF files)."""
    import numpy as np

    is_end = np.zeros(256, bool)
    is_end[[ord("\n"), ord("\r")]] = True
    for place in np.flatnonzero(is_end[text[starts]] | is_end[text[stops - 1]]):
        start, stop = int(starts[place]), int(stops[place])
        document = raw[start:stop]
        starts[place] = start + len(document) - len(document.lstrip(b"\r\n"))
        stops[place] = max(int(starts[place]), start + len(document.rstrip(b"\r\n")))
    return starts, stops


def separator_pattern(separator: str) -> re.Pattern[bytes]:
    r"""Where a text may be cut: after this. (Beginning with a literal byte, it is found fast.)"""
    blank_lines = rb"\n\r?\n[\r\n]*"
    return re.compile(blank_lines if separator == BLANK_LINES else re.escape(separator.encode()))


@contextlib.contextmanager
def _open_stream(span: Span, tally: _Tally) -> Iterator[tuple[Any, Any]]:
    """(the file's decompressed bytes, the file itself, whose place tells the progress)."""
    import pyarrow as pa

    try:
        with pa.OSFile(span.path) as file:
            name = compression_of(span.path)
            yield (pa.CompressedInputStream(file, name) if name else file), file
    except OSError as error:  # also what pyarrow raises for damaged streams
        tally.bad(f"{span.path} is damaged or truncated: {_first_line(error)}")


def _first_line(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _raw_pieces(
    span: Span, pattern: re.Pattern[bytes] | None, tally: _Tally
) -> Iterator[tuple[bytes, int]]:
    """A compressed file's text in pieces that end after `pattern` (None: one piece), each with the
    bytes of the file that it took."""
    waiting, told = b"", 0
    with _open_stream(span, tally) as (stream, file):
        while True:
            more = stream.read(PIECE_BYTES)
            waiting += more
            if pattern and more:
                # At the very end a separator may go on with the next bytes.
                found = pattern.search(waiting, min(PIECE_BYTES, len(waiting)))
                if not found or found.end() == len(waiting):
                    continue
                yield waiting[: found.end()], file.tell() - told
                waiting, told = waiting[found.end() :], file.tell()
            elif not more:
                break
    if waiting:
        yield waiting, span.end - told


def _compressed_text(
    span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    pattern = None if options.one_document_per_file else separator_pattern(options.separator)
    offset = 0
    for raw, source_bytes in _raw_pieces(span, pattern, tally):
        text = raw.removeprefix(b"\xef\xbb\xbf") if not offset else raw
        place = offset + len(raw) - len(text)
        yield text_column(text, f"{span.path} (decompressed)", place, options, tally), source_bytes
        offset += len(raw)


# --- rows of JSON ---------------------------------------------------------------------------------


def _json_lines_of_span(span: Span, options: ReadOptions, tally: _Tally) -> pa.LargeBinaryArray:
    def first_line() -> int:
        return 1 + _count_lines(span.path, span.start)

    return _json_lines(_bytes_of(span), span.path, first_line, options, tally)


def _count_lines(path: str, end: int) -> int:
    lines = 0
    with open(path, "rb") as file:
        while end > 0 and (chunk := file.read(min(end, 1 << 20))):
            lines += chunk.count(b"\n")
            end -= len(chunk)
    return lines


def _compressed_json_lines(
    span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    lines = 1
    for raw, source_bytes in _raw_pieces(span, re.compile(b"\n"), tally):
        first = lines
        text = raw.removeprefix(b"\xef\xbb\xbf") if first == 1 else raw
        yield _json_lines(text, span.path, lambda first=first: first, options, tally), source_bytes
        lines += raw.count(b"\n")


def _json_lines(
    raw: bytes, path: str, first_line: Any, options: ReadOptions, tally: _Tally
) -> pa.LargeBinaryArray:
    """The text column of JSON lines: by pyarrow, and by Python when a line must be named."""
    import pyarrow as pa
    import pyarrow.json

    if not raw.strip():
        return _column([])
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
            return _joined(column.chunks or [_column([])])
    except pa.ArrowException:
        pass
    return _json_lines_by_python(raw, path, first_line(), options, tally)


def _json_lines_by_python(
    raw: bytes, path: str, first_line: int, options: ReadOptions, tally: _Tally
) -> pa.LargeBinaryArray:
    documents = []
    for number, line in enumerate(raw.split(b"\n"), start=first_line):
        if not line.strip():
            continue
        where = f"{path}, line {number}"
        try:
            row = json.loads(line.decode("utf-8", errors=options.encoding_errors))
        except (ValueError, RecursionError) as error:
            tally.bad(f"{where} is not JSON: {error}")
            continue
        text = _text_of_row(row, where, options, tally)
        if text is not None:
            documents.append(text)
    return _column(documents)


def _text_of_row(row: Any, where: str, options: ReadOptions, tally: _Tally) -> bytes | None:
    """The text of a row that was JSON; lone surrogates, which UTF-8 cannot hold, as U+FFFD."""
    name = options.text_column
    if not isinstance(row, dict):
        tally.bad(f"{where} holds a {type(row).__name__} where an object with '{name}' is expected")
    elif name not in row:
        found = ", ".join(map(str, row)) or "nothing"
        tally.bad(f"{where} has no text column '{name}' (--text-column): found {found}")
    elif not isinstance(row[name], str):
        tally.bad(f"{where}: '{name}' is {type(row[name]).__name__}, expected a string")
    else:
        try:
            return row[name].encode()
        except UnicodeEncodeError:
            return re.sub("[\ud800-\udfff]", "\ufffd", row[name]).encode()
    return None


_NO_VALUE = re.compile(r"[ \t\r\n,]*")  # what stands between the values of an array


def _json_values(
    span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    """The rows of a JSON array, one value at a time; a compressed .json may hold lines instead."""
    head = b""
    with _open_stream(span, tally) as (stream, _):
        head = stream.read(4096).removeprefix(b"\xef\xbb\xbf").lstrip()[:1]
    if not head:
        return
    if head != b"[":
        yield from _compressed_json_lines(span, options, tally)
        return
    with _open_stream(span, tally) as (stream, file):
        documents, size, told = [], 0, 0
        for number, row in enumerate(_values_of_array(stream, span.path, options, tally), start=1):
            text = _text_of_row(row, f"{span.path}, row {number}", options, tally)
            if text is None:
                continue
            documents.append(text)
            size += len(text)
            if size >= PIECE_BYTES:
                yield _column(documents), file.tell() - told
                documents, size, told = [], 0, file.tell()
        yield _column(documents), span.end - told


def _values_of_array(stream: Any, path: str, options: ReadOptions, tally: _Tally) -> Iterator[Any]:
    import codecs

    decode = codecs.getincrementaldecoder("utf-8-sig")(errors=options.encoding_errors).decode
    decoder, rows = json.JSONDecoder(), 0
    waiting, place, size = "", 0, 1 << 20
    try:
        while "[" not in waiting:
            waiting += decode(stream.read(size))
        place = waiting.index("[") + 1
        while True:
            place = _NO_VALUE.match(waiting, place).end()  # type: ignore[union-attr]
            if waiting.startswith("]", place):
                break
            try:
                value, end = decoder.raw_decode(waiting, place)
                if end == len(waiting):  # a number may go on
                    raise ValueError("the array does not end")
            except ValueError as error:
                # Half of a long value is not read again and again: what is read doubles.
                size = max(1 << 20, len(waiting) - place)
                more = stream.read(size)
                if not more:
                    reason = getattr(error, "msg", error)
                    tally.bad(f"{path} is not a whole JSON array: row {rows + 1}: {reason}")
                    return
                waiting, place = waiting[place:] + decode(more), 0
                continue
            yield value
            rows, place = rows + 1, end
        if waiting[place + 1 :].strip() or stream.read(1 << 20).strip():
            tally.bad(f"{path} goes on after the end of its JSON array, after row {rows}")
    except UnicodeDecodeError as error:
        tally.bad(
            f"{path} is not UTF-8 ({error.reason}), after row {rows}; --encoding-errors replace "
            "puts U+FFFD in the place of such bytes"
        )


# --- rows of tables -------------------------------------------------------------------------------


def _csv_rows(
    span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    import pyarrow as pa
    import pyarrow.csv

    def skip(row: Any) -> str:
        if not options.skip_bad_rows:
            return "error"
        tally.skipped += 1
        return "skip"

    name = options.text_column
    with _open_stream(span, tally) as (stream, file):
        try:
            rows = pyarrow.csv.open_csv(
                stream,
                pyarrow.csv.ReadOptions(use_threads=False, block_size=PIECE_BYTES),
                pyarrow.csv.ParseOptions(newlines_in_values=True, invalid_row_handler=skip),
                # One row that is not UTF-8 would end the parser's work: that is checked here.
                pyarrow.csv.ConvertOptions(
                    column_types={name: pa.large_binary()}, include_columns=[name]
                ),
            )
            batches = _utf8_of_batches(rows, span.path, options, tally)
            yield from _by_size(batches, file, span, options, tally)
        except (pa.ArrowException, KeyError) as error:
            _refuse_csv(span, error, name, tally)


def _utf8_of_batches(
    batches: Iterable[Any], path: str, options: ReadOptions, tally: _Tally
) -> Iterator[pa.LargeStringArray]:
    """The only column of every batch as strings; rows that are not UTF-8 are bad or mended."""
    import pyarrow as pa

    first_row = 2  # after the header
    for batch in batches:
        column = batch.column(0)
        try:
            yield column.cast(pa.large_string())
        except pa.ArrowInvalid:
            documents = []
            for row, document in enumerate(column.to_pylist(), start=first_row):
                if options.encoding_errors == "replace":
                    document = document.decode(errors="replace").encode()
                if _is_utf8(document):
                    documents.append(document)
                else:
                    tally.bad(f"{path}, row {row} (the header is row 1) is not UTF-8")
            yield _column(documents).cast(pa.large_string())
        first_row += len(column)


def _refuse_csv(span: Span, error: Exception, name: str, tally: _Tally) -> None:
    import pyarrow as pa

    reason = _first_line(error)
    if reason == "Empty CSV file":  # seen so late because it is compressed
        return
    if "straddling" in reason:
        raise ForgeError(
            f"{span.path}: a row is longer than {PIECE_BYTES >> 20} MiB, which is not read from "
            "CSV: write such text as .jsonl or .parquet"
        ) from error
    if isinstance(error, KeyError) or "does not exist" in reason:
        raise ForgeError(f"{span.path} has no text column '{name}': use --text-column") from error
    if isinstance(error, (pa.ArrowInvalid, OSError)):
        tally.bad(f"{span.path}: {reason}")


def _by_size(
    columns: Iterator[pa.Array], file: Any, span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    """Small columns joined to pieces of PIECE_BYTES or little more. file: tells the progress."""
    import pyarrow as pa

    waiting, size, row, told = [], 0, 1, 0
    damage = None
    try:
        for column in columns:
            waiting.append(as_text(column, span.path, row, options, tally))
            row += len(column)
            size += len(values_and_offsets(waiting[-1])[0])
            if size >= PIECE_BYTES:
                place = file.tell() if file else 0
                yield _joined(waiting), place - told
                waiting, size, told = [], 0, place
    except (pa.ArrowException, OSError) as error:
        damage = error  # what was read before it is not lost
    if waiting:
        yield _joined(waiting), max(0, span.end - told) if file else 0
    if damage:
        raise damage


def as_text(
    column: pa.Array, path: str, first_row: int, options: ReadOptions, tally: _Tally
) -> pa.LargeBinaryArray:
    """A column of strings as UTF-8. Nulls are bad rows; another type is refused for the file."""
    import pyarrow as pa
    import pyarrow.compute as pc

    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    if not (
        pa.types.is_string(kind) or pa.types.is_large_string(kind) or pa.types.is_string_view(kind)
    ):
        if not pa.types.is_null(kind):
            raise ForgeError(
                f"{path}: column '{options.text_column}' holds {column.type}, expected strings: "
                "choose another with --text-column"
            )
        column = column.cast(pa.large_string())
    if column.null_count:
        row = first_row + column.is_null().to_pylist().index(True)
        tally.bad(
            f"{path}, row {row}: '{options.text_column}' is null, expected a string",
            column.null_count,
        )
        column = pc.drop_null(column)
    return column.cast(pa.large_string()).cast(pa.large_binary())


def _parquet_rows(
    span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    with contextlib.ExitStack() as stack:
        try:
            file = stack.enter_context(_seekable(span, tally))
            table = pq.ParquetFile(file, buffer_size=1 << 20)
            _require_column(table.schema_arrow, span.path, options)
            groups = range(table.num_row_groups)
            if not compression_of(span.path):
                groups = range(span.start, span.end)
            for group in groups:
                yield from _rows_of_group(table, group, span, options, tally)
        except (pa.ArrowException, OSError) as error:
            tally.bad(f"{span.path} is damaged or truncated: {_first_line(error)}")


def _rows_of_group(
    table: Any, group: int, span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    import pyarrow as pa

    facts = table.metadata.row_group(group)
    row_bytes = max(1, facts.total_byte_size // max(1, facts.num_rows))
    batches = table.iter_batches(
        batch_size=max(1, min(1 << 16, PIECE_BYTES // row_bytes)),
        row_groups=[group],
        columns=[options.text_column],
        use_threads=False,
    )
    rows_left, bytes_left = facts.num_rows, span.bytes

    def columns() -> Iterator[pa.Array]:
        nonlocal rows_left
        for batch in batches:
            rows_left -= len(batch)
            yield batch.column(0)

    try:
        for column, _ in _by_size(columns(), None, span, options, tally):
            progress = min(bytes_left, len(values_and_offsets(column)[0]))
            bytes_left -= progress
            yield column, progress
    except (pa.ArrowException, OSError) as error:
        tally.bad(f"{span.path} is damaged or truncated: {_first_line(error)}", rows_left)


@contextlib.contextmanager
def _seekable(span: Span, tally: _Tally) -> Iterator[Any]:
    """The file, unpacked into a temporary one if it is compressed: parquet is read from its end."""
    import shutil
    import tempfile

    if not compression_of(span.path):
        with open(span.path, "rb") as file:
            yield file
        return
    with tempfile.TemporaryFile() as unpacked:
        with _open_stream(span, tally) as (stream, _):
            shutil.copyfileobj(stream, unpacked)
        unpacked.seek(0)
        yield unpacked


def _require_column(schema: Any, path: str, options: ReadOptions) -> None:
    if options.text_column not in schema.names:
        raise ForgeError(
            f"{path} has no text column '{options.text_column}': found {', '.join(schema.names)}. "
            "Choose one with --text-column"
        )


def _saved_rows(
    span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    """Rows of a folder that `save_to_disk` of datasets wrote."""
    import datasets

    try:
        saved = datasets.load_from_disk(span.path)
    except Exception as error:  # what datasets raises for damaged folders is not one class
        raise ForgeError(f"{span.path} cannot be read: {_first_line(error)}") from error
    if isinstance(saved, datasets.DatasetDict):
        if options.dataset_split not in saved:
            raise ForgeError(
                f"{span.path} has no split '{options.dataset_split}': found {', '.join(saved)}. "
                "Choose one with --dataset-split"
            )
        saved = saved[options.dataset_split]
    yield from _rows_of_dataset(saved, span, options, tally)


def _hub_rows(
    span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    """Rows of a dataset of the Hub, streamed."""
    import datasets

    try:
        stream = datasets.load_dataset(
            span.path, options.dataset_config, split=options.dataset_split, streaming=True
        )
    except Exception as error:  # the Hub, the network and the dataset fail in their own ways
        raise ForgeError(
            f"--dataset-path {span.path}: no such file, and no dataset of that name could be read "
            f"from the Hub ({_first_line(error)})"
        ) from error
    yield from _rows_of_dataset(stream, span, options, tally)


def _rows_of_dataset(
    rows: Any, span: Span, options: ReadOptions, tally: _Tally
) -> Iterator[tuple[pa.LargeBinaryArray, int]]:
    def columns() -> Iterator[pa.Array]:
        for table in rows.with_format("arrow").iter(batch_size=1000):
            _require_column(table.schema, span.path, options)
            yield from table.column(options.text_column).chunks

    yield from _by_size(columns(), None, span, options, tally)
