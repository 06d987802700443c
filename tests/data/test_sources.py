"""Sources: every format gives its documents back, whatever the cuts; what is wrong is named."""

from __future__ import annotations

import csv
import io
import json
import os
import random
import re
from pathlib import Path
from unittest import mock

import datasets
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.data import sources
from p2p_llm_forge.data.sources import ReadOptions
from p2p_llm_forge.errors import ForgeError
from tests.texts import TEXTS, compress, write_rows


def split(raw: bytes, separator: str = "\n\n") -> list[bytes]:
    return sources.text_column(raw, "text", 0, ReadOptions(separator)).to_pylist()


def documents(path: Path, **reading) -> list[bytes]:
    """All documents of a file, piece after piece."""
    return [d for piece in pieces(path, **reading) for d in piece.column.to_pylist()]


def pieces(path: Path, **reading) -> list[sources.Piece]:
    asked = ReadOptions(**reading)
    parts = sources.find([str(path)], asked).parts
    return [piece for part in parts for piece in sources.read_pieces(part, asked)]


# --- documents ------------------------------------------------------------------------------------


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
    suffix=st.sampled_from(["", ".gz", ".zst"]),
)
def test_pieces_cut_a_file_only_between_documents(
    tmp_path_factory, text, piece_bytes, separator, suffix
):
    path = tmp_path_factory.mktemp("pieces") / f"text.txt{suffix}"
    compress(path, text.encode())
    with mock.patch.object(sources, "PIECE_BYTES", piece_bytes):
        assert documents(path, separator=separator) == split(text.encode(), separator)


def test_a_document_longer_than_pieces_and_windows_stays_whole(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 1_000)
    long = b"word " * 100_000
    for name in ("text.txt", "text.txt.gz"):
        path = compress(tmp_path / name, b"first\n\n" + long + b"\n\nlast")
        found = [piece.column.to_pylist() for piece in pieces(path)]
        assert found[0] == [b"first", long] and found[-1] == [b"last"]


def test_bytes_that_are_not_utf8_are_named_with_their_place_in_the_file(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 3)
    for name in ("text.txt", "text.txt.gz"):
        path = compress(tmp_path / name, b"fine\n\nnot \xff fine")
        with pytest.raises(ForgeError, match="0xff at offset 10.*--encoding-errors replace"):
            documents(path)
        replaced = documents(path, encoding_errors="replace")
        assert replaced == [b"fine", "not \ufffd fine".encode()]
        assert documents(path, skip_bad_rows=True) == [b"fine"]
        assert sum(piece.skipped for piece in pieces(path, skip_bad_rows=True)) == 1


def test_a_byte_order_mark_is_no_text_and_does_not_shift_offsets(tmp_path):
    for name in ("text.txt", "text.txt.zst"):
        path = compress(tmp_path / name, b"\xef\xbb\xbfcaf\xc3\xa9")
        assert documents(path) == ["café".encode()]
        compress(path, b"\xef\xbb\xbfcaf\xe9.")
        with pytest.raises(ForgeError, match="offset 6"):
            documents(path)


def test_many_small_files_are_few_parts_and_each_document_its_own(tmp_path):
    for number in range(50):
        (tmp_path / f"{number:02d}.txt").write_text(f"document {number}\n\nand more")
    assert len(sources.find([str(tmp_path)], ReadOptions()).parts) == 1
    found = documents(tmp_path)
    assert found[:3] == [b"document 0", b"and more", b"document 1"] and len(found) == 100
    whole = documents(tmp_path, one_document_per_file=True)
    assert whole[7] == b"document 7\n\nand more" and len(whole) == 50


# --- rows -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("compression", ["", ".gz", ".zst"])
@pytest.mark.parametrize("suffix", [".jsonl", ".json", ".csv", ".parquet"])
@pytest.mark.parametrize("piece_bytes", [10, 1 << 20])
def test_every_format_gives_its_rows_back(tmp_path, monkeypatch, suffix, compression, piece_bytes):
    monkeypatch.setattr(sources, "PIECE_BYTES", max(piece_bytes, 4000 if suffix == ".csv" else 0))
    path = write_rows(tmp_path / f"rows{suffix}{compression}", TEXTS, "body")
    found = pieces(path, text_column="body")
    assert [d for piece in found for d in piece.column.to_pylist()] == [t.encode() for t in TEXTS]
    parts = sources.find([str(path)], ReadOptions()).parts
    assert [piece.is_last for piece in found].count(True) == len(parts)
    if piece_bytes == 10 and suffix != ".csv":
        assert len(found) > 1


