"""Ranks of one machine share the orthogonalisation of Muon: as real processes, as launched."""

from __future__ import annotations

import os
import signal

import pytest
import torch

from tests.ports import free_port
from tests.runs import (
    DROPOUT,
    LONG,
    flags,
    lines,
    read,
    step_logged,
    tensors,
    wait_for_checkpoint,
    weights,
)
from tests.waiting import wait_until

pytestmark = pytest.mark.slow
MUON = {"optimizer": "muon", "learning_rate": 3e-3, "mixed_precision": "no", "peer_timeout": 8}


def launch(zygote, words, log, on_machines: tuple[int, ...]) -> list[int]:
    """Start ranks as torchrun would, so many on each machine. Returns process ids by rank."""
    port, world, pids = free_port(), sum(on_machines), []
    for here in on_machines:
        for local in range(here):
            environ = {"RANK": len(pids), "WORLD_SIZE": world, "MASTER_ADDR": "127.0.0.1"}
            environ |= {"LOCAL_RANK": local, "LOCAL_WORLD_SIZE": here, "MASTER_PORT": port}
            as_text = {name: str(value) for name, value in environ.items()}
            pids.append(zygote.start(words, log, as_text))
    return pids


def train(zygote, data, folder, on_machines: tuple[int, ...], **settings):
    log = folder.with_suffix(".log")
    pids = launch(zygote, flags(data, folder, **{**MUON, **settings}), log, on_machines)
    assert [zygote.wait(pid) for pid in pids] == [0] * len(pids), read(log)
    return folder


@pytest.mark.parametrize("by_secret", [False, True])
def test_ranks_that_share_take_the_updates_of_one(zygote, prepared, tmp_path, by_secret):
    """Three ranks: two of one machine, which share, and one of another, which does not."""
    settings = {"max_steps": 40, "batch_size": 6, "micro_batch_size": 2}
    together = {}
    if by_secret:
        secret = tmp_path / "secret"
        secret.write_text("of-these-three-machines-0123456789")
        secret.chmod(0o600)
        together["cluster_secret_file"] = secret
    one = train(zygote, prepared, tmp_path / "one", (1,), **settings)
    three = train(zygote, prepared, tmp_path / "three", (2, 1), **settings, **together)
    said = (tmp_path / "three.log").read_text()
    assert "in float32, shared by 2 processes of a machine" in said
    assert "shared by" not in (tmp_path / "one.log").read_text()
    expected, got = weights(one), weights(three)
    assert set(got) == set(expected)
    for name, tensor in expected.items():
        if not name.endswith("attn.c_attn.bias"):  # of keys: its gradient is rounding alone
            torch.testing.assert_close(got[name], tensor, rtol=0, atol=1e-5)


def test_a_run_that_shares_and_is_killed_ends_bit_for_bit_alike(zygote, prepared, tmp_path):
    settings = {"config_overrides": DROPOUT, "max_steps": 30, "save_every": 4, "log_every": 3}
    settings |= {"mixed_precision": "bf16"}
    calm = train(zygote, prepared, tmp_path / "calm", (2,), **settings)
    stormy, log = tmp_path / "stormy", tmp_path / "log"
    for goal, victim in ((8, 1), (16, 0)):
        pids = launch(zygote, flags(prepared, stormy, **{**MUON, **settings}), log, (2,))
        wait_for_checkpoint(zygote, pids[victim], stormy, goal, log)
        os.kill(pids[victim], signal.SIGKILL)
        assert zygote.wait(pids[1 - victim]) in (1, 2), read(log)
    train(zygote, prepared, stormy, (2,), **settings)
    expected, got = tensors(calm, 30), tensors(stormy, 30)
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, got[key]), key
    assert lines(stormy) == lines(calm)


def test_a_rank_that_is_lost_ends_those_that_share_with_it(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    pids = launch(zygote, flags(prepared, folder, **MUON, **LONG), log, (2,))
    wait_until(lambda: zygote.has_ended(pids[0]) or step_logged(folder) >= 5)
    os.kill(pids[1], signal.SIGKILL)
    assert zygote.wait(pids[0]) == 1, read(log)
    assert "rank 1" in read(log) and "Traceback" not in read(log)
