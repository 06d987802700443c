"""A part of the text: what is read by itself, how it is read, and the pieces that it gives.

A part can be read without the others, so parts are divided among workers and machines, and a run
that was killed resumes with the parts that are missing. Which parts and pieces there are follows
from the input alone, never from who reads them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.errors import ForgeError

# Documents, some at a time, each time with the bytes of the file that they took.
Columns = Iterator[tuple[pa.LargeBinaryArray, int]]

PIECE_BYTES = 8 << 20  # text that is read, tokenized and counted as one piece of work
BLANK_LINES = "\n\n"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
TO_UTF8 = "convert it to UTF-8, or put U+FFFD in place of such bytes with --encoding-errors replace"

FORMATS = {
    ".txt": "text", ".jsonl": "jsonl", ".ndjson": "jsonl", ".json": "json",
    ".csv": "csv", ".parquet": "parquet",
}  # fmt: skip
COMPRESSIONS = {".gz": "gzip", ".zst": "zstd"}


def compression_of(path: str | Path) -> str | None:
    """The compression that a file's name shows, in pyarrow's words."""
    return COMPRESSIONS.get(Path(path).suffix.lower())


def suffix_of(path: Path) -> str:
    """The ending that shows the format: `.jsonl` of a.jsonl and of a.jsonl.gz."""
    return (path.with_suffix("") if compression_of(path) else path).suffix.lower()


def format_of(path: Path) -> str | None:
    """The format that a file's name shows; None for an unknown ending."""
    return FORMATS.get(suffix_of(path))


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; named as in PrepareConfig.

    separator: what ends a document in a text file; text_column: where the text of a row is;
    encoding_errors: `strict` or `replace`; skip_bad_rows: count what cannot be read instead of
    raising; dataset_config, dataset_split: which part of a dataset of the Hub; piece_bytes: of
    text, in a piece.
    """

    separator: str = BLANK_LINES
    one_document_per_file: bool = False
    text_column: str = "text"
    encoding_errors: str = "strict"
    skip_bad_rows: bool = False
    dataset_config: str | None = None
    dataset_split: str = "train"
    piece_bytes: int = PIECE_BYTES

    @classmethod
    def of(cls, config: PrepareConfig) -> ReadOptions:
        """As a preparation asks for."""
        own: dict[str, Any] = {"separator": config.separator(), "piece_bytes": PIECE_BYTES}
        names = {field.name for field in dataclasses.fields(cls)} - set(own)
        return cls(**own, **{name: getattr(config, name) for name in names})


@dataclass(frozen=True)
class Span:
    """A range of a file: bytes, or row groups of a parquet file.

    bytes: how much of the file that is, for the progress; size, mtime_ns: of the file when it was
    found, by which a change during the work is seen (0: no file, but a name).
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
        """Whether it is known to be one piece; how many the others are is seen by reading them."""
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


def require_unchanged(span: Span) -> None:
    """Raise ForgeError if the span's file is another one than when it was found."""
    if not span.mtime_ns:
        return
    try:
        stat = Path(span.path).stat()
        same = (stat.st_size, stat.st_mtime_ns) == (span.size, span.mtime_ns)
    except OSError:
        same = False
    if not same:
        raise _changed(span)


def read_span(span: Span) -> bytes:
    """The bytes of a span, without a byte order mark. Raises ForgeError."""
    try:
        with open(span.path, "rb") as file:
            file.seek(span.start)
            raw = file.read(span.end - span.start)
    except OSError as error:
        raise ForgeError(
            f"{span.path} cannot be read: {error.strerror}",
            "make the file readable, and run the same command again",
        ) from error
    if len(raw) != span.end - span.start:
        raise _changed(span)
    return raw.removeprefix(BYTE_ORDER_MARK) if span.start == 0 else raw


def _changed(span: Span) -> ForgeError:
    return ForgeError(
        f"{span.path} changed while it was read",
        "run the same command again when nothing writes to it; what was read of other files is"
        " kept",
    )


class BadRows:
    """Counts what cannot be read, or refuses the first of it."""

    def __init__(self, options: ReadOptions) -> None:
        self.is_skipping = options.skip_bad_rows
        self.count = 0

    def add(self, found: str, fix: str = "correct it", rows: int = 1) -> None:
        """Count bad rows. Raises ForgeError unless they are to be skipped."""
        if not self.is_skipping:
            raise ForgeError(found, f"{fix}, or use --skip-bad-rows to leave it out")
        self.count += rows

    def add_damaged(self, path: str, error: Exception, rows: int = 1) -> None:
        """Count what a reader could not get out of a file."""
        found = f"{path} is damaged or truncated: {first_line(error)}"
        self.add(found, "copy or download the file again", rows)

    def take(self) -> int:
        """How many there were since this was last asked."""
        count, self.count = self.count, 0
        return count


def first_line(error: Exception) -> str:
    """The first line of an error of a library."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]
