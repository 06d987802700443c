"""Tables: CSV, parquet and datasets of Hugging Face give their rows; what is wrong is named."""

from __future__ import annotations

import random

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from p2p_llm_forge.data import sources
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.readers import read_pieces
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


def test_a_folder_saved_by_datasets_is_read(tmp_path):
    dataset = datasets.Dataset.from_dict({"text": TEXTS}).select([4, 0, 2])
    dataset.save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "saved", piece_bytes=100) == [TEXTS[n].encode() for n in (4, 0, 2)]
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    assert documents(tmp_path / "splits") == documents(tmp_path / "saved", piece_bytes=100)
    with pytest.raises(ForgeError, match="(?s)no split 'dev': found train.*--dataset-split"):
        documents(tmp_path / "splits", dataset_split="dev")


def test_a_dataset_of_the_hub_is_streamed(monkeypatch):
    asked = []

    def load_dataset(name, config, split, streaming):
        asked.append((name, config, split, streaming))
        return datasets.Dataset.from_dict({"text": TEXTS}).to_iterable_dataset()

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    assert documents("someone/corpus", dataset_config="en") == [t.encode() for t in TEXTS]
    assert asked == [("someone/corpus", "en", "train", True)]


@pytest.mark.parametrize("suffix", ["jsonl", "parquet"])
def test_a_dataset_is_streamed_by_the_library_itself(tmp_path, monkeypatch, suffix):
    """Without a network: `load_dataset` takes a name that is a folder here for a dataset's name."""
    monkeypatch.chdir(tmp_path)
    asked = ReadOptions(
        dataset_config="en", dataset_split="test", text_column="body", piece_bytes=2_000
    )
    parts = sources.find(["someone/corpus"], asked).parts  # the folder is not there yet
    assert [part.kind for part in parts] == ["hub"]
    folder = tmp_path / "someone" / "corpus"
    texts = [f"{n} {text}" for n in range(3) for text in TEXTS]
    for config in ("en", "tr"):
        (folder / config).mkdir(parents=True)
        for split in ("train", "test"):
            for half in (0, 1):
                rows = [f"{config} {split} {text}" for text in texts[half::2]]
                write_rows(folder / config / f"{split}-{half}.{suffix}", rows, "body")
    card = "".join(
        f"- config_name: {config}\n  data_files:\n"
        + "".join(
            f"  - split: {split}\n    path: {config}/{split}-*.{suffix}\n"
            for split in ("train", "test")
        )
        for config in ("en", "tr")
    )
    (folder / "README.md").write_text(f"---\nconfigs:\n{card}---\n")
    found = list(read_pieces(parts[0], asked))
    assert len(found) > 1 and [piece.is_last for piece in found].count(True) == 1
    expected = [f"en test {text}".encode() for half in (0, 1) for text in texts[half::2]]
    assert [d for piece in found for d in piece.column.to_pylist()] == expected
    with pytest.raises(ForgeError, match="(?s)no text column 'text': found n, body.*--text-column"):
        list(read_pieces(parts[0], ReadOptions(dataset_config="en")))
    with pytest.raises(ForgeError, match="someone/corpus: no such file, and no dataset.*dev"):
        list(read_pieces(parts[0], ReadOptions(dataset_config="en", dataset_split="dev")))


def test_a_hub_name_out_of_reach_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ForgeError, match="nobody/nothing: no such file, and no dataset"):
        documents("nobody/nothing")


BAD = ["fine", b"caf\xe9", None, "still fine", b"\xff\xfe", "ğ"]


def not_utf8(kind) -> pa.Array:
    """A column that says it holds strings, and holds other bytes, as other writers make."""
    values = pa.array([one.encode() if isinstance(one, str) else one for one in BAD], pa.binary())
    strings = pa.Array.from_buffers(pa.string(), len(values), values.buffers())
    if kind == "dictionary":
        found = pa.array([0, 1, None, 3, 4, 5], pa.int32())
        return pa.DictionaryArray.from_arrays(found, strings.fill_null(""))
    if kind == "large_string":
        values = values.cast(pa.large_binary())
        return pa.Array.from_buffers(pa.large_string(), len(values), values.buffers())
    return strings


@pytest.mark.parametrize("kind", ["string", "large_string", "dictionary"])
@pytest.mark.parametrize("how", ["parquet", "nested", "joined", "saved"])
def test_strings_that_are_not_utf8_are_refused_replaced_or_left_out(tmp_path, kind, how):
    column, options = not_utf8(kind), {}
    table = pa.table({"text": column})
    if how == "nested":
        table = pa.table({"meta": pa.StructArray.from_arrays([column], ["text"])})
        options = {"text_column": "meta.text"}
    if how == "joined":
        table = pa.table({"text": column, "title": pa.array([None] * len(BAD), column.type)})
        options = {"text_column": "title,text"}
    path = tmp_path / ("a" if how == "saved" else "a.parquet")
    if how == "saved":
        datasets.Dataset(table).save_to_disk(path)
    else:
        pq.write_table(table, path)
    good = [b"fine", b"still fine", "ğ".encode()]
    with pytest.raises(ForgeError, match="(?s)a(.parquet)?, row [23].*--skip-bad-rows"):
        documents(path, **options)
    found = pieces(path, skip_bad_rows=True, **options)
    assert [d for piece in found for d in piece.column.to_pylist()] == good
    assert sum(piece.skipped for piece in found) == 3
    found = documents(path, encoding_errors="replace", skip_bad_rows=True, **options)
    replaced = [one.decode(errors="replace") if isinstance(one, bytes) else one for one in BAD]
    assert found == [one.encode() for one in replaced if one is not None]


def test_the_row_that_is_not_utf8_is_named(tmp_path):
    column = pa.concat_arrays([pa.array(["a"] * 5_000), not_utf8("string").slice(3)])
    pq.write_table(pa.table({"text": column}), tmp_path / "a.parquet", row_group_size=1_000)
    with pytest.raises(ForgeError, match="(?s)a.parquet, row 5002 is not UTF-8.*replace, or use"):
        documents(tmp_path / "a.parquet")


def test_rows_that_are_too_long_are_named_or_counted(tmp_path, monkeypatch):
    from p2p_llm_forge.data import table_files

    monkeypatch.setattr(table_files, "LONGEST_DOCUMENT", 1_000)
    texts = ["a", "b" * 1_001, "c" * 1_000, *"defghijk"]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet")
    with pytest.raises(ForgeError, match="row 2 has more than 0 MiB of text"):
        documents(tmp_path / "a.parquet")
    kept = [text.encode() for text in texts if text[0] != "b"]
    assert documents(tmp_path / "a.parquet", skip_bad_rows=True) == kept
    pq.write_table(pa.table({"text": [n * 1_500 for n in "abc"]}), tmp_path / "a.parquet")
    with pytest.raises(ForgeError, match="(?s)row group 1 has 0 MiB a row, more than.*skip-bad"):
        documents(tmp_path / "a.parquet")
    assert sum(p.skipped for p in pieces(tmp_path / "a.parquet", skip_bad_rows=True)) == 3
