"""What is removed is what a manifest or run.json of ours names; what others put beside it stays."""

from __future__ import annotations

import json
import shutil

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.files import erase
from p2p_llm_forge.training import checkpoint, pruning
from p2p_llm_forge.training.pruning import is_leftover, prune, remove_leftovers, remove_run
from p2p_llm_forge.training.run_record import RunRecord
from tests.folders import tree
from tests.training.saved import writer

KEEP_ALL = TrainConfig(keep_checkpoints=99)


@pytest.fixture
def saved(tmp_path):
    """Checkpoints 2, 4 and 6 of a run."""
    RunRecord({}).write(tmp_path)
    for step in (2, 4, 6):
        checkpoint.commit(tmp_path, step, writer(step), KEEP_ALL)
    return tmp_path


def test_pruning_keeps_what_is_whole_and_not_what_is_called_so(saved):
    """A damaged one does not count, or the only good one would go for it."""
    (saved / "checkpoint-6" / "optimizer.safetensors").write_bytes(b"")
    (saved / "checkpoint-4" / "manifest.json").unlink()
    prune(saved, 6, TrainConfig(keep_checkpoints=1))
    assert checkpoint.newest_good(saved)[0] == saved / "checkpoint-2"
    assert checkpoint.steps_saved(saved) == [4, 2], "what has no manifest is nobody's to remove"


@pytest.mark.parametrize("note", ["notes.txt", "notes/of/me.txt", "model-00001.safetensors"])
def test_a_note_in_a_checkpoint_outlives_it(saved, note):
    file = saved / "checkpoint-2" / note
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text("mine")
    checkpoint.commit(saved, 4, writer(4, fill=3.0), KEEP_ALL)
    checkpoint.commit(saved, 2, writer(2, fill=3.0), KEEP_ALL)
    assert file.read_text() == "mine" and checkpoint.damage(saved / "checkpoint-2") is None
    checkpoint.commit(saved, 8, writer(8), TrainConfig(keep_checkpoints=1))
    assert [key for key in tree(saved / "checkpoint-2") if not key.startswith("notes")] == [
        name for name in [note] if "/" not in note and note != "notes.txt"
    ]
    assert file.read_text() == "mine" and not (saved / "checkpoint-4").exists()