def test_json_lines_may_also_be_called_json(tmp_path):
    path = write_rows(tmp_path / "rows.jsonl", TEXTS).rename(tmp_path / "rows.json")
    assert documents(path) == [text.encode() for text in TEXTS]


def test_lone_surrogates_are_replaced(tmp_path):
    path = tmp_path / "rows.jsonl"
    path.write_text('{"text": "a \\ud83d b"}\n{"text": "\\ud83d\\ude80"}\n')
    assert documents(path) == ["a \ufffd b".encode(), "🚀".encode()]


def test_a_folder_saved_by_datasets_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 100)
    dataset = datasets.Dataset.from_dict({"text": TEXTS}).select([4, 0, 2])
    dataset.save_to_disk(tmp_path / "saved")
    assert documents(tmp_path / "saved") == [TEXTS[n].encode() for n in (4, 0, 2)]
    datasets.DatasetDict({"train": dataset}).save_to_disk(tmp_path / "splits")
    assert documents(tmp_path / "splits") == documents(tmp_path / "saved")
    with pytest.raises(ForgeError, match="no split 'dev': found train.*--dataset-split"):
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
    monkeypatch.setattr(sources, "PIECE_BYTES", 2_000)
    asked = ReadOptions(dataset_config="en", dataset_split="test", text_column="body")
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
    found = list(sources.read_pieces(parts[0], asked))
    assert len(found) > 1 and [piece.is_last for piece in found].count(True) == 1
    expected = [f"en test {text}".encode() for half in (0, 1) for text in texts[half::2]]
    assert [d for piece in found for d in piece.column.to_pylist()] == expected
    with pytest.raises(ForgeError, match="no text column 'text': found n, body.*--text-column"):
        list(sources.read_pieces(parts[0], ReadOptions(dataset_config="en")))
    with pytest.raises(ForgeError, match="someone/corpus: no such file, and no dataset.*dev"):
        list(sources.read_pieces(parts[0], ReadOptions(dataset_config="en", dataset_split="dev")))


def test_a_hub_name_out_of_reach_is_a_clear_error(monkeypatch):
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    with pytest.raises(ForgeError, match="nobody/nothing: no such file, and no dataset"):
        documents("nobody/nothing")


def test_globs_and_folders_are_read_in_the_order_of_names(tmp_path):
    (tmp_path / "b").mkdir()
    for name in ("b/one.md", "two.md", "a.md", "data.bin"):
        (tmp_path / name).write_text(name)
    assert documents(tmp_path / "**/*.md") == [b"a.md", b"b/one.md", b"two.md"]
    with pytest.raises(ForgeError, match="without text.*glob"):
        documents(tmp_path)
    with pytest.raises(ForgeError, match="no file matches"):
        documents(tmp_path / "*.rst")


# --- what is wrong is named -----------------------------------------------------------------------


def bad_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"text": "cut o')
    return path, "a.jsonl, line 6 is not JSON", 1


def missing_column(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"body": "other"}\n')
    return path, "a.jsonl, line 6 has no text column 'text' .--text-column.: found body", 1


