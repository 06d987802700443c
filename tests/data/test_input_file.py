"""Files that are read: in pieces, from anywhere; change and damage are named or counted."""

from __future__ import annotations

import os
import random
import re
from pathlib import Path

import pytest

from p2p_llm_forge.data import sources
from p2p_llm_forge.data.input_file import InputFile
from p2p_llm_forge.data.parts import ReadOptions, Span
from p2p_llm_forge.data.readers import read_pieces
from p2p_llm_forge.errors import ForgeError
from tests.texts import compress

LINES = b"".join(b"%d %s\n" % (n, b"x" * (n % 37)) for n in range(2_000)) + b"no end"


def input_file(path, start: int = 0, end: int | None = None, **options) -> InputFile:
    end = path.stat().st_size if end is None else end
    return InputFile(Span(str(path), start, end), ReadOptions(**options))


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
@pytest.mark.parametrize("piece_bytes", [1, 700, 1 << 20])
def test_pieces_end_after_the_pattern_and_are_the_whole_text(tmp_path, suffix, piece_bytes):
    path = compress(tmp_path / f"a.txt{suffix}", LINES)
    found = list(input_file(path, piece_bytes=piece_bytes).pieces(re.compile(b"\n")))
    assert b"".join(text for text, _ in found) == LINES
    *cut, _ = (text for text, _ in found)
    assert all(text.endswith(b"\n") and len(text) >= piece_bytes for text in cut)
    assert bool(cut) == (piece_bytes < len(LINES))
    assert sum(size for _, size in found) == path.stat().st_size


def test_without_a_pattern_there_is_one_piece(tmp_path):
    path = compress(tmp_path / "a.txt.gz", LINES)
    [(text, size)] = input_file(path, piece_bytes=100).pieces(None)
    assert text == LINES and size == path.stat().st_size


@pytest.mark.parametrize("suffix", [".gz", ".zst"])
def test_what_is_cut_off_is_named_or_counted(tmp_path, suffix):
    path = compress(tmp_path / f"a.txt{suffix}", random.Random(0).randbytes(5_000))
    path.write_bytes(path.read_bytes()[:-100])
    with (
        pytest.raises(ForgeError, match=f"a.txt{suffix} is damaged or truncated"),
        input_file(path).decompressed() as (stream, _),
    ):
        stream.read()
    cut = input_file(path, piece_bytes=100, skip_bad_rows=True)
    list(cut.pieces(None))
    assert cut.take_skipped() == 1


@pytest.mark.parametrize("suffix", ["", ".gz", ".zst"])
def test_a_seekable_file_is_read_from_anywhere(tmp_path, suffix):
    path = compress(tmp_path / f"a.parquet{suffix}", LINES)
    with input_file(path).seekable() as file:
        file.seek(-6, 2)
        assert file.read() == b"no end"
        file.seek(0)
        assert file.read(2) == LINES[:2]


@pytest.mark.parametrize("change", ["longer", "shorter", "later"])
def test_a_file_that_changes_while_it_is_read_is_named(tmp_path, change):
    path = tmp_path / "a.txt"
    path.write_text("some text")
    [part] = sources.find([str(path)], ReadOptions()).parts
    if change == "later":
        os.utime(path, (1, 1))
    else:
        path.write_text("some text"[: 4 if change == "shorter" else None] * 2)
    with pytest.raises(ForgeError, match="a.txt changed while it was read"):
        list(read_pieces(part, ReadOptions()))


def test_a_range_is_read_without_a_byte_order_mark_and_never_in_part(tmp_path):
    path = tmp_path / "a.txt"
    path.write_bytes(b"\xef\xbb\xbfone two")
    size = path.stat().st_size
    assert input_file(path).read() == b"one two"
    assert input_file(path, 7).read() == b"two"
    with pytest.raises(ForgeError, match="a.txt changed while it was read"):
        input_file(path, 7, size + 1).read()
    with pytest.raises(ForgeError, match="none.txt cannot be read: No such file"):
        input_file(tmp_path / "none.txt", 0, 1).read()


def test_bad_rows_are_refused_or_counted():
    with pytest.raises(ForgeError) as error:
        input_file(Path("a.csv"), 0, 0).skip("a.csv, row 3 is bad", "write it again")
    [problem] = error.value.problems
    assert problem.found == "a.csv, row 3 is bad"
    assert problem.fix == "write it again, or use --skip-bad-rows to leave it out"
    file = input_file(Path("a.csv"), 0, 0, skip_bad_rows=True)
    file.skip("row 3")
    file.skip_damaged(OSError("cut\noff"), rows=4)
    assert [file.take_skipped(), file.take_skipped()] == [5, 0]
