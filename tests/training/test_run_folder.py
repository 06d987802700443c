"""A run's folder is held by one run at a time, and a finished run is not done again."""

from __future__ import annotations

import errno
import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.keepers import Keepers
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.run import Run
from p2p_llm_forge.training.run_folder import RunFolder, run_folder
from p2p_llm_forge.training.run_record import RunRecord
from tests.memory_channel import clusters, run_ranks
from tests.training.begun import IDENTITY, START, machine
from tests.training.saved import writer
from train import train


def taken_over(lock):
    """As another process leaves the lock that was silent for too long."""
    mark = next(lock.iterdir())
    mark.rename(lock / "0123456789abcdef~17~1~~~elsewhere")


def write_checkpoint(folder):
    writer(6)(folder)
    shutil.copy(folder / "optimizer.safetensors", folder / "rank-00000.safetensors")


def test_the_folder_is_held_while_entered(open_small_job):
    job = open_small_job()
    with run_folder(job) as folder:
        assert (folder.path / "run.lock").is_dir() and not folder.is_lost
        folder.confirm()
        with pytest.raises(ForgeError, match="is in use by process"), run_folder(job):
            pass
    assert not (folder.path / "run.lock").exists()


def test_a_folder_that_was_taken_over_is_neither_claimed_nor_published_to(open_small_job):
    with run_folder(open_small_job()) as folder:
        saved = checkpoint.commit(folder.path, 6, write_checkpoint, TrainConfig())
        taken_over(folder.path / "run.lock")
        for write in (folder.confirm, folder.claim, lambda: folder.publish(saved)):
            with pytest.raises(ForgeError, match="taken over by process 17 on elsewhere"):
                write()
        assert not (folder.path / "run.json").exists()
        assert not (folder.path / "model.safetensors").exists()
    assert (folder.path / "run.lock").is_dir(), "it is the other one's now"


def test_the_published_model_is_without_the_state_of_training(open_small_job):
    with run_folder(open_small_job()) as folder:
        saved = checkpoint.commit(folder.path, 6, write_checkpoint, TrainConfig())
        folder.publish(saved)
        files = sorted(path.name for path in folder.path.iterdir() if path.is_file())
        assert files == ["config.json", "model.safetensors"]


@pytest.mark.parametrize(
    ("code", "fix"),
    [
        *((errno.ENOSPC, "make room"), (errno.EDQUOT, "make room")),
        *((errno.EACCES, "make .* writable"), (errno.EISDIR, "move the folder .*/config.json out")),
    ],
)
def test_the_fix_of_a_failed_write_fits_what_failed(open_small_job, code, fix):
    with run_folder(open_small_job()) as folder:
        folder.claim()
        with pytest.raises(ForgeError) as error, folder._writing("the model", ["config.json"]):
            if code == errno.EISDIR:
                (folder.path / "config.json").mkdir()
            raise OSError(code, "as the disk says")
        assert re.match(fix, error.value.problems[0].fix)


def test_a_run_whose_folder_is_taken_over_ends_and_writes_nothing_more(
    config, tmp_path, monkeypatch
):
    run, logged, right = tmp_path / "run", [], Run.log_lines

    def log_lines(self):
        right(self)
        logged.append(self)
        if len(logged) == 3:
            taken_over(run / "run.lock")

    monkeypatch.setattr(Run, "log_lines", log_lines)
    with pytest.raises(ForgeError, match="was taken over by process 17 on elsewhere"):
        train(replace(config, log_every=1, save_every=2, save_in_background=False))
    assert len(logged) == 4, "it ended before the next save"
    assert checkpoint.steps_saved(run) == [2] and not (run / "all_results.json").exists()
    assert [mark.name.split("~")[-1] for mark in (run / "run.lock").iterdir()] == ["elsewhere"]


def test_a_finished_run_is_not_done_again(config, capsys):
    first = train(config)
    again = train(replace(config, resume="auto"))
    assert again == first
    assert "finished already" in capsys.readouterr().out


def claimed(folders, step, **settings):
    """Machines that resume from the checkpoint of a step, or have none, claim their folders."""

    def act(cluster):
        path = folders[cluster.rank]
        folder = RunFolder.__new__(RunFolder)  # without the run
        config = TrainConfig("data", str(path), report_to="none", **settings)
        folder._job = SimpleNamespace(cluster=cluster, config=config, identity=lambda: IDENTITY)
        folder.path, folder._lock, folder.keepers = path, None, Keepers([*range(len(folders))])
        folder.checkpoint = path / f"checkpoint-{step}" if step else None
        folder.claim()

    with clusters(len(folders)) as ranks:
        run_ranks(ranks, act)
    (started,) = {RunRecord.read(folder).started for folder in folders}
    return started


def test_what_other_machines_have_fetched_before_is_pruned_as_rank_0_prunes(tmp_path):
    folders = [machine(tmp_path / name, 2, 4, 6, 8) for name in "ab"]
    (folders[1] / "checkpoint-8" / "model.safetensors").unlink()
    assert claimed(folders, 6, resume="auto", keep_checkpoints=2) == START
    assert checkpoint.steps_saved(folders[0]) == [8, 6, 4, 2], "it prunes when it saves"
    assert checkpoint.steps_saved(folders[1]) == [8, 6, 4], "newer ones are nobody's to remove"


def test_a_branch_is_another_start_and_leaves_no_later_checkpoint_elsewhere(tmp_path):
    """Else --resume auto would take the later ones of the other machine."""
    folders = [machine(tmp_path / name, 2, 4, 6) for name in "ab"]
    asked = str(folders[0] / "checkpoint-2")
    assert claimed(folders, 2, resume=asked, keep_checkpoints=3) not in (START, None)
    assert checkpoint.steps_saved(folders[0]) == [6, 4, 2]
    assert checkpoint.steps_saved(folders[1]) == [2]
    folders = [machine(tmp_path / name, 2, 4) for name in "cd"]
    asked = str(folders[0] / "checkpoint-4")
    assert claimed(folders, 4, resume=asked) == START, "it was the newest"


def test_a_machine_that_began_again_without_the_one_with_all_checkpoints_is_on_record(tmp_path):
    """The other one was away, and nothing had been copied: now each has a run of its own."""
    away, alone = machine(tmp_path / "away", 500), machine(tmp_path / "alone")
    assert claimed([alone], None, resume="auto") == START
    assert claimed([alone, away], 500, resume="auto") == START, "nothing was saved meanwhile"
    away, alone = machine(tmp_path / "b", 500), machine(tmp_path / "c")
    claimed([alone], None, resume="auto")
    checkpoint.complete(alone, 400, writer(400))
    with pytest.raises(ForgeError, match="after step 0 they went on without each other"):
        claimed([alone, away], 500, resume="auto")
