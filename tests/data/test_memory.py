"""Small files that hold very long texts: bounded memory, and a message or the text."""

from __future__ import annotations

import gzip
import json
import os
import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2p_llm_forge.memory import own_memory, return_memory
from tests.data.preparations import ROOT


def read_apart(path: Path, **options) -> list:
    command = [sys.executable, "-m", "tests.data.peak_memory", str(path), json.dumps(options)]
    done = subprocess.run(command, cwd=ROOT, stdout=subprocess.PIPE, check=True)
    return json.loads(done.stdout)


@pytest.mark.slow
@pytest.mark.parametrize(("name", "members"), [("a.txt.gz", 96), ("a.jsonl.gz", 20)])
def test_a_line_of_3_gb_in_a_small_file_takes_bounded_memory(tmp_path, name, members):
    row = (lambda text: json.dumps({"text": text})) if "json" in name else str
    texts = [f"{row('before')}\n\n".encode(), b"x" * (32 << 20)]
    texts += [f"\n\n{row('after')}\n\n{row('last')}".encode()]
    before, long, after = (gzip.compress(text) for text in texts)
    (tmp_path / name).write_bytes(before + long * members + after)
    assert os.path.getsize(tmp_path / name) < 4_000_000
    *_, message, peak = read_apart(tmp_path / name)
    assert f"{name} holds a document or line of more than 256 MiB" in message
    assert "--skip-bad-rows" in message and peak < 1_000_000_000
    if members > 20:
        return  # the same, in more time
    documents, _, skipped, message, peak = read_apart(tmp_path / name, skip_bad_rows=True)
    assert (documents, skipped, message) == (3, 1, "") and peak < 1_000_000_000


@pytest.mark.slow
@pytest.mark.parametrize("skip", [False, True])
def test_a_value_of_700_mb_in_a_small_array_takes_bounded_memory(tmp_path, skip):
    path = tmp_path / "a.json.gz"
    before, long, after = (
        gzip.compress(text) for text in (b'[{"text": "a"}, {"text": "', b"x" * (32 << 20), b'"}]')
    )
    path.write_bytes(before + long * 22 + after)
    assert os.path.getsize(path) < 1_000_000
    documents, _, skipped, message, peak = read_apart(path, skip_bad_rows=skip)
    assert peak < 1_000_000_000
    assert (documents, skipped) == ((1, 1) if skip else (0, 0))
    assert bool(message) != skip and (skip or "row 2: it is longer than 256 MiB" in message)


@pytest.mark.slow
def test_a_text_that_many_rows_repeat_takes_bounded_memory(tmp_path):
    """4 GB of text in a file of some kilobytes."""
    text, rows = "x" * (4 << 20), 1_000
    column = pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([text]))
    for name, table in (
        ("flat", pa.table({"text": column})),
        ("nested", pa.table({"meta": pa.StructArray.from_arrays([column], ["text"])})),
    ):
        path = tmp_path / f"{name}.parquet"
        pq.write_table(table, path, compression="zstd", dictionary_pagesize_limit=1 << 30)
        assert os.path.getsize(path) < 10_000
        asked = "text" if name == "flat" else "meta.text"
        documents, size, _, message, peak = read_apart(path, text_column=asked)
        assert (documents, message) == (rows, "") and size >= rows * len(text)
        assert peak < 600_000_000


def test_memory_that_is_taken_is_counted_and_given_back():
    return_memory()  # or what tests before this one have freed is taken first
    before = own_memory()
    taken = [b"x" * (4000 + n % 9) for n in range(1 << 14)]
    assert own_memory() - before > 48 << 20
    del taken
    return_memory()
    assert own_memory() - before < 32 << 20
