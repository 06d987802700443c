"""CSV: quotes, lines in fields and every delimiter are what Python's csv module makes of them."""

from __future__ import annotations

import bz2
import csv
import gzip
import io
import lzma
from pathlib import Path
from unittest import mock

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.data import csv_files
from p2p_llm_forge.data.input_file import InputFile
from p2p_llm_forge.data.parts import ReadOptions, Span
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
def test_tsv_is_divided_by_tabs_and_quotes_mean_themselves(tmp_path, compression):
    """IANA text/tab-separated-values knows no quotes, and no tabs or line ends in fields."""
    texts = ['"Hello he said', "a,b;c|d", 'a "quoted" word', 'end"', '"', '"all"', '""', "é"]
    rows = [["a,b;c|text", "text", "d"], *([str(n), text, ""] for n, text in enumerate(texts))]
    path = tmp_path / f"rows.tsv{compression}"
    content = "".join("\t".join(row) + "\n" for row in rows)
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content.encode()))
    assert stranger.texts(str(path), ["text"]) == texts
    assert [document.decode() for document in documents(path)] == texts
    # With tabs in a .csv, and anything else in a .tsv, quotes are those of CSV.
    path = write(tmp_path / "rows.csv", [["id", "text"], ["1", "two\nlines"]], "\t")
    assert documents(path) == [b"two\nlines"]
    path = write(tmp_path / "rows.tsv", [["id", "text"], ["1", "two\nlines"]], ";")
    assert documents(path, csv_delimiter=";") == [b"two\nlines"]


def test_a_tsv_that_has_quotes_is_answered_by_what_to_do(tmp_path):
    path = write(tmp_path / "rows.tsv", [["id", "text"], ["1", "two\nlines"]], "\t")
    with pytest.raises(ForgeError, match="(?s)Expected 2 columns, got 1.*call it .csv"):
        documents(path)
    rows = [["id", "text"], ["1", "one"]]
    path = write(tmp_path / "rows.tsv", rows, "\t", quoting=csv.QUOTE_ALL)
    with pytest.raises(ForgeError, match='(?s)\'text\': found "id", "text".*call it .csv'):
        documents(path)
    assert documents(path.rename(tmp_path / "rows.csv")) == [b"one"]


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


def strict_rows(content: str) -> list[list[str]] | None:
    """The rows that Python's csv reads where every quote must be right, None if one is not."""
    try:
        return list(csv.reader(io.StringIO(content, newline=""), strict=True))
    except csv.Error:
        return None


@settings(deadline=None, max_examples=300)
@given(content=st.text('ab,"\n\r', max_size=30), read_bytes=st.sampled_from([1, 7, 1 << 18]))
def test_what_csv_refuses_is_refused_and_what_it_reads_is_read(
    tmp_path_factory, content, read_bytes
):
    content = f"text,other\nx,y\n{content}"
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_bytes(content.encode())
    expected = strict_rows(content)
    with mock.patch.object(csv_files, "ROWS_BYTES", read_bytes):
        if expected is None or any(len(row) not in (0, 2) for row in expected):
            with pytest.raises(ForgeError, match="a quote opens|Expected 2 columns"):
                documents(path)
            return
        assert documents(path) == [row[0].encode() for row in expected[1:] if row and row[0]]


STRAY = ['"open,2', '1,"open', '"Hello" he said,3', '"two ""quotes"", and,4', '1,"" ,']


