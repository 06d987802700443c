"""The Hub is asked once, for what looks like a name of it, while nothing here looks like that."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from p2p_llm_forge.data import hub, sources
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.errors import ForgeError
from tests import ROOT
from tests.data.strange_hub import strange_hub


def prepare(path: str, folder: Path, address: str) -> subprocess.CompletedProcess[str]:
    """The script, started in a folder, which reaches a Hub at an address."""
    environ = os.environ | {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": address, "NO_PROXY": "127.0.0.1"}
    command = [sys.executable, str(ROOT / "prepare_data.py"), "--dataset-path", path]
    return subprocess.run(
        [*command, "--output-dir", "out"],
        cwd=folder, env=environ, capture_output=True, text=True, timeout=300,
    )  # fmt: skip


@pytest.fixture
def asked(monkeypatch):
    """What a Hub that has `someone/corpus` and `plain` was asked, in this process."""
    from huggingface_hub import constants

    with strange_hub("someone/corpus", "plain") as (address, asked):
        monkeypatch.setattr(hub, "LONGEST_WAIT_S", 300.0)  # a busy machine answers late
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", address)
        monkeypatch.setenv("NO_PROXY", "127.0.0.1")
        yield asked


def found(path: str) -> list[tuple[str, str]]:
    parts = sources.find([path], ReadOptions()).parts
    return [(part.kind, part.spans[0].path) for part in parts]


@pytest.mark.slow
def test_a_mistyped_file_is_answered_without_the_hub(tmp_path):
    (tmp_path / "corpus.txt").write_text("text")
    with strange_hub(silent=True) as (address, asked):
        done = prepare("corpus.text", tmp_path, address)
    assert done.returncode == 2 and not asked
    assert "corpus.text: no such file or folder, and the Hub was not asked" in done.stderr
    assert "did you mean corpus.txt?" in done.stderr and "hf://datasets/" in done.stderr
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
def test_a_hub_that_does_not_answer_is_asked_once_and_not_waited_for(tmp_path):
    with strange_hub(silent=True) as (address, asked):
        done = prepare("someone/corpus", tmp_path, address)  # ends while the Hub is still silent
    assert done.returncode == 2 and len(asked) <= 1
    assert "someone/corpus: no such file, and no dataset of that name" in done.stderr
    assert "Traceback" not in done.stderr and not (tmp_path / "out").exists()


def test_what_the_hub_has_is_a_dataset_of_the_hub(asked, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for path, name in (
        ("someone/corpus", "someone/corpus"),
        ("plain", "plain"),
        ("hf://datasets/someone/corpus", "someone/corpus"),
    ):
        asked.clear()
        assert found(path) == [("hub", name)]
        assert [question.split("?")[0] for question in asked] == [f"/api/datasets/{name}"]
    assert sources.find(["plain:3", "someone/corpus:1"], ReadOptions()).weights == (0.75, 0.25)


@pytest.mark.parametrize("path", ["nobody/nothing", "nothing", "nobody/data-v1.5", "no_body/x.4"])
def test_what_is_neither_here_nor_there_is_asked_once_and_named(asked, tmp_path, monkeypatch, path):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ForgeError, match=f"(?s){path}: no such file, and no dataset.*404.*give a"):
        found(path)
    assert len(asked) == 1


@pytest.mark.parametrize(
    ("path", "alike"),
    [
        ("corpus", "corpus.txt"),
        ("corpus.text", "corpus.txt"),
        ("Corpus.txt", "corpus.txt"),
        ("corpsu.txt", "corpus.txt"),
        ("somefolder", "some_folder"),
        ("data/stories.json", "data/stories.jsonl"),
        ("data/story", ""),
        ("dat/stories.jsonl", "data/stories.jsonl"),
        ("./corpus", "corpus.txt"),
        ("plain.dat", ""),
        ("someone/corpus.tsx", ""),
        ("no/such/folder", ""),
        ("../nothing", ""),
        ("~/x", ""),
    ],
)
def test_what_is_or_looks_like_a_path_is_never_asked_for(asked, tmp_path, monkeypatch, path, alike):
    monkeypatch.chdir(tmp_path)
    for name in ("data", "some_folder"):
        (tmp_path / name).mkdir()
    for name in ("corpus.txt", "data/stories.jsonl", "unlike.bin"):
        (tmp_path / name).write_text("text")
    with pytest.raises(ForgeError) as error:
        found(path)
    assert f"--dataset-path {path}: " in str(error.value) and not asked
    assert (f"did you mean {alike}?" if alike else "fix: give a file") in str(error.value)


def test_the_absolute_path_of_a_near_miss_is_named(tmp_path):
    (tmp_path / "sub").mkdir()
    (tmp_path / "sub" / "notes.jsonl").write_text("")
    assert hub.near(str(tmp_path / "sub" / "notes.json")) == [str(tmp_path / "sub/notes.jsonl")]
    assert hub.near(str(tmp_path / "subs" / "notes.jsonl")) == [str(tmp_path / "sub/notes.jsonl")]
    assert hub.near(str(tmp_path / "elsewhere" / "x")) == []


def test_a_name_after_the_prefix_must_be_one(asked):
    with pytest.raises(ForgeError, match="no name of a dataset"):
        found("hf://datasets/a/b/c")
    assert not asked
