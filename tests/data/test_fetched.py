"""A dataset that comes from elsewhere is whole or not there, whenever its fetch is killed."""

from __future__ import annotations

import os
import shutil
from pathlib import Path

import pytest

from p2p_llm_forge.data import dataset
from p2p_llm_forge.data.dataset import MANIFEST, UNFINISHED, open_prepared
from p2p_llm_forge.data.fetched import files_coming, look, place_for, put_in_place
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from tests.data.preparations import config
from tests.folders import tree
from tests.killed_steps import killed_at


def fetch(source: Path, folder: Path) -> None:
    """What a rank does that holds the lock, but for the network."""
    promised = look(source)
    place = place_for(folder, promised.manifest)
    shutil.copy(source / MANIFEST, place)
    for name, facts in files_coming(place, promised).items():
        there = place / name
        if not there.exists() or there.stat().st_size != facts["bytes"]:
            there.parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(source / name, there)
    put_in_place(place, folder, promised.manifest)


def is_whole(folder: Path, source: Path) -> bool:
    there = {name: one for name, one in tree(folder).items() if not name.startswith(UNFINISHED)}
    del there["fetched.json"]
    return there == tree(source)


@pytest.fixture
def two(text, tmp_path):
    """Two datasets with files of the same names, of which the first was fetched."""
    older, newer = tmp_path / "older", tmp_path / "newer"
    prepare(config(text, older))
    prepare(config(text, newer, sequence_length=48))
    return older, newer


def killed_fetches(older, newer, tmp_path, replaces):
    """The folder after a fetch of `newer` that was killed, once for every step at which it can be.

    replaces: whether `older` was fetched there before.
    """
    kills = 0
    for number in range(1, 100):
        folder = tmp_path / f"killed at {number}"
        if replaces:
            fetch(older, folder)
        if not killed_at(number, lambda: fetch(newer, folder)):  # noqa: B023
            break
        kills += 1
        yield folder
    assert kills > (10 if replaces else 5) and number < 99


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_step_leaves_a_whole_dataset_or_none_and_the_next_fetch_ends(
    two, tmp_path, replaces
):
    older, newer = two
    for folder in killed_fetches(older, newer, tmp_path, replaces):
        found = look(folder)
        if found.kind == "dataset":
            assert found.is_fetched
            whole = newer if found.manifest == look(newer).manifest else older
            assert (replaces or whole == newer) and is_whole(folder, whole)
        else:
            assert found.kind == "nothing" and not (folder / MANIFEST).exists()
            with pytest.raises(ForgeError, match="is not a prepared dataset"):
                open_prepared(folder)
        fetch(newer, folder)
        assert is_whole(folder, newer) and not any((folder / UNFINISHED).iterdir())
        assert look(folder).is_fetched


@pytest.mark.parametrize("replaces", [False, True])
def test_a_kill_at_any_step_and_newer_data_at_the_source_leave_no_folder_without_a_way_out(
    two, text, tmp_path, replaces
):
    (older, newer), newest = two, tmp_path / "newest"
    prepare(config(text, newest, sequence_length=64))
    for folder in killed_fetches(older, newer, tmp_path, replaces):
        (folder / UNFINISHED / "lock").touch()  # as who holds it has it there
        fetch(newest, folder)
        assert is_whole(folder, newest) and os.listdir(folder / UNFINISHED) == ["lock"]


def test_a_preparation_that_replaces_a_fetched_dataset_is_one_that_was_prepared(two, text):
    older, newer = two
    fetch(newer, folder := older.with_name("data"))
    prepare(config(text, folder, overwrite=True, sequence_length=16))
    assert look(folder).kind == "dataset" and not look(folder).is_fetched
    assert not (folder / "fetched.json").exists()


def test_a_preparation_takes_the_place_of_a_fetch_that_was_not_finished(two, text):
    older, _ = two
    folder = older.with_name("data")
    place = place_for(folder, look(older).manifest)
    shutil.copy(older / MANIFEST, place)
    shutil.copytree(older / "train", place / "train")
    assert look(folder).kind == "nothing"
    prepare(config(text, folder, sequence_length=16))
    assert not (folder / UNFINISHED).exists() and not look(folder).is_fetched


def sent(older: Path, place: Path, change) -> None:
    """A manifest as a stranger would send it: sealed, so that only what it says is wrong."""
    manifest = dataset.Manifest.load(older)
    content = manifest.content()
    change(content)
    (place / MANIFEST).write_bytes(dataset.sealed(content))


@pytest.mark.parametrize(
    "name", ["../../.ssh/authorized_keys", "/etc/passwd", "run.lock", "unfinished/lock/x", "x/y"]
)
def test_a_manifest_that_names_other_files_is_refused(two, tmp_path, name):
    older, _ = two
    place = place_for(tmp_path / "data", look(older).manifest)
    facts = {"bytes": 3, "sha256": "0" * 64}
    sent(older, place, lambda content: content["files"].update({name: facts}))
    with pytest.raises(ForgeError, match="is no file of one|cannot be read as a manifest"):
        files_coming(place, look(older))


def test_a_manifest_that_was_not_promised_is_refused(two, tmp_path):
    older, newer = two
    place = place_for(tmp_path / "data", look(older).manifest)
    for change in (lambda content: content["files"].popitem(), None):
        if change is None:
            shutil.copy(newer / MANIFEST, place)
        else:
            sent(older, place, change)
        with pytest.raises(ForgeError, match="another one than its machine has said"):
            files_coming(place, look(older))


def test_what_has_come_of_other_datasets_is_removed(two, tmp_path):
    folder, (older, newer) = tmp_path / "data", two
    (place_for(folder, look(older).manifest) / "half").write_text("half")
    place = place_for(folder, look(newer).manifest)
    assert os.listdir(folder / UNFINISHED) == [place.name]
