"""Compressed files: their text comes back in pieces; damage is named or counted."""

from __future__ import annotations

import random
import re

import pytest

from p2p_llm_forge.data.compression import decompressed_pieces, open_decompressed, open_seekable
from p2p_llm_forge.data.parts import BadRows, ReadOptions, Span
from p2p_llm_forge.errors import ForgeError
from tests.texts import compress

LINES = b"".join(b"%d %s\n" % (n, b"x" * (n % 37)) for n in range(2_000)) + b"no end"


def span_of(path) -> Span:
    return Span(str(path), 0, path.stat().st_size)


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("piece_bytes", [1, 700, 1 << 20])
def test_pieces_end_after_the_pattern_and_are_the_whole_text(tmp_path, suffix, piece_bytes):
    path = compress(tmp_path / f"a.txt{suffix}", LINES)
    bad_rows = BadRows(ReadOptions())
    found = list(decompressed_pieces(span_of(path), re.compile(b"\n"), piece_bytes, bad_rows))
    assert b"".join(text for text, _ in found) == LINES
    *cut, _ = (text for text, _ in found)
    assert all(text.endswith(b"\n") and len(text) >= piece_bytes for text in cut)
    assert bool(cut) == (piece_bytes < len(LINES))
    assert sum(size for _, size in found) == path.stat().st_size


def test_without_a_pattern_there_is_one_piece(tmp_path):
    path = compress(tmp_path / "a.txt.gz", LINES)
    [(text, size)] = decompressed_pieces(span_of(path), None, 100, BadRows(ReadOptions()))
    assert text == LINES and size == path.stat().st_size


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_cut_off_is_named_or_counted(tmp_path, suffix):
    path = compress(tmp_path / f"a.txt{suffix}", random.Random(0).randbytes(5_000))
    path.write_bytes(path.read_bytes()[:-100])
    with (
        pytest.raises(ForgeError, match=f"a.txt{suffix} is damaged or truncated"),
        open_decompressed(span_of(path), BadRows(ReadOptions())) as (stream, _),
    ):
        stream.read()
    bad_rows = BadRows(ReadOptions(skip_bad_rows=True))
    list(decompressed_pieces(span_of(path), None, 100, bad_rows))
    assert bad_rows.count == 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_seekable_file_is_read_from_anywhere(tmp_path, suffix):
    path = compress(tmp_path / f"a.parquet{suffix}", LINES)
    with open_seekable(span_of(path), BadRows(ReadOptions())) as file:
        file.seek(-6, 2)
        assert file.read() == b"no end"
        file.seek(0)
        assert file.read(2) == LINES[:2]
