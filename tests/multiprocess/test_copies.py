"""Copies of checkpoints on other machines: here ranks with folders of their own stand for them."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from tests.folders import tree
from tests.runs import (
    LONG,
    finish,
    lines,
    newest_step,
    read,
    results,
    start_apart,
    step_logged,
    tensors,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.slow


def test_a_copy_goes_on_as_the_run_that_it_was_made_of(zygote, prepared, tmp_path):
    settings = {"max_steps": 9, "save_every": 3, "log_every": 3, "replicate_checkpoints": 2}
    folders, log = [tmp_path / "main", tmp_path / "other"], tmp_path / "log"
    ranks = start_apart(zygote, prepared, folders, [log] * len(folders), **settings)
    assert [zygote.wait(pid) for pid in ranks] == [0, 0], read(log)
    main, other = folders
    assert "safe      checkpoint-9 lies on 2 machines: rank 0 (" in read(log)
    assert tree(other / "checkpoint-9") == tree(main / "checkpoint-9")
    assert lines(other) == lines(main)

    for folder in folders:  # each without the other
        finish(zygote, prepared, folder, processes=1, **settings | {"max_steps": 12})
    expected, got = (tensors(folder, 12) for folder in folders)
    assert got.keys() == expected.keys()
    assert all(torch.equal(tensor, got[name]) for name, tensor in expected.items())
    assert lines(other) == lines(main)
    assert results(other)["eval_loss"] == results(main)["eval_loss"]


def test_a_run_that_is_stopped_ends_when_its_last_checkpoint_lies_on_a_second_machine(
    zygote, prepared, tmp_path
):
    folders, log = [tmp_path / "main", tmp_path / "other"], tmp_path / "log"
    ranks = start_apart(
        zygote, prepared, folders, [log] * len(folders), **LONG, replicate_checkpoints=2
    )
    wait_until(lambda: step_logged(folders[0]) >= 3, log=log)
    os.kill(ranks[0], signal.SIGTERM)
    assert [zygote.wait(pid) for pid in ranks] == [143, 143], read(log)
    step = newest_step(folders[0])
    assert f"SIGTERM: stopped and saved after step {step}" in read(log)
    assert f"safe      checkpoint-{step} lies on 2 machines: rank 0 (" in read(log)
    main, other = (tree(folder / f"checkpoint-{step}") for folder in folders)
    assert main == other and main
