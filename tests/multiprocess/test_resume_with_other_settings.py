"""Strategies resumed from checkpoints of other moments and settings."""

from __future__ import annotations

import json
import math
import shutil

import pytest
import torch

from p2p_llm_forge.training.checkpoint import read_state
from tests.multiprocess import overflow
from tests.runs import by_hand, finish, flags, newest_step, read, start_ranks, tensors

pytestmark = pytest.mark.slow
CONSTANT = {"lr_scheduler": "constant", "keep_checkpoints": 9}


def test_auto_keeps_all_of_the_strategy_that_a_run_has_begun_with(zygote, prepared, tmp_path):
    chosen = {"sync": "diloco", "sync_every": 2, "outer_lr": 0.8, "outer_momentum": 0.3}
    folder = finish(zygote, prepared, tmp_path / "run", **CONSTANT, **chosen, max_steps=2)
    finish(zygote, prepared, folder, **CONSTANT, sync="auto", max_steps=4)
    kept = read_state(folder / "checkpoint-4")["config"]
    assert {name: kept[name] for name in chosen} == chosen


def test_a_warm_up_does_not_come_back_when_ranks_have_trained_alone(zygote, prepared, tmp_path):
    """Their weights and moments differ by then: gradients cannot be averaged any more."""
    settings = {**CONSTANT, "sync": "diloco", "sync_every": 4, "learning_rate": 3e-3}
    begun = tmp_path / "begun"
    finish(zygote, prepared, begun, **settings, ddp_warmup_steps=2, max_steps=8)
    ends = []
    for warmup in (2, 10):
        folder = shutil.copytree(begun, tmp_path / f"warmup{warmup}")
        finish(zygote, prepared, folder, **settings, ddp_warmup_steps=warmup, max_steps=12)
        ends.append(tensors(folder, 12))
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


def test_a_warm_up_that_has_not_ended_resumes(zygote, prepared, tmp_path):
    settings = {**CONSTANT, "sync": "diloco", "sync_every": 4, "ddp_warmup_steps": 6}
    calm = finish(zygote, prepared, tmp_path / "calm", **settings, max_steps=10)
    folder = finish(zygote, prepared, tmp_path / "run", **settings, max_steps=3)
    finish(zygote, prepared, folder, **settings, max_steps=10)
    expected = tensors(calm, 10)
    assert all(torch.equal(tensor, expected[key]) for key, tensor in tensors(folder, 10).items())


def test_a_run_that_breaks_in_the_warm_up_ends_and_saves_nothing(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = {"sync": "diloco", "sync_every": 4, "ddp_warmup_steps": 20, "learning_rate": 1e30}
    words = flags(prepared, folder, **CONSTANT, **settings, save_every=5, max_steps=10)
    ranks = start_ranks(zygote, words, 2, log)
    assert [zygote.wait(pid) for pid in ranks] == [2, 2], read(log)
    assert "the loss became NaN or infinite" in read(log) and newest_step(folder) == 0


@pytest.mark.parametrize("compress", ["int8", "powersgd"])
def test_an_infinite_gradient_leaves_nothing_in_the_next_updates(zygote, tmp_path, compress):
    """(Other codecs: tests/sync/test_ddp.py.)"""
    order, launch, ranks = {"folder": str(tmp_path)}, by_hand(2), []
    for rank in range(2):
        order["config"] = {**launch, "rank": rank, "compress": compress}
        script = "tests.multiprocess.overflow"
        ranks.append(zygote.start([json.dumps(order)], tmp_path / "log", script=script))
    assert [zygote.wait(pid) for pid in ranks] == [0, 0], read(tmp_path / "log")
    for rank in range(2):
        gradients = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for number, gradient in enumerate(gradients):
            assert all(map(math.isfinite, gradient)) == (number != overflow.SPOILED)
        assert gradients[-1] == pytest.approx([0.5] * overflow.WIDTH**2, rel=0.1)


def test_every_rank_resumes_with_its_own_loss_scale(zygote, prepared, tmp_path):
    """Ranks that train alone find different scales, and what fp16 rounds away depends on them."""
    rounds = {**CONSTANT, "sync": "diloco", "sync_every": 4, "save_every": 4, "max_grad_norm": 0}

    def run(folder, first_scale, **settings):
        words, log = flags(prepared, folder, **rounds, **settings), folder.with_suffix(".log")
        how = {"environ": {"FIRST_SCALE": first_scale}, "script": "tests.multiprocess.scaled"}
        ranks = start_ranks(zygote, words, 2, log, **how)
        assert [zygote.wait(pid) for pid in ranks] == [0, 0], read(log)
        return folder

    calm = run(tmp_path / "calm", "64", max_steps=8)
    broken = run(tmp_path / "broken", "64", max_steps=4)
    run(broken, "4096", max_steps=8)
    scales = [
        [of_rank["scale"] for of_rank in read_state(folder / "checkpoint-8")["scaler"]]
        for folder in (calm, broken)
    ]
    assert scales == [[256.0, 512.0]] * 2  # doubled after every third of 8 updates
    there = tensors(broken, 8)
    assert all(torch.equal(tensor, there[key]) for key, tensor in tensors(calm, 8).items())


def test_one_process_is_warned_that_rounds_are_pointless(zygote, prepared, tmp_path):
    finish(zygote, prepared, tmp_path / "run", 1, sync="diloco", sync_every=20, max_steps=4)
    log = read(tmp_path / "run.log")
    assert "pointless with one process" in log
    assert "rounds    of 20 updates; outer rate 0.354 and momentum 0.8, reached after 20" in log
