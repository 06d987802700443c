"""JSON: lines and arrays give their rows back; what is wrong is named with its line or row."""

from __future__ import annotations

import json

import pytest

from p2p_llm_forge.errors import ForgeError
from tests.data.reading import documents, pieces
from tests.texts import TEXTS, compress, write_rows


def test_json_lines_may_also_be_called_json(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", TEXTS).rename(tmp_path / "rows.json")
    assert documents(path) == [text.encode() for text in TEXTS]


def test_lone_surrogates_are_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude80"}\n')
    assert documents(path) == ["a \ufffd b".encode(), "🚀".encode()]


def test_a_bad_line_far_into_the_file_is_named_by_its_number(tmp_path):
    for name in ("a.jsonl", "a.jsonl.gz"):
        lines = [json.dumps({"text": f"row {n}"}) for n in range(100)]
        lines[76] = "{"
        path = compress(tmp_path / name, "\n".join(lines).encode())
        with pytest.raises(ForgeError, match=f"{name}, line 77 is not JSON"):
            documents(path, piece_bytes=50)


def test_a_compressed_array_damaged_at_its_start_is_counted(tmp_path):
    path = write_rows(tmp_path / "a.json.gz", TEXTS)
    path.write_bytes(path.read_bytes()[:20] + b"\x55" * 20)
    with pytest.raises(ForgeError, match="(?s)a.json.gz is damaged.*--skip-bad-rows"):
        documents(path)
    assert sum(piece.skipped for piece in pieces(path, skip_bad_rows=True)) == 1


def test_values_of_an_array_longer_than_what_is_read_at_once_stay_whole(tmp_path):
    texts = ["a" * 3_000_000, "b", "ü" * 1_500_000, "c"]
    path = write_rows(tmp_path / "a.json", texts)
    assert documents(path) == [text.encode() for text in texts]
