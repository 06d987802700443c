"""A part of the text: what is read by itself, how it is read, and the pieces that it gives.

A part can be read without the others, so parts are divided among workers and machines, and a run
that was killed resumes with the parts that are missing. Which parts and pieces there are follows
from the input alone, never from who reads them.
"""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.config.prepare import BLANK_LINES
from p2p_llm_forge.data.formats import ONE_DOCUMENT, compression_of

PIECE_BYTES = 8 << 20  # text that is read, tokenized and counted as one piece of work


@dataclass(frozen=True)
class ReadOptions:
    """How files are read; named as in PrepareConfig.

    separator: what ends a document in a text file; whole_sources: files of source code and Markdown
    are one document each; piece_bytes: of text, in a piece; train_on: of conversations, None where
    rows hold a text.
    """

    separator: str = BLANK_LINES
    one_document_per_file: bool = False
    whole_sources: bool = True
    text_column: str = "text"
    csv_delimiter: str | None = None
    encoding_errors: str = "strict"
    skip_bad_rows: bool = False
    dataset_config: str | None = None
    dataset_split: str = "train"
    piece_bytes: int = PIECE_BYTES
    train_on: str | None = None

    @classmethod
    def of(cls, config: PrepareConfig) -> ReadOptions:
        """As a preparation asks for."""
        own: dict[str, Any] = {"separator": config.separator(), "piece_bytes": PIECE_BYTES}
        own["csv_delimiter"] = config.delimiter()
        own["train_on"] = config.trained if config.asks_for_conversations else None
        own["whole_sources"] = config.document_separator is None
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
        can_be_cut = self.kind in ("text", "jsonl", *ONE_DOCUMENT)
        return can_be_cut and not compression_of(self.spans[0].path)

    @property
    def bytes(self) -> int:
        """Bytes that it takes in its files; 0 where nobody knows."""
        return sum(span.bytes for span in self.spans)


@dataclass
class Piece:
    """Documents of a part, in order, none empty; the bytes of the file that were read for them;
    the rows that were skipped."""

    column: pa.LargeBinaryArray
    source_bytes: int
    skipped: int = 0
    is_last: bool = False


# --- columns of documents: LargeBinaryArrays of UTF-8, one value for each document ----------------


def column_of(documents: list[bytes]) -> pa.LargeBinaryArray:
    """The documents as a column."""
    return pa.array(documents, pa.large_binary())


def column_of_one(document: bytes) -> pa.LargeBinaryArray:
    """The document as a column, not copied."""
    ends = np.array([0, len(document)], np.int64)
    buffers = [None, pa.py_buffer(ends), pa.py_buffer(document)]
    return pa.LargeBinaryArray.from_buffers(pa.large_binary(), 1, buffers)


def without_empty(column: pa.LargeBinaryArray) -> pa.LargeBinaryArray:
    """The column without its documents of no bytes."""
    holds_text = pc.greater(pc.binary_length(column), 0)
    return column if pc.all(holds_text).as_py() is not False else column.filter(holds_text)


def values_and_offsets(column: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
    """A column's text (uint8) and where its documents begin and end in it (int64), not copied."""
    _, offsets, values = column.buffers()
    if not len(column):
        return np.empty(0, np.uint8), np.zeros(1, np.int64)
    ends = np.frombuffer(offsets, np.int64)[column.offset : column.offset + len(column) + 1]
    text = np.frombuffer(values or b"", np.uint8)
    return text[ends[0] : ends[-1]], ends - ends[0]


def is_utf8(document: bytes) -> bool:
    """Whether a document is whole, valid UTF-8."""
    try:
        document.decode()
        return True
    except UnicodeDecodeError:
        return False
