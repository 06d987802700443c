"""Parts: the options of reading, and columns of documents, whose text is seen without a copy."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import parts
from p2p_llm_forge.data.parts import Part, ReadOptions, Span

DOCUMENTS = [b"one", b"", "ağ".encode(), b"", b"last"]


def test_a_preparation_decides_all_options(monkeypatch):
    monkeypatch.setattr(parts, "PIECE_BYTES", 5)
    asked = PrepareConfig(
        ["a.txt"], "out", document_separator="\\t", one_document_per_file=True, text_column="body",
        encoding_errors="replace", skip_bad_rows=True, dataset_config="en", dataset_split="test",
        csv_delimiter="\\t",
    )  # fmt: skip
    assert ReadOptions.of(asked) == ReadOptions(
        "\t", True, False, "body", "\t", "replace", True, "en", "test", 5
    )
    assert ReadOptions.of(PrepareConfig(["a.txt"], "out")) == ReadOptions(piece_bytes=5)


def test_only_plain_text_and_lines_are_known_to_be_one_piece():
    kinds = {"text": "a.txt", "jsonl": "a.jsonl", "json": "a.json", "csv": "a.csv", "hub": "a/b"}
    one = {kind for kind, name in kinds.items() if Part(kind, (Span(name, 0, 9),)).is_one_piece}
    assert one == {"text", "jsonl"}
    assert not Part("text", (Span("a.txt.gz", 0, 9),)).is_one_piece
    assert Part("text", (Span("a", 0, 9, 9), Span("b", 5, 6, 1))).bytes == 10


def spans(column) -> list[bytes]:
    text, ends = parts.values_and_offsets(column)
    return [text[ends[n] : ends[n + 1]].tobytes() for n in range(len(column))]


@pytest.mark.parametrize("start", range(6))
def test_text_and_borders_give_every_slice_of_a_column_back(start):
    column = parts.column_of(DOCUMENTS)[start:]
    text, ends = parts.values_and_offsets(column)
    assert spans(column) == DOCUMENTS[start:]
    assert ends[0] == 0 and ends[-1] == len(text)


def test_text_and_borders_are_views_of_the_column():
    column = parts.column_of(DOCUMENTS)
    text, _ = parts.values_and_offsets(column)
    *_, values = column.buffers()
    assert text.ctypes.data == values.address


def test_documents_of_no_bytes_are_left_out():
    column = parts.without_empty(parts.column_of(DOCUMENTS))
    assert column.to_pylist() == [b"one", "ağ".encode(), b"last"] == spans(column)
    assert len(parts.without_empty(parts.column_of([]))) == 0


def test_half_a_character_is_not_utf8():
    assert parts.is_utf8("ağ".encode()) and not parts.is_utf8("ağ".encode()[:-1])