@settings(deadline=None)
@given(
    rows=st.lists(st.tuples(st.text('ab,"\n é', max_size=8), st.booleans()), max_size=40),
    strays=st.dictionaries(st.integers(0, 40), st.sampled_from(STRAY), max_size=5),
    read_bytes=st.sampled_from([1, 7, 100, 1 << 18]),
)
def test_a_wrong_quote_costs_its_row_alone(tmp_path_factory, rows, strays, read_bytes):
    lines, written, expected = ['"text",other\n'], 0, []
    for n, (text, has_quotes) in enumerate([*rows, ("", False)]):
        if n in strays:
            assert strict_rows(strays[n]) is None
            lines.append(f"{strays[n]}\n")
            written += 1
        out = io.StringIO()
        how = csv.QUOTE_ALL if has_quotes else csv.QUOTE_MINIMAL
        # A field whose first letter is not that of a row or field shows a quote open before it.
        csv.writer(out, quoting=how).writerow([f"c{text}", f"d{text}"])
        lines.append(out.getvalue())
        expected.append(f"c{text}")
    path = tmp_path_factory.mktemp("rows") / "rows.csv"
    path.write_bytes("".join(lines).encode())
    with mock.patch.object(csv_files, "ROWS_BYTES", read_bytes):
        found = pieces(path, skip_bad_rows=True)
    assert [d.decode() for p in found for d in p.column.to_pylist()] == expected
    assert sum(piece.skipped for piece in found) == written


@pytest.mark.parametrize("compression", COMPRESS)
def test_an_open_quote_at_the_end_is_named_or_costs_its_row_alone(tmp_path, compression):
    path = tmp_path / f"rows.csv{compression}"
    content = b'text\nhello\n"two\nlines"\n"open\nmore\nlast\n'
    assert strict_rows(content.decode()) is None
    path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
    with pytest.raises(ForgeError, match='(?s)line 5: a quote opens .*: "open\n.*--skip-bad-rows'):
        documents(path)
    found = pieces(path, skip_bad_rows=True)
    kept = [document for piece in found for document in piece.column.to_pylist()]
    assert kept == [b"hello", b"two\nlines", b"more", b"last"]
    assert sum(piece.skipped for piece in found) == 1


@pytest.mark.parametrize("good_before", [0, 10])
def test_of_many_rows_after_an_open_quote_none_is_lost(tmp_path, good_before):
    path = tmp_path / "rows.csv"
    good = [f"row {n}" for n in range(200_000)]
    lines = [f"{text},1\n" for text in good]
    lines.insert(good_before, '"open,2\n')
    path.write_text("text,n\n" + "".join(lines))
    with pytest.raises(ForgeError, match=f'line {good_before + 2}: a quote opens .*: "open,2'):
        documents(path)
    found = pieces(path, skip_bad_rows=True)
    assert [d.decode() for p in found for d in p.column.to_pylist()] == good
    assert sum(piece.skipped for piece in found) == 1


@pytest.mark.parametrize("row", ["good,1\n", 'bare"quote,1\n', 'a "" b,""\n', "no line end"])
def test_the_work_for_an_open_quote_is_in_proportion_to_the_file(tmp_path, monkeypatch, row):
    """A file of many reads, of which each adds to a row that has begun."""
    monkeypatch.setattr(csv_files, "ROWS_BYTES", 100)
    monkeypatch.setattr(csv_files, "LONGEST_ROW", 50_000)
    content = ('"open,2\n' + row * (1_000_000 // len(row))).encode()
    file = InputFile(Span("rows.csv", 0, 0), ReadOptions(skip_bad_rows=True))
    rows = csv_files.WholeRows(io.BytesIO(content), file, ",", True)
    divide, work, longest = rows._divide, 0, 0

    def counted(is_end: bool) -> None:
        nonlocal work, longest
        work += len(rows._begun)
        longest = max(longest, len(rows._begun))
        divide(is_end)

    monkeypatch.setattr(rows, "_divide", counted)
    kept = sum(len(part) for part in iter(lambda: rows.read(1 << 16), b""))
    assert kept >= len(content) - len(b'"open,2\n')
    assert longest <= 1.1 * csv_files.LONGEST_ROW
    assert work < 5 * len(content)


@pytest.mark.parametrize("suffix", ["csv", "tsv", "csv.gz"])
def test_utf16_is_called_what_it_is(tmp_path, suffix):
    path = tmp_path / f"rows.{suffix}"
    for encoding, mark in (("utf-16-le", "FF FE"), ("utf-16-be", "FE FF")):
        content = "\ufefftext,n\nhello,1\n".encode(encoding)
        path.write_bytes(COMPRESS.get(path.suffix, bytes)(content))
        with pytest.raises(ForgeError, match=f"is not UTF-8: .*{mark}, as UTF-16.*\n.*convert it"):
            documents(path)
