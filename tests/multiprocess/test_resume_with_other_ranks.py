"""A run that resumes with more or fewer processes than it had."""

from __future__ import annotations

import json
import re

import pytest
import torch

from p2p_llm_forge.training.checkpoint import read_state
from tests.runs import (
    DILOCO,
    finish,
    flags,
    lines,
    newest_step,
    read,
    results,
    start_ranks,
    tensors,
)

pytestmark = pytest.mark.slow
CONSTANT = {"lr_scheduler": "constant", "keep_checkpoints": 9}


def test_the_number_of_processes_may_change_at_a_resume(zygote, prepared, tmp_path):
    """1, then 3, then 2 processes: the losses are those of one process throughout."""
    settings = {"max_steps": 50, "save_every": 1000, "log_every": 5, "mixed_precision": "no"}
    settings |= {"learning_rate": 3e-3, "lr_scheduler": "constant"}
    ranks = start_ranks(zygote, flags(prepared, tmp_path / "one", **settings), 1, tmp_path / "log")
    assert zygote.wait(ranks[0]) == 0, read(tmp_path / "log")
    for processes, until in ((1, 17), (3, 34), (2, 50)):
        words = flags(prepared, tmp_path / "changing", **{**settings, "max_steps": until})
        ranks = start_ranks(zygote, words, processes, tmp_path / "log")
        statuses = [zygote.wait(pid) for pid in ranks]
        assert statuses == [0] * processes, read(tmp_path / "log")
        require_numbers_of_this_session(tmp_path / "changing", read(tmp_path / "log"))
    one = {line["step"]: line["loss"] for line in lines(tmp_path / "one") if "loss" in line}
    changing = {
        line["step"]: line["loss"] for line in lines(tmp_path / "changing") if "loss" in line
    }
    assert one[50] < one[5] - 0.5
    for step, loss in one.items():
        if step not in (20, 35):  # the parts ended at 17 and 34 with a line of their own
            assert changing[step] == pytest.approx(loss, abs=1e-5)
    a, b = tensors(tmp_path / "one", 50), tensors(tmp_path / "changing", 50)
    for key, tensor in a.items():
        torch.testing.assert_close(b[key], tensor, rtol=1e-4, atol=1e-4)


def require_numbers_of_this_session(folder, printed):
    """What the run says of its hardware and its time, at its end and in its last line."""
    found, text = results(folder), (folder / "metrics.jsonl").read_text()
    last = [one for one in map(json.loads, text.splitlines()) if "mfu" in one][-1]
    assert last["seconds_left"] == 0 and 0 < last["seconds"] < found["seconds"]
    for figures in (found, last):
        assert 0 < figures["mfu"] < 3  # others use the machine, too
        assert 10**8 < figures["memory_peak_bytes"] < 10**11
    # The peak that it printed is that of all its processes together.
    *_, shown = re.findall(r"compute +([\d.]+) GFLOP a token, peak ([\d.,]+) GFLOP/s", printed)
    work, peak = (float(one.replace(",", "")) for one in shown)
    speed = found["mfu"] * peak / work
    assert speed == pytest.approx(found["tokens_per_second"], rel=0.01)


def test_peers_may_come_and_go_between_rounds(zygote, prepared, tmp_path):
    """2, then 3, then 1: every time all resume from the weights that were agreed on."""
    settings = {**DILOCO, "sync_every": 5, "compress": "int8", "save_every": 5}
    for processes, until in ((2, 15), (3, 30), (1, 40)):
        folder = finish(
            zygote, prepared, tmp_path / "run", processes, **settings, max_steps=until,
            lr_scheduler="constant", learning_rate=3e-3,
        )  # fmt: skip
    losses = [line["loss"] for line in lines(folder) if "loss" in line]
    assert losses[-1] < losses[0] - 0.5
    assert [line["peers"] for line in lines(folder) if "peers" in line] == [2, 2, 3, 3, 1]


def test_peers_may_change_while_the_pseudo_gradients_of_a_round_are_on_their_way(
    zygote, prepared, tmp_path
):
    """Until the next are sent it does not matter whether ranks wait for exchanges. (Other numbers
    of ranks and fragments: tests/sync/test_diloco.py.)"""
    settings = {**DILOCO, **CONSTANT, "compress": "int8"}
    settings |= {"sync_every": 5, "save_every": 5, "outer_warmup_rounds": 2}
    ends = []
    for name, overlap in (("waits", 0), ("overlaps", 2)):
        folder = tmp_path / name
        finish(zygote, prepared, folder, **settings, max_steps=8, overlap_steps=overlap)
        facts = read_state(folder / "checkpoint-5")["sync"]
        assert (sum(facts["lands_at"]) > 0) == (overlap > 0)
        begun = {"resume": folder / "checkpoint-5", "max_steps": 11}
        finish(zygote, prepared, folder, 3, **settings, **begun)
        ends.append(tensors(folder, 11))
    assert all(torch.equal(tensor, ends[1][key]) for key, tensor in ends[0].items())


def test_powersgd_resumes_from_any_update_rank_and_number_of_peers(zygote, prepared, tmp_path):
    """Its first updates, and those of one process, leave no matrices behind."""
    settings = {**CONSTANT, "compress": "powersgd", "save_every": 1}
    for processes, until, changes in (
        (1, 1, {}),
        (2, 2, {}),
        (2, 6, {}),
        (2, 8, {"powersgd_rank": 2}),
        (3, 10, {"powersgd_rank": 2}),
        (2, 12, {"compress": "int8"}),
    ):
        folder = finish(
            zygote, prepared, tmp_path / "run", processes, max_steps=until, **(settings | changes)
        )
    assert newest_step(folder) == 12