def test_links_in_a_checkpoint_are_not_followed(saved, tmp_path_factory):
    beyond = tmp_path_factory.mktemp("beyond")
    (beyond / "config.json").write_text("mine")
    (beyond / "deep").mkdir()
    (beyond / "deep" / "model.safetensors").write_text("mine")
    before = tree(beyond)
    folder = saved / "checkpoint-2"
    manifest = json.loads((folder / "manifest.json").read_text())
    for name in ("config.json", "optimizer.safetensors"):
        (folder / name).unlink()
    (folder / "config.json").symlink_to(beyond / "config.json")
    (folder / "optimizer.safetensors").symlink_to(beyond)
    (folder / "deep").symlink_to(beyond / "deep")
    manifest["files"]["deep/model.safetensors"] = manifest["files"]["config.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    prune(saved, 6, TrainConfig(keep_checkpoints=2))
    assert tree(beyond) == before
    assert tree(folder) == {"deep": f"-> {beyond / 'deep'}"}


def test_a_link_for_a_checkpoint_and_what_it_leads_to_stay(saved, tmp_path_factory):
    moved = tmp_path_factory.mktemp("large") / "checkpoint-2"
    (saved / "checkpoint-2").rename(moved)
    (saved / "checkpoint-2").symlink_to(moved)
    before = tree(moved)
    prune(saved, 6, TrainConfig(keep_checkpoints=1))
    remove_run(saved, RunRecord.read(saved))
    assert tree(moved) == before and (saved / "checkpoint-2").is_symlink()


def test_a_run_is_removed_by_what_it_has_put_on_record(saved):
    names = ("metrics.jsonl", "README.md", "model-00001-of-00002.safetensors")
    for name in (*names, "notes.txt", "config.json"):
        (saved / name).write_text("")
    events = saved / "runs" / "17.5"
    events.mkdir(parents=True)
    (events / "events.out.tfevents.17.host.1.0").write_text("")
    (saved / "runs" / "hparams.yml").write_text("")
    (saved / "checkpoint-4" / "manifest.json").unlink()
    events_named = ("runs/17.5/events.out.tfevents.17.host.1.0", "runs/hparams.yml")
    record = RunRecord({}, frozenset([*names, *events_named, "checkpoint-4"]))
    remove_run(saved, record)
    assert sorted(path.name for path in saved.iterdir()) == [
        *("checkpoint-4", "config.json", "notes.txt", "run.json")
    ]


def test_events_of_others_and_what_a_link_leads_to_outlive_a_run(saved, tmp_path_factory):
    beyond = tmp_path_factory.mktemp("beyond")
    mine, ours = "user/events.out.tfevents.1.user", "17/events.out.tfevents.17.host.1.0"
    for file in (saved / "runs" / mine, saved / "runs" / ours, beyond / "hparams.yml"):
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("mine")
    (saved / "runs" / "18").symlink_to(beyond)
    names = ("runs", f"runs/{ours}", "runs/18/hparams.yml")
    remove_run(saved, RunRecord({}, frozenset(names)))
    assert (saved / "runs" / mine).exists() and (beyond / "hparams.yml").exists()
    assert not (saved / "runs" / "17").exists()
    (saved / "runs").rename(beyond / "runs")
    (saved / "runs").symlink_to(beyond / "runs")
    remove_run(saved, RunRecord({}, frozenset([f"runs/{mine}"])))
    assert (beyond / "runs" / mine).exists()


def test_what_a_kill_leaves_of_a_replacement_is_cleared_but_for_what_others_put_there(
    saved, monkeypatch
):
    (saved / "checkpoint-4" / "notes.txt").write_text("mine")

    def killed(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(pruning, "files_in", killed)
    with pytest.raises(KeyboardInterrupt):
        checkpoint.commit(saved, 4, writer(4, fill=3.0), KEEP_ALL)
    monkeypatch.undo()
    assert checkpoint.damage(saved / "checkpoint-4") is None, "the new one is there"
    remove_leftovers(saved)
    (aside,) = saved.glob("tmp-*")
    assert tree(aside) == {"notes.txt": b"mine"}


def test_what_this_process_still_needs_is_no_leftover(saved, monkeypatch):
    used, left = (saved / f"tmp-copied-{step}-0a1b2c3d" for step in (4, 6))
    for folder in (used, left):
        folder.mkdir()
    monkeypatch.setattr(pruning, "IN_USE", {used})
    prune(saved, 6, TrainConfig(keep_checkpoints=1))
    assert used.is_dir() and not left.exists()
    assert checkpoint.steps_saved(saved) == [6]


def test_where_other_processes_write_checkpoints_are_pruned_and_their_files_stay(saved):
    written = saved / "tmp-rank-00003.safetensors.0a1b2c3d"
    written.touch()
    pruning.prune_checkpoints(saved, 6, TrainConfig(keep_checkpoints=1))
    assert checkpoint.steps_saved(saved) == [6] and written.exists()


def test_names_of_leftovers_are_those_of_our_writers_only():
    ours = ["tmp-checkpoint-5-0a1b2c3d", "tmp-pruned-5-0a1b2c3d", "tmp-replaced-5-0a1b2c3d"]
    ours += ["tmp-rank-00001.safetensors.0a1b2c3d", "tmp-run.lock-0123456789abcdef"]
    ours += ["tmp-run.json.17.140", "tmp-.check.lock-0123456789abcdef"]
    assert all(map(is_leftover, ours))
    others = ["tmp-checkpoint-5", "tmp-checkpoint-5-draft", "tmp-notes", "tmp-data.1.2", "tmp-"]
    others += [
        "tmp-checkpoint-5-0a1b2c3d.bak",
        "tmp-metrics.jsonl.1.2",
        "tmp-checkpoint-٥-0a1b2c3d",
    ]
    assert not any(map(is_leftover, others))
    assert is_leftover("tmp-metrics.jsonl.1.2", {"metrics.jsonl"})


def test_erasing_leaves_folders_that_hold_something_else(tmp_path):
    for name in ("a/b/one", "a/two", "c/three"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("")
    (tmp_path / "c" / "folder").mkdir()
    erase(tmp_path, ["a/b/one", "c/three", "c/folder", "none", "none/at/all"])
    assert set(tree(tmp_path)) == {"a", "a/two"}
    erase(tmp_path, ["a/two"])
    assert not tmp_path.exists()
    shutil.rmtree(tmp_path, ignore_errors=True)
