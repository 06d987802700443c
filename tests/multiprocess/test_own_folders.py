"""Machines without a shared folder: each has an --output-dir of its own, and loses nothing by it.

Ranks on one machine with folders of different names stand for machines; with file systems of their
own they are in tests/multihost.
"""

from __future__ import annotations

import re

import pytest
import torch

from p2p_llm_forge.training.run_record import RunRecord
from tests.folders import tree
from tests.runs import (
    CLOCKED,
    DILOCO,
    finish,
    lines,
    newest_step,
    read,
    results,
    start_apart,
    tensors,
    wait_for_checkpoint,
    weights,
)

pytestmark = pytest.mark.slow

ROUNDS = {**DILOCO, "sync_every": 4, "overlap_steps": 2, "compress": "int8"}
STEPS = 12
# Figures of a session, not of a run.
SESSION = dict.fromkeys(CLOCKED | {"output_dir", "processes", "tokens_per_second"})


def end_own(zygote, data, folders, logs, status=0, **settings):
    """What one prints that is left in peace."""
    for log in logs:
        log.unlink(missing_ok=True)
    ranks = start_apart(zygote, data, folders, logs, **settings)
    statuses = [zygote.wait(pid) for pid in ranks]
    printed = "\n".join(read(log) for log in logs)
    assert statuses == [status] * len(folders), printed
    return printed


def same(one, other, step):
    """Whether two folders hold the same checkpoint, to the bit."""
    first, second = tensors(one, step), tensors(other, step)
    assert first.keys() == second.keys()
    return all(torch.equal(first[key], second[key]) for key in first)


def test_a_run_without_a_shared_folder_is_killed_and_resumes_to_the_bit(zygote, prepared, tmp_path):
    """As with a shared folder, which the other run has; rank 0 comes back on another machine."""
    steps = {"max_steps": STEPS, "save_every": 4, "log_every": 4, **ROUNDS}
    shared = finish(zygote, prepared, tmp_path / "shared", **steps)
    folders = [tmp_path / "a", tmp_path / "b"]
    logs = [tmp_path / "a.log", tmp_path / "b.log"]
    ranks = start_apart(zygote, prepared, folders, logs, **steps)
    wait_for_checkpoint(zygote, ranks[0], folders[0], 4, logs[0])
    zygote.kill(ranks)
    started = {RunRecord.read(folder).started for folder in folders}
    assert len(started) == 1 and None not in started
    saved = newest_step(folders[0])
    assert saved < STEPS, "it was killed before its end"
    printed = end_own(zygote, prepared, folders[::-1], logs, **steps)
    assert f"resuming  after step {saved}" in printed
    assert same(shared, folders[1], STEPS)
    assert lines(shared) == lines(folders[1])


def test_every_machine_refuses_evaluates_and_begins_again_for_itself(zygote, prepared, tmp_path):
    """Rank 0 has no folder yet, rank 1 the run: what is refused or only looked at changes nothing,
    and --overwrite begins again on both."""
    folders, logs = [tmp_path / "new", tmp_path / "old"], [tmp_path / "0.log", tmp_path / "1.log"]
    steps = {"max_steps": 4, "save_every": 2, "eval_blocks": 8}
    finish(zygote, prepared, folders[1], 1, **steps)
    before = tree(folders[1])

    def look(status=0, **settings):
        printed = end_own(zygote, prepared, folders, logs, status, **steps, **settings)
        assert tree(folders[1]) == before and not folders[0].exists()
        return printed

    refused = look(2, resume=None)
    assert re.search(r"rank 1 \(.*\): .*old holds this run already\n", refused), refused
    refused = look(2, seed=7)
    assert re.search(r"rank 1 \(.*\): .*old holds another run:.*seed: the run has 0", refused)
    shown = look(dry_run=True)
    assert re.search(r"rank 1 \(.*\) holds a run that was saved after step 4; --resume", shown)
    shown = look(eval_only=True)
    loss = results(folders[1])["eval_loss"]
    assert f"held out  loss {loss:.4f}" in shown and "checkpoint-4 after 4 updates" in shown

    end_own(zygote, prepared, folders, logs, **steps)  # it has ended: rank 0 gets it, and no update
    assert {**results(folders[0]), **SESSION} == {**results(folders[1]), **SESSION}
    assert lines(folders[0]) == lines(folders[1]) and same(*folders, 4)
    first, second = weights(folders[0]), weights(folders[1])
    assert all(torch.equal(first[name], second[name]) for name in second)

    started = RunRecord.read(folders[1]).started
    end_own(
        zygote,
        prepared,
        folders,
        logs,
        **{**steps, "max_steps": 2, "overwrite": True, "resume": None},
    )
    again = {RunRecord.read(folder).started for folder in folders}
    assert len(again) == 1 and not again & {started, None}
    assert newest_step(folders[0]) == 2 and newest_step(folders[1]) in (0, 2)
    assert not (folders[1] / "all_results.json").exists(), "that run is gone"
