"""Columns of documents: their text and borders are seen without a copy, wherever they begin."""

from __future__ import annotations

import pytest

from p2p_llm_forge.data import columns

DOCUMENTS = [b"one", b"", "ağ".encode(), b"", b"last"]


def spans(column) -> list[bytes]:
    text, ends = columns.values_and_offsets(column)
    return [text[ends[n] : ends[n + 1]].tobytes() for n in range(len(column))]


@pytest.mark.parametrize("start", range(6))
def test_text_and_borders_give_every_slice_of_a_column_back(start):
    column = columns.column_of(DOCUMENTS)[start:]
    text, ends = columns.values_and_offsets(column)
    assert spans(column) == DOCUMENTS[start:]
    assert ends[0] == 0 and ends[-1] == len(text)


def test_text_and_borders_are_views_of_the_column():
    column = columns.column_of(DOCUMENTS)
    text, _ = columns.values_and_offsets(column)
    *_, values = column.buffers()
    assert text.ctypes.data == values.address


def test_documents_of_no_bytes_are_left_out():
    column = columns.without_empty(columns.column_of(DOCUMENTS))
    assert column.to_pylist() == [b"one", "ağ".encode(), b"last"] == spans(column)
    assert len(columns.without_empty(columns.column_of([]))) == 0


def test_half_a_character_is_not_utf8():
    assert columns.is_utf8("ağ".encode()) and not columns.is_utf8("ağ".encode()[:-1])
