"""CSV: quotes, lines in fields and every delimiter are what Python's csv module makes of them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.errors import ForgeError
from tests.data import stranger
from tests.data.reading import documents, pieces

COMPRESS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
FIELDS = [
    "plain",
    'a "quote"',
    "two\nlines",
    "two\r\n\r\nlines",
    "a,b;c\td|e",
    '"',
    "Straße, ağ; 模型",
    " x ",
]


def write(path: Path, rows: list[list[str]], between: str, **how) -> Path:
    out = io.StringIO()
    csv.writer(out, delimiter=between, **how).writerows(rows)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(out.getvalue().encode()))
    return path


@pytest.mark.parametrize("compression", COMPRESS)
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("between", [",", ";", "\t", "|"])
def test_what_divides_fields_is_found(tmp_path, between, quoting, compression):
    rows = [[str(n), text, f"note {n}"] for n, text in enumerate(FIELDS)]
    path = tmp_path / f"rows.csv{compression}"
    write(path, [["id", "text", "notes, or; more"], *rows], between, quoting=quoting)
    assert stranger.texts(str(path), ["text"], between) == FIELDS
    for piece_bytes in (1000, 1 << 20):
        found = documents(path, piece_bytes=piece_bytes)
        assert [document.decode() for document in found] == FIELDS


@pytest.mark.parametrize("compression", COMPRESS)
def test_tsv_is_divided_by_tabs(tmp_path, compression):
    rows = [["a,b;c|text", "text", "d"], *([str(n), text, ""] for n, text in enumerate(FIELDS))]
    path = write(tmp_path / f"rows.tsv{compression}", rows, "\t")
    assert stranger.texts(str(path), ["text"]) == FIELDS
    assert [document.decode() for document in documents(path)] == FIELDS


def test_what_is_asked_divides_fields_whatever_the_first_row_shows(tmp_path):
    path = write(tmp_path / "rows.csv", [["id", "text"], ["1", "one,1"], ["2", "two"]], "~")
    assert documents(path, csv_delimiter="~") == [b"one,1", b"two"]
    path.write_text("text,x;y\none,1;2\n")
    assert documents(path) == [b"one"]
    assert documents(path, csv_delimiter=";", text_column="text,x") == [b"one,1"]
    with pytest.raises(ForgeError, match="(?s)'text': found text,x, y .divided by a semicolon"):
        documents(path, csv_delimiter=";")


def test_several_columns_are_joined_and_empty_fields_left_out(tmp_path):
    rows = [["title", "n", "body"], ["T", "1", "B"], ["", "2", "only"], ["Top", "3", ""]]
    path = write(tmp_path / "rows.csv", [*rows, ["", "4", ""]], ";")
    expected = stranger.texts(str(path), ["title", "body"], ";")
    assert expected == ["T\n\nB", "only", "Top", ""]
    assert documents(path, text_column="title,body") == [text.encode() for text in expected[:3]]
    assert documents(path, text_column="body,title")[0] == b"B\n\nT"


def test_a_column_that_is_not_there_is_answered_by_what_is(tmp_path):
    for between, words in ((",", "a comma"), (";", "a semicolon"), ("|", "a bar")):
        path = write(tmp_path / "rows.csv", [["id", "body", "title"], ["1", "x", "y"]], between)
        with pytest.raises(ForgeError) as error:
            documents(path)
        assert f"no text column 'text': found id, body, title (divided by {words})" in str(
            error.value
        )
        with pytest.raises(ForgeError, match="no text column 'titel': found id, body, title"):
            documents(path, text_column="body,titel")


def test_a_row_with_a_delimiter_too_many_is_named_or_counted(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_text("id;text\n1;one\n2;two; and more\n3;three\n")
    with pytest.raises(ForgeError, match="(?s)Expected 2 columns, got 3.*quotes.*a semicolon"):
        documents(path)
    assert documents(path, skip_bad_rows=True) == [b"one", b"three"]


def test_a_header_of_one_column_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "rows.csv"
    path.write_bytes(b'\xef\xbb\xbftext\r\n"one; 1"\r\ntwo | 2\r\n')
    assert documents(path) == [b"one; 1", b"two | 2"]
    path.write_bytes(b'\xef\xbb\xbf"n";"text"\r\n1;"one"\r\n')
    assert documents(path) == [b"one"]


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(*[st.text('ab,;\t|"\n é', max_size=8)] * 2), min_size=1, max_size=20),
    between=st.sampled_from([",", ";", "\t", "|"]),
    piece_bytes=st.sampled_from([100, 1 << 20]),
)
def test_whatever_fields_hold_they_are_what_csv_reads(tmp_path_factory, rows, between, piece_bytes):
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    write(path, [["text", "other"], *map(list, rows)], between, quoting=csv.QUOTE_ALL)
    expected = stranger.texts(str(path), ["text"], between)
    assert len(expected) == len(rows)
    found = pieces(path, piece_bytes=piece_bytes)
    assert [d.decode() for p in found for d in p.column.to_pylist()] == list(filter(None, expected))
