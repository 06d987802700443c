"""Formats: what the names of files show."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p_llm_forge.data import formats


@pytest.mark.parametrize(
    ("name", "format_", "compression"),
    [
        ("a.txt", "text", None),
        ("b/a.JSONL.GZ", "jsonl", "gzip"),
        ("a.ndjson.zst", "jsonl", "zstd"),
        ("a.csv.bz2", "csv", "bz2"),
        ("a.tsv.xz", "csv", "xz"),
        ("a.parquet", "parquet", None),
        ("a.md", "markdown", None),
        ("a.test.PY.gz", "code", "gzip"),
        ("a.png", None, None),
        ("a.gz", None, "gzip"),
    ],
)
def test_a_name_shows_format_and_compression(name, format_, compression):
    assert formats.format_of(Path(name)) == format_
    assert formats.compression_of(name) == compression


def test_no_ending_means_two_things():
    endings = (formats.SOURCE_CODE + formats.MARKDOWN).split()
    endings += [*formats.ROWS, *formats.COMPRESSIONS, *formats.NO_TEXT, ".txt"]
    assert len(endings) == len(set(endings)) > 100
    assert all(ending.startswith(".") and ending == ending.lower() for ending in endings)
