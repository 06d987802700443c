"""Datasets of Hugging Face: saved folders and names of the Hub give their rows."""

from __future__ import annotations

import datasets
import pytest

from p2p_llm_forge.data import sources
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.readers import read_pieces
from p2p_llm_forge.errors import ForgeError
from tests.data.reading import documents
from tests.texts import TEXTS, write_rows


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
