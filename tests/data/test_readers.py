"""Readers: every format gives its documents back, whatever the cuts; what is wrong is named."""

from __future__ import annotations

import csv
import io
import random
from unittest import mock

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2p_llm_forge.data import readers, sources
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.readers import read_pieces
from p2p_llm_forge.errors import ForgeError
from tests.data.reading import documents, pieces
from tests.texts import TEXTS, compress, write_rows


@pytest.mark.parametrize("compression", ["", ".gz", ".zst", ".bz2", ".xz"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".tsv", ".parquet"])
@pytest.mark.parametrize("piece_bytes", [10, 1 << 20])
def test_every_format_gives_its_rows_back(tmp_path, suffix, compression, piece_bytes):
    piece_bytes = max(piece_bytes, 4000 if suffix in (".csv", ".tsv") else 0)
    # A .tsv has no quotes, and so no line ends in a field: those of IANA text/tab-separated-values.
    texts = [" ".join(text.split()) for text in TEXTS] if suffix == ".tsv" else TEXTS
    path = write_rows(tmp_path / f"rows{suffix}{compression}", texts, "body")
    found = pieces(path, text_column="body", piece_bytes=piece_bytes)
    assert [d for piece in found for d in piece.column.to_pylist()] == [t.encode() for t in texts]
    parts = sources.find([str(path)], ReadOptions(piece_bytes=piece_bytes)).parts
    assert [piece.is_last for piece in found].count(True) == len(parts)
    if piece_bytes < 4000:
        assert len(found) > 1


def bad_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"text": "cut o')
    return path, "a.jsonl, line 6 is not JSON", 1


def missing_column(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"body": "other"}\n')
    return path, "a.jsonl, line 6 has no text column 'text': found body\n.*--text-column", 1


def not_a_string(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text('{"text": 5}\n' + path.read_text() + '{"text": null}\n')
    return path, "a.jsonl, line 1: 'text' is int, expected a string", 2


def not_an_object(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text("[1]\n" + path.read_text())
    return path, "a.jsonl, line 1 holds a list", 1


def not_utf8(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9"}\n')
    return path, "a.jsonl, line 6 is not UTF-8: .*--encoding-errors replace", 1


def null_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None]}), path)
    return path, "a.parquet, row 6: 'text' is null", 1


def ragged_csv(tmp_path):
    path = write_rows(tmp_path / "a.csv", TEXTS)
    path.write_text(path.read_text() + "1,2,3\n")
    return path, "a.csv: CSV parse error: .*Expected 2 columns, got 3: 1,2,3", 1


def two_values_in_a_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"text": "a"}{"text": "b"}\n')
    return path, "a.jsonl, line 6 is not JSON: Extra data", 1


def not_utf8_in_csv(tmp_path):
    path = tmp_path / "a.csv"
    rows = io.StringIO()
    csv.writer(rows).writerows([text] for text in TEXTS)
    path.write_bytes(b"text\ncaf\xe9\n" + rows.getvalue().encode())
    return path, "a.csv, row 2 .the header is row 1. is not UTF-8\n.*--encoding-errors replace", 1


def text_after_an_array(tmp_path):
    path = write_rows(tmp_path / "a.json", TEXTS)
    path.write_text(path.read_text() + '[{"text": "lost"}]')
    return path, "a.json continues after the end of its JSON array, after row 5", 1


def cut_array(tmp_path):
    path = write_rows(tmp_path / "a.json", TEXTS)
    path.write_text(path.read_text().rstrip("]\n") + ", {")
    return path, "a.json is not a whole JSON array", 1


@pytest.mark.parametrize(
    "damage",
    [
        bad_line, missing_column, not_a_string, not_an_object, not_utf8, null_in_parquet,
        ragged_csv, cut_array, two_values_in_a_line, not_utf8_in_csv, text_after_an_array,
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_counted(tmp_path, damage):
    path, message, bad_rows = damage(tmp_path)
    with pytest.raises(ForgeError, match="(?s)" + message + ".*--skip-bad-rows"):
        documents(path)
    found = pieces(path, skip_bad_rows=True)
    assert [d for piece in found for d in piece.column.to_pylist()] == [t.encode() for t in TEXTS]
    assert sum(piece.skipped for piece in found) == bad_rows


@pytest.mark.parametrize(
    "name",
    [
        "a.txt.gz",
        "a.jsonl.zst",
        "a.csv.gz",
        "a.parquet",
        "a.json.gz",
        "a.txt.xz",
        "a.jsonl.bz2",
        "a.tsv.xz",
        "a.parquet.xz",
    ],
)
def test_a_truncated_file_is_named_or_counted(tmp_path, name):
    path = write_rows(tmp_path / name, [random.Random(n).randbytes(200).hex() for n in range(50)])
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ForgeError, match=f"(?s){name}.*--skip-bad-rows"):
        documents(path)
    assert sources.find([str(path)], ReadOptions(skip_bad_rows=True)).unreadable or sum(
        piece.skipped for piece in pieces(path, skip_bad_rows=True)
    )


def test_bytes_that_are_not_utf8_are_refused_or_replaced_in_rows_too(tmp_path):
    for name, raw in (
        ("a.json", b'[{"text": "fine"}, {"text": "caf\xe9"}]'),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n'),
        ("a.csv", b"text\nfine\ncaf\xe9\n"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ForgeError, match=f"{name}.*(UTF-8|utf-8)"):
            documents(tmp_path / name)
        found = documents(tmp_path / name, encoding_errors="replace")
        assert found == [b"fine", "caf\ufffd".encode()]


def test_a_file_that_changes_between_first_and_last_read_is_named(tmp_path):
    path = compress(tmp_path / "a.txt.gz", b"one\n\ntwo")
    [part] = sources.find([str(path)], ReadOptions()).parts
    right = readers._columns

    def change_it(*arguments):
        yield from right(*arguments)
        compress(path, b"other text")

    with mock.patch.object(readers, "_columns", change_it), pytest.raises(ForgeError, match="chan"):
        list(read_pieces(part, ReadOptions()))
