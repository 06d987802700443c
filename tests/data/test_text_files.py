"""Text files: documents lie between separators, whatever the cuts; bad bytes are named."""

from __future__ import annotations

import re

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.data import text_files
from p2p_llm_forge.data.input_file import InputFile
from p2p_llm_forge.data.parts import ReadOptions, Span
from p2p_llm_forge.errors import ForgeError
from tests.data.reading import documents, pieces
from tests.texts import compress


def split(raw: bytes, separator: str = "\n\n") -> list[bytes]:
    file = InputFile(Span("text", 0, len(raw)), ReadOptions(separator))
    return text_files.text_column(raw, file, 0).to_pylist()


def test_blank_lines_end_documents_whatever_the_line_ends():
    text = (
        b"\n\none\nstill one\n\ntwo\r\nstill two\r\n\r\n\r\nthree\n \nstill three\n\n\n\n\nfour\r\n"
    )
    assert split(text) == [
        b"one\nstill one",
        b"two\r\nstill two",
        b"three\n \nstill three",
        b"four",
    ]


def test_another_separator_is_taken_literally():
    assert split(b"a\n\n--b\n----", "--") == [b"a\n\n", b"b\n"]


@given(st.text(alphabet="ab \n\r-é", max_size=60))
def test_splitting_loses_nothing_but_separators(text):
    raw = text.encode()
    blank_lines = split(raw)
    assert b"".join(blank_lines).replace(b"\n", b"").replace(b"\r", b"") == raw.replace(
        b"\n", b""
    ).replace(b"\r", b"")
    assert all(
        document and not re.search(rb"\n\r?\n", document) and document.strip(b"\r\n") == document
        for document in blank_lines
    )
    assert b"".join(split(raw, "-é")) == raw.replace("-é".encode(), b"")


@given(st.text(alphabet="ab\n\r", max_size=40))
def test_blank_lines_divide_as_the_pattern_says(text):
    expected = re.split(rb"\n\r?\n[\r\n]*", text.encode())
    assert split(text.encode()) == [d for piece in expected if (d := piece.strip(b"\r\n"))]


@settings(deadline=None)
@given(
    text=st.text(alphabet="ab\n\r-é", max_size=200),
    piece_bytes=st.integers(1, 50),
    separator=st.sampled_from(["\n\n", "-a", "é"]),
    suffix=st.sampled_from(["", ".gz", ".zst", ".bz2", ".xz"]),
)
def test_pieces_cut_a_file_only_between_documents(
    tmp_path_factory, text, piece_bytes, separator, suffix
):
    path = tmp_path_factory.mktemp("pieces") / f"text.txt{suffix}"
    compress(path, text.encode())
    found = documents(path, separator=separator, piece_bytes=piece_bytes)
    assert found == split(text.encode(), separator)


def test_a_document_longer_than_pieces_and_windows_stays_whole(tmp_path):
    long = b"word " * 100_000
    for name in ("text.txt", "text.txt.gz"):
        path = compress(tmp_path / name, b"first\n\n" + long + b"\n\nlast")
        found = [piece.column.to_pylist() for piece in pieces(path, piece_bytes=1_000)]
        assert found[0] == [b"first", long] and found[-1] == [b"last"]


def test_bytes_that_are_not_utf8_are_named_with_their_place_in_the_file(tmp_path):
    for name in ("text.txt", "text.txt.gz"):
        path = compress(tmp_path / name, b"fine\n\nnot \xff fine")
        with pytest.raises(ForgeError, match="(?s)0xff at offset 10.*--encoding-errors replace"):
            documents(path, piece_bytes=3)
        replaced = documents(path, encoding_errors="replace", piece_bytes=3)
        assert replaced == [b"fine", "not \ufffd fine".encode()]
        assert documents(path, skip_bad_rows=True, piece_bytes=3) == [b"fine"]
        found = pieces(path, skip_bad_rows=True, piece_bytes=3)
        assert sum(piece.skipped for piece in found) == 1


def test_a_byte_order_mark_is_no_text_and_does_not_shift_offsets(tmp_path):
    for name in ("text.txt", "text.txt.zst"):
        path = compress(tmp_path / name, b"\xef\xbb\xbfcaf\xc3\xa9")
        assert documents(path) == ["café".encode()]
        compress(path, b"\xef\xbb\xbfcaf\xe9.")
        with pytest.raises(ForgeError, match="offset 6"):
            documents(path)
