"""Columns of documents: pyarrow's LargeBinaryArray of UTF-8, one value for each document."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc


def column_of(documents: list[bytes]) -> pa.LargeBinaryArray:
    """The documents as a column."""
    return pa.array(documents, pa.large_binary())


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
    text = np.frombuffer(values, np.uint8) if values else np.empty(0, np.uint8)
    return text[ends[0] : ends[-1]], ends - ends[0]


def is_utf8(document: bytes) -> bool:
    """Whether a document is whole, valid UTF-8."""
    try:
        document.decode()
        return True
    except UnicodeDecodeError:
        return False
