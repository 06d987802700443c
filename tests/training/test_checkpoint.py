"""A checkpoint is complete or absent, and a damaged one is skipped by name."""

from __future__ import annotations

import json
import shutil

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import checkpoint
from tests.training.saved import writer


def flip_a_byte(folder):
    file = folder / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[100] ^= 1
    file.write_bytes(content)


def truncate(folder):
    (folder / "model.safetensors").write_bytes(b"weights")


def of_version(version):
    """Puts a manifest of a version there."""
    return lambda folder: (folder / "manifest.json").write_text(
        json.dumps({"format_version": version, "step": 20, "files": {}})
    )


DAMAGES = {
    "has changed since it was written": flip_a_byte,
    "has 7 bytes instead of 2072": truncate,
    "config.json is missing": lambda folder: (folder / "config.json").unlink(),
    "has no manifest.json": lambda folder: (folder / "manifest.json").unlink(),
    "manifest.json cannot be read": lambda folder: (folder / "manifest.json").write_text("{"),
    "'format_version' is 'x'": of_version("x"),
    "is that of step 10": lambda folder: shutil.copy(
        folder.parent / "checkpoint-10" / "manifest.json", folder / "manifest.json"
    ),
}


@pytest.mark.parametrize("wrong", DAMAGES)
def test_a_damaged_checkpoint_is_skipped_by_name(tmp_path, wrong):
    checkpoint.commit(tmp_path, 10, writer(10), TrainConfig(keep_checkpoints=2))
    newest = checkpoint.commit(tmp_path, 20, writer(20), TrainConfig(keep_checkpoints=2))
    assert checkpoint.newest_good(tmp_path) == (newest, [])
    DAMAGES[wrong](newest)
    found, skipped = checkpoint.newest_good(tmp_path)
    assert found == tmp_path / "checkpoint-10"
    assert len(skipped) == 1
    assert str(newest) in skipped[0] and wrong in skipped[0]


def test_only_the_newest_are_kept_and_leftovers_go(tmp_path):
    (tmp_path / "tmp-checkpoint-5-0a1b2c3d").mkdir()
    (tmp_path / "tmp-notes").mkdir()
    for step in (9, 10, 100):
        checkpoint.commit(tmp_path, step, writer(step), TrainConfig(keep_checkpoints=2))
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == ["checkpoint-10", "checkpoint-100", "tmp-notes"]


def test_a_save_that_fails_leaves_the_older_ones(tmp_path):
    checkpoint.commit(tmp_path, 10, writer(10), TrainConfig(keep_checkpoints=1))

    def run_out_of_disk(folder):
        writer(20)(folder)
        raise OSError(28, "No space left on device")

    with pytest.raises(ForgeError, match="No space left on device"):
        checkpoint.commit(tmp_path, 20, run_out_of_disk, TrainConfig(keep_checkpoints=1))
    assert [path.name for path in tmp_path.iterdir()] == ["checkpoint-10"]
    assert checkpoint.damage(tmp_path / "checkpoint-10") is None


def test_a_newer_format_is_skipped_by_its_version_and_never_removed(tmp_path):
    keep = TrainConfig(keep_checkpoints=1)
    old = checkpoint.commit(tmp_path, 10, writer(10), keep)
    newer = checkpoint.commit(tmp_path, 20, writer(20), TrainConfig(keep_checkpoints=2))
    manifest = json.loads((newer / "manifest.json").read_text())
    (newer / "manifest.json").write_text(json.dumps({**manifest, "format_version": 99}))
    found, (skipped,) = checkpoint.newest_good(tmp_path)
    assert found == old and "format version 99, this program reads 1" in skipped
    checkpoint.commit(tmp_path, 15, writer(15), keep)
    assert checkpoint.steps_saved(tmp_path) == [20, 15]
    with pytest.raises(ForgeError, match="checkpoint-20 is in the way"):
        checkpoint.commit(tmp_path, 20, writer(20), keep)
    assert (newer / "config.json").exists()


def test_going_on_from_an_older_checkpoint_leaves_the_later_branch(tmp_path):
    for step in (4, 6, 8):
        checkpoint.commit(tmp_path, step, writer(step), TrainConfig(keep_checkpoints=3))
    checkpoint.commit(tmp_path, 5, writer(5), TrainConfig(keep_checkpoints=2))
    assert checkpoint.steps_saved(tmp_path) == [5, 4]


def test_the_best_checkpoint_is_kept_beside_the_newest(tmp_path):
    config = TrainConfig(keep_checkpoints=1, keep_best=True)
    for step, loss in ((1, 3.0), (2, 1.0), (3, 2.0), (4, None), (5, 2.5)):
        figures = {"eval_loss": loss}
        checkpoint.commit(tmp_path, step, writer(step, figures=figures), config)
    assert checkpoint.steps_saved(tmp_path) == [5, 2]
    checkpoint.commit(tmp_path, 6, writer(6, figures={"eval_loss": 0.5}), config)
    assert checkpoint.steps_saved(tmp_path) == [6]


def test_losses_of_other_blocks_do_not_compete_for_the_best(tmp_path):
    config = TrainConfig(keep_checkpoints=1, keep_best=True)
    for step, loss, blocks in (
        (1, 1.0, 20),
        (2, 2.0, 20),
        (3, 3.0, 50),
        (4, 2.5, 50),
        (5, 2.6, 50),
    ):
        figures = {"eval_loss": loss, "eval_blocks": blocks}
        checkpoint.commit(tmp_path, step, writer(step, figures=figures), config)
    assert checkpoint.steps_saved(tmp_path) == [5, 4, 1]


@pytest.mark.parametrize(("allowed", "left"), [(0, [10]), (1, [10, 20])])
def test_what_has_lost_its_folder_commits_and_prunes_nothing(tmp_path, allowed, left):
    """allowed: how often it is found that the folder is still held."""
    answers = iter([True] * allowed)

    def confirm():
        if not next(answers, False):
            raise ForgeError("the folder was taken over", "stop the other one")

    checkpoint.commit(tmp_path, 10, writer(10), TrainConfig(keep_checkpoints=1))
    with pytest.raises(ForgeError, match="taken over"):
        checkpoint.commit(tmp_path, 20, writer(20), TrainConfig(keep_checkpoints=1), confirm)
    names = [f"checkpoint-{step}" for step in left]
    assert sorted(path.name for path in tmp_path.iterdir()) == names


def test_what_resume_means(tmp_path, capsys):
    assert checkpoint.find(tmp_path, None) is None and checkpoint.find(tmp_path, "auto") is None
    old = checkpoint.commit(tmp_path, 10, writer(10), TrainConfig(keep_checkpoints=2))
    new = checkpoint.commit(tmp_path, 20, writer(20), TrainConfig(keep_checkpoints=2))
    assert checkpoint.find(tmp_path, "auto") == new
    assert checkpoint.find(tmp_path, str(old)) == old
    truncate(new)
    with pytest.raises(ForgeError, match="has 7 bytes instead of 2072") as error:
        checkpoint.find(tmp_path, str(new))
    assert error.value.problems[0].fix == "--resume auto takes the newest good checkpoint"
    assert checkpoint.find(tmp_path, "auto") == old
    assert f"skipped {new}: model.safetensors has 7 bytes" in capsys.readouterr().err
