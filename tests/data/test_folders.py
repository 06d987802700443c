"""Folders: each is read once, whatever the links; datasets and hidden folders are left out."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import datasets
import pytest

from p2p_llm_forge.data import folders, parts, sources, tokenizing
from p2p_llm_forge.data.describe import describe
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import config, interrupt
from tests.data.reading import documents
from tests.texts import compress, contents, some_text, write_rows


@pytest.fixture
def data(tmp_path):
    """A folder with text in three formats, which also lies open to what else is put there."""
    folder = tmp_path / "data"
    (folder / "more").mkdir(parents=True)
    (folder / "a.txt").write_bytes(some_text(200).encode())
    write_rows(folder / "more" / "b.json", some_text(50, seed=7).split("\n\n"))
    write_rows(folder / "manifest.json", ["a user's own file of that name " * 20])
    return folder


def documents_of(folder: Path) -> int:
    return sum(split["documents"] for split in read_manifest(folder)["splits"].values())


def read_manifest(folder: Path) -> dict:
    return json.loads((folder / "manifest.json").read_text())


@pytest.mark.parametrize("pattern", ["", "/**/*.*"])
def test_the_output_may_lie_inside_the_input(data, tmp_path, monkeypatch, pattern, capsys):
    """README's own layout: --dataset-path data --output-dir data/prepared/x."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(data, tmp_path / "apart")
    prepare(config(f"apart{pattern}", Path("out")))
    first = read_manifest(Path("out"))
    for name in ("x", "y", "x"):
        prepare(config(f"data{pattern}", Path("data/prepared") / name))
        found = read_manifest(Path("data/prepared") / name)
        assert found["content_fingerprint"] == first["content_fingerprint"]
    assert "is already prepared" in capsys.readouterr().out
    # Also one from where its folder has another name, through a link.
    os.symlink("data", "other_name")
    prepare(config(f"other_name{pattern}", Path("data/prepared/z")))
    assert documents_of(Path("data/prepared/z")) == documents_of(Path("out")) > 200
    prepare(config(f"data{pattern}", Path("data/prepared/x"), overwrite=True, sequence_length=16))
    assert documents_of(Path("data/prepared/x")) == documents_of(Path("out"))


def test_an_unfinished_dataset_below_the_input_is_no_text_and_is_resumed(
    data, monkeypatch, tmp_path
):
    monkeypatch.setattr(parts, "PIECE_BYTES", 3_000)
    prepare(config(data, tmp_path / "apart", num_workers=1))
    inside = data / "prepared" / "x"
    with monkeypatch.context() as killed:
        killed.setattr("p2p_llm_forge.data.prepare.publish", interrupt)
        with pytest.raises(KeyboardInterrupt):
            prepare(config(data, inside, num_workers=1))
    assert list((inside / "unfinished" / "pieces").glob("*.tokens"))
    assert list((inside / "unfinished").glob("tokenizer-*/tokenizer.json"))
    prepare(config(data, data / "prepared" / "y", num_workers=1))
    assert contents(data / "prepared" / "y") == contents(tmp_path / "apart")
    encoded = []
    right = tokenizing.Job.encode
    monkeypatch.setattr(
        tokenizing.Job, "encode", lambda job, task: (encoded.append(task), right(job, task))[1]
    )
    prepare(config(data, inside, num_workers=1))
    assert contents(inside) == contents(tmp_path / "apart") and not encoded


def test_a_folder_called_unfinished_is_text_unless_it_is_ours(tmp_path):
    for name in ("unfinished", "dataset-1"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "novel.txt").write_text(f"a novel in {name}")
    assert documents(tmp_path) == [b"a novel in dataset-1", b"a novel in unfinished"]


def test_hidden_folders_and_saved_datasets_are_left_out_and_named(tmp_path, tokenizer_folder):
    import datasets

    (tmp_path / "a.md").write_text("read")
    for hidden in (".ipynb_checkpoints", ".git/x"):
        (tmp_path / "b" / hidden).mkdir(parents=True)
        (tmp_path / "b" / hidden / "a-checkpoint.md").write_text("hidden")
    datasets.Dataset.from_dict({"text": ["saved"]}).save_to_disk(tmp_path / "saved")
    found = sources.find([str(tmp_path)], ReadOptions())
    assert [span.path for part in found.parts for span in part.spans] == [str(tmp_path / "a.md")]
    names = [str(path.relative_to(tmp_path)) for path in found.left_out_folders]
    assert names == ["b/.git", "b/.ipynb_checkpoints", "saved"]
    assert "b/.git" in folders.in_words(found.left_out_folders)
    # What is named is read.
    assert documents(tmp_path / "b" / ".ipynb_checkpoints") == [b"hidden"]
    assert documents(tmp_path / "saved") == [b"saved"]
    (tmp_path / "a.md").unlink()
    with pytest.raises(ForgeError, match="without text.*besides .*saved .folders of datasets"):
        documents(tmp_path)


@pytest.mark.parametrize("pattern", ["", "**/*.txt"])
def test_links_to_folders_are_followed_once_and_circles_end(tmp_path, pattern):
    inside, outside = tmp_path / "inside", tmp_path / "outside"
    for folder in (inside / "a", outside / "deep"):
        folder.mkdir(parents=True)
    (inside / "a" / "one.txt").write_text("one")
    (outside / "two.txt").write_text("two")
    (outside / "deep" / "three.txt").write_text("three")
    os.symlink(outside, inside / "link")
    os.symlink(outside, inside / "second_link")
    os.symlink(inside, inside / "a" / "round")
    os.symlink(inside, outside / "deep" / "back")
    os.symlink("nowhere", inside / "broken")
    assert sorted(documents(inside / pattern)) == [b"one", b"three", b"two"]


def test_paths_that_are_not_utf8_work_to_the_end(tmp_path, capsys):
    folder = tmp_path / os.fsdecode(b"caf\xe9")
    folder.mkdir()
    names = [b"a\xff.txt", b"b\xfe.parquet", b"c\xfd.txt.gz", b"d\xfc.json", b"e\xfb.csv"]
    paths = [folder / os.fsdecode(name) for name in names]
    texts = some_text(100).split("\n\n")
    paths[0].write_text(some_text(80))
    compress(paths[2], some_text(80, seed=4).encode())
    for path in (paths[1], paths[3], paths[4]):
        write_rows(path, texts)
    out = tmp_path / "out"
    for path in (folder, [str(path) for path in paths], folder / "*"):
        asked = {"dataset_path": path if isinstance(path, list) else [str(path)]}
        prepare(config(folder, out, overwrite=True, validation_path=[str(paths[0])], **asked))
        found = read_manifest(out)
        assert documents_of(out) > 400 and found["splits"]["validation"]["documents"] == 80
        assert found["arguments"]["validation_path"] == ["a\ufffd.txt"]
    prepare(config(folder, out, validation_path=[str(paths[0])], **asked))
    assert "already prepared" in capsys.readouterr().out
    assert "blocks of 32" in describe(out)
    paths[3].write_text("[")
    with pytest.raises(ForgeError, match="(?s)d\ufffd.json is not a whole JSON array"):
        prepare(config(folder, tmp_path / "other"))


def test_a_folder_of_save_to_disk_may_have_a_name_that_is_not_utf8(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    rows = [f"row {number}" for number in range(2_500)]
    datasets.Dataset.from_dict({"text": rows}).save_to_disk("saved", num_shards=2)
    name = os.fsdecode(b"caf\xe9")
    os.rename("saved", name)
    assert documents(Path(name)) == [row.encode() for row in rows]