def not_a_string(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text('{"text": 5}\n' + path.read_text() + '{"text": null}\n')
    return path, "a.jsonl, line 1: 'text' is int, expected a string", 2


def not_an_object(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text("[1]\n" + path.read_text())
    return path, "a.jsonl, line 1 holds a list", 1


def not_utf8(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_bytes(path.read_bytes() + b'{"text": "caf\xe9"}\n')
    return path, "a.jsonl, line 6 is not JSON: 'utf-8' codec", 1


def null_in_parquet(tmp_path):
    path = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": [*TEXTS, None]}), path)
    return path, "a.parquet, row 6: 'text' is null", 1


def ragged_csv(tmp_path):
    path = write_rows(tmp_path / "a.csv", TEXTS)
    path.write_text(path.read_text() + "1,2,3\n")
    return path, "a.csv: CSV parse error: .*Expected 2 columns, got 3: 1,2,3", 1


def two_values_in_a_line(tmp_path):
    path = write_rows(tmp_path / "a.jsonl", TEXTS)
    path.write_text(path.read_text() + '{"text": "a"}{"text": "b"}\n')
    return path, "a.jsonl, line 6 is not JSON: Extra data", 1


def not_utf8_in_csv(tmp_path):
    path = tmp_path / "a.csv"
    rows = io.StringIO()
    csv.writer(rows).writerows([text] for text in TEXTS)
    path.write_bytes(b"text\ncaf\xe9\n" + rows.getvalue().encode())
    return path, "a.csv, row 2 .the header is row 1. is not UTF-8", 1


def text_after_an_array(tmp_path):
    path = write_rows(tmp_path / "a.json", TEXTS)
    path.write_text(path.read_text() + '[{"text": "lost"}]')
    return path, "a.json goes on after the end of its JSON array, after row 5", 1


def cut_array(tmp_path):
    path = write_rows(tmp_path / "a.json", TEXTS)
    path.write_text(path.read_text().rstrip("]\n") + ", {")
    return path, "a.json is not a whole JSON array", 1


@pytest.mark.parametrize(
    "damage",
    [
        bad_line, missing_column, not_a_string, not_an_object, not_utf8, null_in_parquet,
        ragged_csv, cut_array, two_values_in_a_line, not_utf8_in_csv, text_after_an_array,
    ],
)  # fmt: skip
def test_a_bad_row_is_named_or_counted(tmp_path, damage):
    path, told, bad_rows = damage(tmp_path)
    with pytest.raises(ForgeError, match=told + ".*--skip-bad-rows"):
        documents(path)
    found = pieces(path, skip_bad_rows=True)
    assert [d for piece in found for d in piece.column.to_pylist()] == [t.encode() for t in TEXTS]
    assert sum(piece.skipped for piece in found) == bad_rows


def test_a_bad_line_far_into_the_file_is_named_by_its_number(tmp_path, monkeypatch):
    monkeypatch.setattr(sources, "PIECE_BYTES", 50)
    for name in ("a.jsonl", "a.jsonl.gz"):
        lines = [json.dumps({"text": f"row {n}"}) for n in range(100)]
        lines[76] = "{"
        path = compress(tmp_path / name, "\n".join(lines).encode())
        with pytest.raises(ForgeError, match=f"{name}, line 77 is not JSON"):
            documents(path)


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


@pytest.mark.parametrize("name", ["a.txt.gz", "a.jsonl.zst", "a.csv.gz", "a.parquet", "a.json.gz"])
def test_a_truncated_file_is_named_or_counted(tmp_path, name):
    path = write_rows(tmp_path / name, [random.Random(n).randbytes(200).hex() for n in range(50)])
    path.write_bytes(path.read_bytes()[:-300])
    with pytest.raises(ForgeError, match=f"{name}.*--skip-bad-rows"):
        documents(path)
    assert sources.find([str(path)], ReadOptions(skip_bad_rows=True)).unreadable or sum(
        piece.skipped for piece in pieces(path, skip_bad_rows=True)
    )


@pytest.mark.parametrize("suffix", ["", ".gz"])
def test_a_damaged_row_group_costs_just_the_rows_that_it_holds(tmp_path, suffix):
    texts = [random.Random(n).randbytes(500).hex() for n in range(300)]
    stream = pa.BufferOutputStream()
    pq.write_table(pa.table({"text": texts}), stream, row_group_size=100, use_dictionary=False)
    content = bytearray(stream.getvalue().to_pybytes())
    group = pq.ParquetFile(pa.BufferReader(bytes(content))).metadata.row_group(1).column(0)
    content[group.data_page_offset : group.data_page_offset + 50] = b"\xff" * 50
    path = compress(tmp_path / f"a.parquet{suffix}", bytes(content))
    with pytest.raises(ForgeError, match="a.parquet.* is damaged.*--skip-bad-rows"):
        documents(path)
    found = pieces(path, skip_bad_rows=True)
    kept = [d.decode() for piece in found for d in piece.column.to_pylist()]
    assert kept == texts[:100] + texts[200:]
    assert sum(piece.skipped for piece in found) == 100


def test_a_compressed_array_damaged_at_its_start_is_counted(tmp_path):
    path = write_rows(tmp_path / "a.json.gz", TEXTS)
    path.write_bytes(path.read_bytes()[:20] + b"\x55" * 20)
    with pytest.raises(ForgeError, match="a.json.gz is damaged.*--skip-bad-rows"):
        documents(path)
    assert sum(piece.skipped for piece in pieces(path, skip_bad_rows=True)) == 1


def test_bytes_that_are_not_utf8_are_refused_or_replaced_in_rows_too(tmp_path):
    for name, raw in (
        ("a.json", b'[{"text": "fine"}, {"text": "caf\xe9"}]'),
        ("a.jsonl", b'{"text": "fine"}\n{"text": "caf\xe9"}\n'),
        ("a.csv", b"text\nfine\ncaf\xe9\n"),
    ):
        (tmp_path / name).write_bytes(raw)
        with pytest.raises(ForgeError, match=f"{name}.*(UTF-8|utf-8)"):
            documents(tmp_path / name)
        found = documents(tmp_path / name, encoding_errors="replace")
        assert found == [b"fine", "caf\ufffd".encode()]


def test_values_of_an_array_longer_than_what_is_read_at_once_stay_whole(tmp_path):
    texts = ["a" * 3_000_000, "b", "ü" * 1_500_000, "c"]
    path = write_rows(tmp_path / "a.json", texts)
    assert documents(path) == [text.encode() for text in texts]


def test_an_empty_compressed_table_holds_no_rows_and_long_csv_rows_are_told(tmp_path, monkeypatch):
    assert documents(compress(tmp_path / "empty.csv.gz", b"")) == []
    monkeypatch.setattr(sources, "PIECE_BYTES", 1 << 20)
    path = write_rows(tmp_path / "a.csv", ["a" * 3_000_000])
    with pytest.raises(ForgeError, match="a.csv: a row is longer than 1 MiB.*jsonl"):
        documents(path)


def test_an_unreadable_file_in_a_glob_is_named_or_counted(tmp_path):
    (tmp_path / "a.txt").write_text("fine")
    (tmp_path / "b.txt").write_text("closed")
    right = Path.open

    def refuse(path, *arguments, **names):
        if path.name == "b.txt":
            raise PermissionError(13, "Permission denied")
        return right(path, *arguments, **names)

    with mock.patch.object(Path, "open", refuse):
        with pytest.raises(ForgeError, match="b.txt cannot be read: Permission denied"):
            sources.find([str(tmp_path / "*.txt")], ReadOptions())
        found = sources.find([str(tmp_path / "*.txt")], ReadOptions(skip_bad_rows=True))
    assert found.unreadable == 1 and len(found.parts) == 1


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
        list(sources.read_pieces(part, ReadOptions()))


def test_a_file_that_changes_between_first_and_last_read_is_named(tmp_path):
    path = compress(tmp_path / "a.txt.gz", b"one\n\ntwo")
    [part] = sources.find([str(path)], ReadOptions()).parts
    right = sources._columns

    def change_it(*arguments):
        yield from right(*arguments)
        compress(path, b"other text")

    with mock.patch.object(sources, "_columns", change_it), pytest.raises(ForgeError, match="chan"):
        list(sources.read_pieces(part, ReadOptions()))


# --- mixtures -------------------------------------------------------------------------------------


def test_weights_are_read_from_the_paths(tmp_path):
    for name in ("a.txt", "b.txt", "odd:0.5"):
        (tmp_path / name).write_text("text")
    found = sources.find([f"{tmp_path}/a.txt:3", f"{tmp_path}/b.txt:1.0"], ReadOptions())
    assert found.weights == (0.75, 0.25)
    assert [part.source for part in found.parts] == [0, 1]
    assert sources.find([f"{tmp_path}/odd:0.5"], ReadOptions()).weights == ()
    with pytest.raises(ForgeError, match="b.txt has no weight and others have"):
        sources.find([f"{tmp_path}/a.txt:3", f"{tmp_path}/b.txt"], ReadOptions())
    with pytest.raises(ForgeError, match="above 0"):
        sources.find([f"{tmp_path}/a.txt:0", f"{tmp_path}/b.txt:1"], ReadOptions())
