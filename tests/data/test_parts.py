"""Parts: what they know of their files."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import parts, sources
from p2p_llm_forge.data.parts import BadRows, Part, ReadOptions, Span, read_span
from p2p_llm_forge.data.readers import read_pieces
from p2p_llm_forge.errors import ForgeError


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
    assert read_span(Span(str(path), 0, size)) == b"one two"
    assert read_span(Span(str(path), 7, size)) == b"two"
    with pytest.raises(ForgeError, match="a.txt changed while it was read"):
        read_span(Span(str(path), 7, size + 1))
    with pytest.raises(ForgeError, match="none.txt cannot be read: No such file"):
        read_span(Span(str(tmp_path / "none.txt"), 0, 1))


def test_a_preparation_decides_all_options(monkeypatch):
    monkeypatch.setattr(parts, "PIECE_BYTES", 5)
    asked = PrepareConfig(
        ["a.txt"], "out", document_separator="\\t", one_document_per_file=True, text_column="body",
        encoding_errors="replace", skip_bad_rows=True, dataset_config="en", dataset_split="test",
    )  # fmt: skip
    assert ReadOptions.of(asked) == ReadOptions(
        "\t", True, "body", "replace", True, "en", "test", 5
    )


@pytest.mark.parametrize(
    ("name", "format_", "compression"),
    [
        ("a.txt", "text", None),
        ("b/a.JSONL.GZ", "jsonl", "gzip"),
        ("a.ndjson.zst", "jsonl", "zstd"),
        ("a.parquet", "parquet", None),
        ("a.md", None, None),
        ("a.gz", None, "gzip"),
    ],
)
def test_a_name_shows_format_and_compression(name, format_, compression):
    assert parts.format_of(Path(name)) == format_
    assert parts.compression_of(name) == compression


def test_only_plain_text_and_lines_are_known_to_be_one_piece():
    kinds = {"text": "a.txt", "jsonl": "a.jsonl", "json": "a.json", "csv": "a.csv", "hub": "a/b"}
    one = {kind for kind, name in kinds.items() if Part(kind, (Span(name, 0, 9),)).is_one_piece}
    assert one == {"text", "jsonl"}
    assert not Part("text", (Span("a.txt.gz", 0, 9),)).is_one_piece
    assert Part("text", (Span("a", 0, 9, 9), Span("b", 5, 6, 1))).bytes == 10


def test_bad_rows_are_refused_or_counted():
    with pytest.raises(ForgeError) as error:
        BadRows(ReadOptions()).add("a.csv, row 3 is bad", "write it again")
    [problem] = error.value.problems
    assert problem.found == "a.csv, row 3 is bad"
    assert problem.fix == "write it again, or use --skip-bad-rows to leave it out"
    bad_rows = BadRows(ReadOptions(skip_bad_rows=True))
    bad_rows.add("row 3")
    bad_rows.add_damaged("a.csv", OSError("cut\noff"), rows=4)
    assert [bad_rows.take(), bad_rows.take()] == [5, 0]
