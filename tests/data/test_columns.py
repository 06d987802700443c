"""Columns: nested and several ones give what a stranger's reader of the same files finds."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import random
from pathlib import Path

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.data import columns
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data import stranger
from tests.data.preparations import config
from tests.data.reading import documents, pieces
from tests.texts import decoded_documents

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ROWS = [
    {
        "id": n,
        "title": None if n % 5 == 0 else f"Başlık {n}",
        "meta": {"text": f'metin {n}, "alıntı"\nsatır', "source": {"name": f"kaynak {n % 3}"}},
    }
    for n in range(40)
]


def write(path: Path, rows: list[dict]) -> Path:
    plain, compression = path, ""
    if path.suffix in COMPRESS:
        plain, compression = path.with_suffix(""), path.suffix
    if plain.suffix == ".parquet":
        out = pa.BufferOutputStream()
        pq.write_table(pa.Table.from_pylist(rows), out, row_group_size=7)
        content = out.getvalue().to_pybytes()
    elif plain.suffix == ".json":
        content = json.dumps(rows, ensure_ascii=False).encode()
    else:
        content = "".join(json.dumps(row) + "\n" for row in rows).encode()
    path.write_bytes(COMPRESS[compression](content))
    return path


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
@pytest.mark.parametrize(
    "names", [["meta.text"], ["meta.source.name"], ["title", "meta.text"], ["meta.text", "title"]]
)
def test_nested_and_several_columns_are_what_a_stranger_reads(tmp_path, suffix, compression, names):
    path = write(tmp_path / f"rows{suffix}{compression}", ROWS)
    expected = stranger.texts(str(path), names)
    assert len(expected) == 40 and all(expected)
    for piece_bytes in (300, 1 << 20):
        found = documents(path, text_column=",".join(names), piece_bytes=piece_bytes)
        assert [document.decode() for document in found] == expected


def test_a_saved_dataset_has_nested_columns_too(tmp_path):
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "saved")
    path = write(tmp_path / "rows.jsonl", ROWS)
    found = documents(tmp_path / "saved", text_column="title,meta.text")
    assert [d.decode() for d in found] == stranger.texts(str(path), ["title", "meta.text"])
    with pytest.raises(ForgeError, match="no text column 'meta.body': found id, title, meta.text"):
        documents(tmp_path / "saved", text_column="meta.body")


def test_a_streamed_dataset_has_nested_columns_too(monkeypatch):
    rows = datasets.Dataset.from_list(ROWS).to_iterable_dataset()
    monkeypatch.setattr(datasets, "load_dataset", lambda *_, **__: rows)
    found = documents("someone/corpus", text_column="meta.text")
    assert found == [row["meta"]["text"].encode() for row in ROWS]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_a_column_of_that_very_name_wins(tmp_path, suffix):
    rows = [
        {"meta.text": f"literal {n}", "meta": {"text": "inside"}, "a,b": f"both {n}", "a": "x"}
        for n in range(4)
    ]
    path = write(tmp_path / f"rows{suffix}", rows)
    assert documents(path, text_column="meta.text") == [f"literal {n}".encode() for n in range(4)]
    assert documents(path, text_column="a,b") == [f"both {n}".encode() for n in range(4)]


def test_names_with_dots_on_the_way_are_found(tmp_path):
    rows = [{"a.b": {"c.d": "one", "c": {"e": "two"}}}, {"a": {"b": {"c.d": "three"}}}]
    path = write(tmp_path / "rows.jsonl", rows)
    assert documents(path, text_column="a.b.c.d") == [b"one", b"three"]
    assert documents(write(path, rows[:1]), text_column="a.b.c.e") == [b"two"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json"])
def test_parts_that_are_null_missing_or_empty_are_left_out(tmp_path, suffix):
    rows = [
        {"title": "t", "body": "b"},
        {"title": None, "body": "b"},
        {"body": "b"},
        {"title": "", "body": "b"},
        {"title": "t", "body": None},
    ]
    path = write(tmp_path / f"rows{suffix}", rows)
    assert documents(path, text_column="title,body") == [b"t\n\nb", b"b", b"b", b"b", b"t"]
    for nothing, found in (({"title": None}, "'title,body' is null"), ({"x": 1}, "found x")):
        write(path, [*rows, nothing])
        with pytest.raises(ForgeError, match=f"(?s) 6(:| has no).*{found}.*--skip-bad-rows"):
            documents(path, text_column="title,body")
        kept = pieces(path, text_column="title,body", skip_bad_rows=True)
        assert sum(piece.skipped for piece in kept) == 1
        assert sum(len(piece.column) for piece in kept) == 5


def test_a_table_whose_parts_are_all_null_has_a_bad_row(tmp_path):
    rows = [{"title": "t", "body": None}, {"title": None, "body": None}]
    path = write(tmp_path / "rows.parquet", [*rows, {"title": "", "body": "b"}])
    with pytest.raises(ForgeError, match="row 2: 'title,body' is null"):
        documents(path, text_column="title,body")
    assert documents(path, text_column="title,body", skip_bad_rows=True) == [b"t", b"b"]


@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".parquet"])
def test_what_is_not_there_is_answered_by_what_is(tmp_path, suffix):
    path = write(tmp_path / f"rows{suffix}", ROWS)
    for asked in ("meta.body", "text", "id.text"):
        with pytest.raises(ForgeError, match=f"no text column '{asked}': found id, title, meta.te"):
            documents(path, text_column=asked)
    with pytest.raises(ForgeError, match=r"'meta(.source)?'.* expected (a string|strings)"):
        documents(path, text_column="meta.source")
    with pytest.raises(ForgeError, match="'id'.* expected (a string|strings)"):
        documents(path, text_column="title,id")


def test_a_table_must_have_each_of_several_columns(tmp_path):
    path = write(tmp_path / "rows.parquet", ROWS)
    with pytest.raises(ForgeError, match="no text column 'titel': found id, title"):
        documents(path, text_column="titel,meta.text")


KEYS = st.sampled_from(["a", "b", "a.b", "b.a", "a.a.b"])
VALUES = st.recursive(
    st.sampled_from(["x", "", None]),
    lambda inside: st.dictionaries(KEYS, inside, max_size=3),
    max_leaves=5,
)


@settings(deadline=None)
@given(st.lists(st.dictionaries(KEYS, VALUES, max_size=3), min_size=1, max_size=4))
def test_pyarrow_and_a_row_at_a_time_find_the_same(tmp_path_factory, rows):
    path = write(tmp_path_factory.mktemp("rows") / "rows.jsonl", rows)
    for asked in ("a.b", "a.a.b", "a,b", "a.b,b"):
        expected, bad = [], 0
        for row in rows:
            try:
                expected.append(columns.text_in(row, asked).encode())
            except columns.NoTextError:
                bad += 1
        found = pieces(path, text_column=asked, skip_bad_rows=True)
        assert [d for p in found for d in p.column.to_pylist()] == [d for d in expected if d]
        assert sum(piece.skipped for piece in found) == bad


def test_thousands_of_columns_and_dots_are_no_burden(tmp_path):
    path = write(tmp_path / "wide.jsonl", [{f"column{n}": "x" for n in range(3000)}])
    name = "a" + ".a" * 2000
    with pytest.raises(ForgeError, match="column29 and 2970 more") as error:
        documents(path, text_column=name)
    assert len(str(error.value)) < 5000
    deep: dict = {"end": random.Random(1).random()}
    for _ in range(400):
        deep = {"in": deep}
    with pytest.raises(ForgeError, match="no text column 'text': found in.in.in.in"):
        documents(write(path, [deep]))


def test_nested_columns_are_prepared_and_one_that_is_never_there_is_named(tmp_path, capsys):
    path = write(tmp_path / "rows.jsonl.xz", ROWS)
    out = tmp_path / "out"
    asked = {"text_column": "titel,meta.text", "validation_fraction": 0, "vocab_size": 300}
    manifest = prepare(config(path, out, sequence_length=8, **asked))
    printed = capsys.readouterr().out
    assert f"no row at the beginning of {path} has the column 'titel'" in printed
    assert "'meta.text'" not in printed and "1 file, 40 documents, one in each row" in printed
    expected = stranger.texts(str(path), ["meta.text"])
    found = decoded_documents(out, "train")
    assert found[:-1] == expected[: len(found) - 1] and len(found) >= 38
    assert manifest.arguments["text_column"] == "titel,meta.text"
