"""Which files of a model travel, where they lie, and that one that comes is whole or not there."""

from __future__ import annotations

import json
import os
from pathlib import Path

import pytest

from p2p_llm_forge.model import stored
from p2p_llm_forge.model.stored import Landing, Stored, find, is_path, may_travel, names_in
from p2p_llm_forge.peers.partial_files import with_parts
from tests.killed_steps import killed_at

COMMIT = "0123456789abcdef0123456789abcdef01234567"


def written(folder: Path, *names: str) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name in names:
        (folder / name).write_text("{}")
    return folder


@pytest.mark.parametrize(
    "name, is_one",
    [
        ("./a", True),
        ("/a", True),
        ("~/a", True),
        ("a/b/c", True),
        ("a b", True),
        ("a", False),
        ("a/b", False),
    ],
)
def test_what_can_be_nothing_but_a_folder(name, is_one):
    assert is_path(name) == is_one


@pytest.mark.parametrize(
    "name, travels",
    [
        ("config.json", True),
        ("model-00001-of-00002.safetensors", True),
        ("spiece.model", True),
        ("source.spm", True),
        ("pytorch_model.bin", False),
        ("pytorch_model.bin.index.json", False),
        ("weights.pkl", False),
        ("modeling.py", False),
        ("../x.json", False),
        ("a/b.json", False),
        ("", False),
    ],
)
def test_which_files_may_travel(name, travels):
    assert may_travel(name) == travels
    assert may_travel("modeling.py", with_code=True)


def test_the_weights_of_an_index_travel_and_those_beside_it_do_not(tmp_path):
    folder = written(tmp_path / "model", "config.json", "a.safetensors", "b.safetensors")
    index = {"weight_map": {"x": "a.safetensors", "y": "b.safetensors"}}
    (folder / stored.INDEX).write_text(json.dumps(index))
    written(folder, "consolidated.safetensors", "trainer_state.json", "tokenizer.json")
    names = ["a.safetensors", "b.safetensors", "config.json"]
    assert names_in(folder) == [*names, stored.INDEX, "tokenizer.json"]
    assert find(str(folder)).kind == "folder"
    (folder / "b.safetensors").unlink()
    assert names_in(folder) == [] and find(str(folder)).kind == "other"
    for wrong in ('{"weight_map": {"x": "../../secret.safetensors"}}', "[]", "{"):
        (folder / stored.INDEX).write_text(wrong)
        assert names_in(folder) == [] and find(str(folder)).kind == "other"


def test_what_lies_under_a_name_is_told_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "hub_cache", lambda: tmp_path / "hub")
    monkeypatch.chdir(tmp_path)
    assert find("").kind == "nothing" and find("a/b").kind == "nothing"
    (tmp_path / "file").write_text("x")
    assert find("file").kind == "other" and find("./nothing").kind == "nothing"
    snapshot = tmp_path / "hub" / "models--a--b" / "snapshots" / COMMIT
    written(snapshot, "config.json")
    main = written(snapshot.parents[1] / "refs") / "main"
    for said in ("", "../../..", COMMIT):
        main.write_text(said)
        assert find("a/b").kind == "nothing"
    written(snapshot, "model.safetensors")
    assert find("a/b") == Stored("cache", str(snapshot), COMMIT)
    written(tmp_path / "a" / "b", "config.json", "model.safetensors")
    assert find("a/b").kind == "folder", "as transformers sees it"


def test_a_model_lands_where_its_name_says(tmp_path, monkeypatch):
    monkeypatch.setattr(stored, "hub_cache", lambda: tmp_path / "hub")
    in_folder, in_cache = Stored("folder", "models/x"), Stored("cache", "there", COMMIT)
    assert Landing.of("models/x", in_folder) == Landing(Path("models/x"))
    assert Landing.of("./x", in_cache) == Landing(Path("x"))
    snapshots = tmp_path / "hub" / "models--a--b" / "snapshots"
    assert Landing.of("a/b", in_cache) == Landing(snapshots / COMMIT, COMMIT)


@pytest.mark.parametrize("is_cached", [False, True])
@pytest.mark.parametrize("has_some", [False, True])
def test_a_kill_at_any_step_leaves_a_whole_model_or_none(
    tmp_path, monkeypatch, is_cached, has_some
):
    sizes = dict.fromkeys(("config.json", "model.safetensors", "tokenizer.json"), 2)

    def fetch(landing: Landing) -> None:
        landing.begin([*sizes])
        missing = [name for name in sizes if not landing.is_here(name, 2)]
        written(landing.coming, *missing)
        landing.publish()

    for number in range(1, 20):
        home = tmp_path / f"killed at {number}"
        monkeypatch.setattr(stored, "hub_cache", lambda: home)  # noqa: B023
        name = "a/b" if is_cached else str(home / "x")
        landing = Landing.of(name, Stored("cache" if is_cached else "folder", "", COMMIT))
        if has_some:
            written(landing.target, *(("tokenizer.json",) if is_cached else ()))
        if not killed_at(number, lambda: fetch(landing)):  # noqa: B023
            break
        assert find(name).kind in ("nothing", "cache", "folder")
        assert find(name).kind == "nothing" or set(os.listdir(landing.target)) == sizes.keys()
        fetch(landing)
        assert find(name).kind == ("cache" if is_cached else "folder")
        assert set(os.listdir(landing.target)) == sizes.keys() and not landing.aside.exists()
    assert 1 < number < 19


def test_what_has_come_stays_only_under_the_names_that_are_to_come(tmp_path):
    """A model that was divided, and is one file now: the list of its parts is of no use."""
    landing = Landing(tmp_path / "x")
    gone = ("model.safetensors.index.json", "model.safetensors-1.safetensors", "config.json.part2")
    kept = ("config.json", "model.safetensors.part", "model.safetensors.part.pieces")
    written(landing.coming, *gone, *kept)
    landing.begin(with_parts(["config.json", "model.safetensors"]))
    assert sorted(os.listdir(landing.coming)) == sorted(kept)
