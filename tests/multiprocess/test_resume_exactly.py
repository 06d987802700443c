"""A run that is killed at any moment and resumed ends bit for bit as if nothing had been."""

from __future__ import annotations

import os
import random
import signal
import time

import pytest
import torch

from tests.runs import (
    DEFAULTS,
    DROPOUT,
    flags,
    lines,
    newest_step,
    read,
    start_ranks,
    tensors,
    wait_for_checkpoint,
)

pytestmark = pytest.mark.slow
STEPS = 120
# The data has some 70 updates an epoch, so every run goes from its first into its second epoch.
SCENARIOS = {
    "dropout": (1, {"config_overrides": DROPOUT}, 7),
    "accumulation": (
        1,
        {"config_overrides": DROPOUT, "micro_batch_size": 2, "optimizer": "muon"},
        5,
    ),
    "defaults": (1, {**DEFAULTS, "micro_batch_size": 4, "dropout": 0.1}, 5),
    "bf16": (1, {"mixed_precision": "bf16", "save_in_background": False}, 5),
    "two_processes": (
        2,
        {"config_overrides": DROPOUT, "micro_batch_size": 2, "peer_timeout": 8},
        8,
    ),
}


@pytest.mark.parametrize("name", SCENARIOS)
def test_a_killed_run_ends_like_one_that_was_not_killed(zygote, prepared, tmp_path, name):
    processes, settings, kills = SCENARIOS[name]
    settings = {**settings, "max_steps": STEPS, "save_every": 4, "log_every": 6, "eval_every": 40}
    draw = random.Random(name)
    calm, stormy = tmp_path / "calm", tmp_path / "stormy"
    ranks = start_ranks(zygote, flags(prepared, calm, **settings), processes, tmp_path / "calm.log")
    assert [zygote.wait(pid) for pid in ranks] == [0] * processes, read(tmp_path / "calm.log")

    words, log = flags(prepared, stormy, **settings), tmp_path / "stormy.log"
    interrupted_steps = []
    for kill in range(kills):
        ranks = start_ranks(zygote, words, processes, log)
        victim = draw.choice(ranks)
        # While it starts; or while it trains or saves, ever further into the run.
        goal = 0 if draw.random() < 0.2 else draw.randint(1, STEPS * (kill + 1) // (kills + 1))
        wait_for_checkpoint(zygote, victim, stormy, goal, log)
        time.sleep(draw.uniform(0, 0.3 if goal == 0 else 0.04))
        os.kill(victim, signal.SIGKILL)
        statuses = [zygote.wait(pid) for pid in ranks]
        assert statuses[ranks.index(victim)] == -signal.SIGKILL
        # The others notice: never a hang, never a success.
        others = [status for pid, status in zip(ranks, statuses, strict=True) if pid != victim]
        assert all(status in (1, 2) for status in others), read(log)
        interrupted_steps.append(newest_step(stormy))
    assert len(set(interrupted_steps)) > 2, "all kills met the same step"
    assert max(interrupted_steps) < STEPS, "the last kill came after the end"
    ranks = start_ranks(zygote, words, processes, log)
    assert [zygote.wait(pid) for pid in ranks] == [0] * processes, read(log)

    expected = tensors(calm, STEPS)
    got = tensors(stormy, STEPS)
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, got[key]), key
    assert lines(stormy) == lines(calm)
    assert not list(stormy.glob("tmp-*"))
