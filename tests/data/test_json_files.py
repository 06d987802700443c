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


OBJECTS = [{"text": "one\n\ntwo", "n": [1, {"x": "}"}]}, {"n": 2, "text": 'a "quoted" [ text'}]


@pytest.mark.parametrize("name", ["a.json", "a.jsonl", "a.json.gz", "a.jsonl.zst"])
def test_objects_over_several_lines_are_read(tmp_path, name):
    for indent in (1, 2, "\t"):
        text = "\n".join(json.dumps(row, indent=indent) for row in OBJECTS)
        path = compress(tmp_path / name, text.encode())
        assert documents(path) == [b"one\n\ntwo", b'a "quoted" [ text']
        path = compress(tmp_path / name, json.dumps(OBJECTS[0], indent=indent).encode() + b"\n")
        assert documents(path) == [b"one\n\ntwo"]
    long = {"many": ["x" * 99] * 20_000, "text": "after much else"}
    path = compress(tmp_path / name, json.dumps(long, indent=1).encode())
    assert documents(path) == [b"after much else"]
    path = compress(tmp_path / name, text.encode()[:-9])
    with pytest.raises(ForgeError, match=f"(?s){name} is not whole JSON: row 2.*--skip-bad-rows"):
        documents(path)
    found = pieces(path, skip_bad_rows=True)
    assert [d for piece in found for d in piece.column.to_pylist()] == [b"one\n\ntwo"]
    assert sum(piece.skipped for piece in found) == 1


@pytest.mark.parametrize("before", [b" " * 4_096, b"\xef\xbb\xbf" + b" \r\n\t" * 1_000_000])
@pytest.mark.parametrize("name", ["a.json", "a.json.gz"])
def test_an_array_may_begin_anywhere(tmp_path, name, before):
    path = compress(tmp_path / name, before + json.dumps(OBJECTS).encode())
    assert documents(path) == [b"one\n\ntwo", b'a "quoted" [ text']


@pytest.mark.parametrize("depth", [2_000, 1_000_000])
@pytest.mark.parametrize("name", ["a.json", "a.jsonl"])
def test_a_row_that_is_nested_too_deep_is_read_or_named(tmp_path, name, depth):
    deep = f'{{"text": "deep", "n": {"[" * depth}"]"{"]" * depth}}}'
    broken = f'{{"text": {"[" * depth}"]"{"]" * depth}}}'
    rows = ['{"text": "one"}', deep, broken, '{"text": "two"}', '{"text": 3}']
    text = "\n".join(rows) if name == "a.jsonl" else f"[{', '.join(rows)}]"
    (tmp_path / name).write_text(text)
    with pytest.raises(ForgeError, match="(?s)(row|line) [23] is nested too deep.*--skip-bad-rows"):
        documents(tmp_path / name)
    found = pieces(tmp_path / name, skip_bad_rows=True)
    kept = [d for piece in found for d in piece.column.to_pylist() if d != b"deep"]
    assert kept == [b"one", b"two"]
    assert 2 <= sum(piece.skipped for piece in found) <= 3


@pytest.mark.parametrize(
    "text", ["[" * 100_000, '{"a":' * 100_000, '[{"text": "a"}, ' + "[" * 9_999]
)
def test_nesting_without_an_end_is_one_message(tmp_path, text):
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(ForgeError, match="(?s)a.json.*nested too deep.*--skip-bad-rows"):
        documents(tmp_path / "a.json")
    assert sum(piece.skipped for piece in pieces(tmp_path / "a.json", skip_bad_rows=True)) == 1
