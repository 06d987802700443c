"""A checkpoint is complete or absent, and a damaged one is skipped by name."""

from __future__ import annotations

import json
import shutil

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import write_json
from p2p_llm_forge.training import checkpoint


def write_two_files(folder):
    (folder / "model.safetensors").write_bytes(b"weights" * 1000)
    (folder / "config.json").write_text("{}")


def flip_a_byte(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"weights")


DAMAGES = {
    "has changed since it was written": flip_a_byte,
    "has 7 bytes instead of 7000": truncate,
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda folder: (folder / "manifest.json").write_text("{"),
    "cannot be read (invalid": lambda folder: (folder / "manifest.json").write_text(
        '{"format_version": "x", "step": 20, "files": {}}'
    ),
    "is that of step 10": lambda folder: shutil.copy(
        folder.parent / "checkpoint-10" / "manifest.json", folder / "manifest.json"
    ),
}


@pytest.mark.parametrize("wrong", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, wrong):
    checkpoint.commit(tmp_path, 10, write_two_files, TrainConfig(keep_checkpoints=2))
    newest = checkpoint.commit(tmp_path, 20, write_two_files, TrainConfig(keep_checkpoints=2))
    assert checkpoint.newest_good(tmp_path) == (newest, [])
    DAMAGES[wrong](newest)
    found, skipped = checkpoint.newest_good(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert len(skipped) == 1
    assert str(newest) in skipped[0] and wrong in skipped[0]


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / "tmp-checkpoint-5-0a1b").mkdir()
    (tmp_path / "tmp-notes").mkdir()
    for step in (9, 10, 100):
        checkpoint.commit(tmp_path, step, write_two_files, TrainConfig(keep_checkpoints=2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-10", "checkpoint-100", "tmp-notes"]


def test_a_save_that_fails_leaves_the_older_ones(tmp_path):
    checkpoint.commit(tmp_path, 10, write_two_files, TrainConfig(keep_checkpoints=1))

    def run_out_of_disk(folder):
        write_two_files(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(ForgeError, match="No space left on device"):
        checkpoint.commit(tmp_path, 20, run_out_of_disk, TrainConfig(keep_checkpoints=1))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert checkpoint.damage(tmp_path / "checkpoint-10") is None


def test_a_newer_format_is_refused_by_its_version(tmp_path):
    folder = checkpoint.commit(tmp_path, 10, write_two_files, TrainConfig(keep_checkpoints=1))
    manifest = json.loads((folder / "manifest.json").read_text())
    (folder / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    with pytest.raises(ForgeError, match="format version 99"):
        checkpoint.newest_good(tmp_path)


def test_going_on_from_an_older_checkpoint_leaves_the_later_branch(tmp_path):
    for step in (4, 6, 8):
        checkpoint.commit(tmp_path, step, write_two_files, TrainConfig(keep_checkpoints=3))
    checkpoint.commit(tmp_path, 5, write_two_files, TrainConfig(keep_checkpoints=2))
    assert checkpoint.steps_saved(tmp_path) == [5, 4]


def write_with_loss(loss):
    def write(folder):
        write_two_files(folder)
        state = {"figures": {"eval_loss": loss}}
        write_json(folder / checkpoint.TRAINER_STATE, state)

    return write


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    config = TrainConfig(keep_checkpoints=1, keep_best=True)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        checkpoint.commit(tmp_path, step, write_with_loss(loss), config)
    assert checkpoint.steps_saved(tmp_path) == [5, 2]
    checkpoint.commit(tmp_path, 6, write_with_loss(0.5), config)
    assert checkpoint.steps_saved(tmp_path) == [6]


@pytest.mark.parametrize(("allowed", "left"), [(0, [10]), (1, [10, 20])])
def test_what_has_lost_its_folder_commits_and_prunes_nothing(tmp_path, allowed, left):
    """allowed: how often it is found that the folder is still held."""
    answers = iter([True] * allowed)

    def confirm():
        if not next(answers, False):
            raise ForgeError("the folder was taken over", "stop the other one")

    checkpoint.commit(tmp_path, 10, write_two_files, TrainConfig(keep_checkpoints=1))
    with pytest.raises(ForgeError, match="taken over"):
        checkpoint.commit(tmp_path, 20, write_two_files, TrainConfig(keep_checkpoints=1), confirm)
    names = [f"checkpoint-{step}" for step in left]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_resume_means(tmp_path, capsys):
    assert checkpoint.find(tmp_path, None) is None and checkpoint.find(tmp_path, "auto") is None
    old = checkpoint.commit(tmp_path, 10, write_two_files, TrainConfig(keep_checkpoints=2))
    new = checkpoint.commit(tmp_path, 20, write_two_files, TrainConfig(keep_checkpoints=2))
    assert checkpoint.find(tmp_path, "auto") == new
    assert checkpoint.find(tmp_path, str(old)) == old
    truncate(new)
    with pytest.raises(ForgeError, match="has 7 bytes instead of 7000") as error:
        checkpoint.find(tmp_path, str(new))
    assert error.value.problems[0].fix == "--resume auto takes the newest good checkpoint"
    assert checkpoint.find(tmp_path, "auto") == old
    assert f"skipped {new}: model.safetensors has 7 bytes" in capsys.readouterr().err
