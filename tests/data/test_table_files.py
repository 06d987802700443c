"""CSV and parquet: a missing column, long rows and damaged row groups are named."""

from __future__ import annotations

import random

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2p_llm_forge.errors import ForgeError
from tests.data.reading import documents, pieces
from tests.texts import TEXTS, compress, write_rows


@pytest.mark.parametrize("suffix", [".csv", ".parquet"])
def test_a_table_without_the_column_is_refused(tmp_path, suffix):
    path = write_rows(tmp_path / f"rows{suffix}", TEXTS, "body")
    with pytest.raises(ForgeError, match=f"rows{suffix} has no text column 'text'"):
        documents(path)
    with pytest.raises(ForgeError, match="no text column|holds int64, expected strings|expected"):
        write_rows(path, TEXTS)
        if suffix == ".csv":
            documents(path, text_column="number")
        documents(path, text_column="n")


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_row_group_costs_just_the_rows_that_it_holds(tmp_path, suffix):
    texts = [random.Random(n).randbytes(500).hex() for n in range(300)]
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), stream, row_group_size=100, use_dictionary=False)
    content = bytearray(stream.getvalue().to_pybytes())
    group = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(1).column(0)
    content[group.data_page_offset : group.data_page_offset + 50] = b"\xff" * 50
    path = compress(tmp_path / f"a.parquet{suffix}", bytes(content))
    with pytest.raises(ForgeError, match="(?s)a.parquet.* is damaged.*--skip-bad-rows"):
        documents(path)
    found = pieces(path, skip_bad_rows=True)
    kept = [d.decode() for piece in found for d in piece.column.to_pylist()]
    assert kept == texts[:100] + texts[200:]
    assert sum(piece.skipped for piece in found) == 100


def test_an_empty_compressed_table_holds_no_rows_and_long_csv_rows_are_named(tmp_path):
    assert documents(compress(tmp_path / "empty.csv.gz", b"")) == []
    path = write_rows(tmp_path / "a.csv", ["a" * 3_000_000])
    with pytest.raises(ForgeError, match="(?s)a.csv: a row is longer than 1 MiB.*jsonl"):
        documents(path, piece_bytes=1 << 20)
