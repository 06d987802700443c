"""Saves run one at a time, and end with the hold on the folder."""

from __future__ import annotations

import contextlib
import threading
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.sync.base import SyncState
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.saving import Saving, Writer


def test_the_writer_has_one_save_in_flight_and_is_waited_for():
    running, finished, may_end = [], [], threading.Event()

    def save(name):
        def act():
            running.append(name)
            assert len(running) - len(finished) == 1, "two saves at once"
            may_end.wait(10)
            finished.append(name)

        return act

    writer = Writer(in_background=True)
    writer.start(save("first"))
    assert finished == [], "the caller went on while it was written"
    threading.Timer(0.2, may_end.set).start()
    writer.start(save("second"))
    assert finished[:1] == ["first"], "the second save waited for the first"
    writer.wait()
    assert finished == ["first", "second"]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_failed_save_is_returned_once_and_a_mistake_of_ours_is_raised(in_background):
    def fail(error):
        def act():
            raise error

        return act

    writer = Writer(in_background)
    full = ForgeError("the disk is full", "make room")
    writer.start(fail(full))
    writer.wait()
    assert (writer.failure(), writer.failure()) == (full, None)
    writer.start(fail(KeyError("bug")))
    writer.wait()
    with pytest.raises(KeyError):
        writer.failure()


@pytest.fixture
def saving(open_small_job):
    """The saving of a run of one process whose folder is taken over when a test says so."""
    job = open_small_job(save_in_background=False)
    job.cluster.accelerator = SimpleNamespace(scaler=None)
    folder = SimpleNamespace(path=job.output_dir, is_lost=False)

    def confirm():
        if folder.is_lost:
            raise ForgeError("the folder was taken over", "stop the other one")

    folder.confirm = confirm
    lm = torch.nn.Linear(2, 2)
    lm.save_pretrained = lambda path, state_dict: save_file(state_dict, path / "model.safetensors")
    learner = SimpleNamespace(lm=lm, bare_optimizer=torch.optim.SGD(lm.parameters(), lr=0.1))
    sync = SimpleNamespace(
        has_own_state=False,
        trains_alone=False,
        state=SyncState,
        settings=lambda: {"sync": "ddp"},
        agreed_weights=contextlib.nullcontext,
    )
    return folder, Saving(job, folder, learner, sync)


def test_a_save_holds_what_a_run_resumes_from(saving):
    folder, saves = saving
    assert saves.save(4, {"blocks_read": 32, "figures": {}}) is None
    saves.finish()
    saved = folder.path / "checkpoint-4"
    assert checkpoint.damage(saved) is None
    state = checkpoint.read_state(saved)
    assert (state["step"], state["blocks_read"], state["scaler"]) == (4, 32, None)
    assert state["sync"] == {"settings": {"sync": "ddp"}} and state["config"]["batch_size"] == 8
    assert (saved / "tokenizer.json").exists()


def test_a_save_that_failed_is_returned_by_the_next_and_raised_at_the_end(saving, monkeypatch):
    def fail(*_):
        raise ForgeError("the disk is full", "make room")

    folder, saves = saving
    monkeypatch.setattr(checkpoint, "commit", fail)
    assert saves.save(4, {"figures": {}}) is None
    assert str(saves.save(8, {"figures": {}})) == "the disk is full\n  fix: make room"
    with pytest.raises(ForgeError) as error:
        saves.finish()
    problem = error.value.problems[0]
    assert problem.fix == "make room, then continue with --resume auto"


def test_without_its_folder_nothing_is_saved(saving):
    folder, saves = saving
    saves.save(4, {"figures": {}})
    folder.is_lost = True
    for write in (lambda: saves.save(8, {"figures": {}}), saves.finish):
        with pytest.raises(ForgeError, match="taken over"):
            write()
    assert checkpoint.steps_saved(folder.path) == [4]
