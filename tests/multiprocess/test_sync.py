"""How ranks agree on weights: every strategy, as real processes, against runs of another kind."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.conftest import TINY_MODEL
from tests.multiprocess.conftest import flags, lines, tensors
from tests.multiprocess.test_kill_and_resume import newest_step, read, start_ranks

pytestmark = pytest.mark.slow
DROPOUT = TINY_MODEL + ",resid_pdrop=0.1"
PLAIN_SGD = {
    **{"optimizer": "sgd", "learning_rate": 0.1, "lr_scheduler": "constant", "weight_decay": 0},
    **{"max_grad_norm": 0, "mixed_precision": "no"},
}
# Its rate and momentum change while the run is killed and resumed.
DILOCO = {"sync": "diloco", "outer_lr": 0.7, "outer_momentum": 0.9, "outer_warmup_rounds": 4}


def finish(zygote, prepared, folder, processes=2, **settings):
    """A run that is left in peace; returns its folder."""
    log = folder.with_suffix(".log")
    ranks = start_ranks(zygote, flags(prepared, folder, **settings), processes, log)
    assert [zygote.wait(pid) for pid in ranks] == [0] * processes, read(log)
    return folder


def weights(folder: Path) -> dict[str, torch.Tensor]:
    found = load_file(folder / "model.safetensors")
    assert found
    return found


STRATEGIES = {
    "fp16": {"compress": "fp16"},
    "bf16": {"compress": "bf16"},
    "int8": {"compress": "int8"},
    "int4": {"compress": "int4"},
    "powersgd": {"compress": "powersgd", "powersgd_rank": 2},
    "diloco": {**DILOCO, "sync_every": 6},
    "diloco_int8": {**DILOCO, "sync_every": 6, "compress": "int8", "ddp_warmup_steps": 4},
    "streaming_int4": {
        **{**DILOCO, "sync_every": 6, "compress": "int4"},
        **{"fragments": 2, "overlap_steps": 2},
    },
}


@pytest.mark.parametrize("name", STRATEGIES)
def test_a_run_killed_and_resumed_ends_bit_for_bit_alike(zygote, prepared, tmp_path, name):
    """Saved at every fourth step: in the middle of rounds, and while moves are on their way."""
    settings = {
        **{"config_overrides": DROPOUT, "max_steps": 34, "save_every": 4, "log_every": 3},
        **{"keep_checkpoints": 9, "peer_timeout": 8, **STRATEGIES[name]},
    }
    calm = finish(zygote, prepared, tmp_path / "calm", **settings)
    stormy, log = tmp_path / "stormy", tmp_path / "log"
    for goal in (8, 20):
        ranks = start_ranks(zygote, flags(prepared, stormy, **settings), 2, log)
        while newest_step(stormy) < goal:
            assert not zygote.has_ended(ranks[1]), read(log)
            time.sleep(0.001)
        os.kill(ranks[1], signal.SIGKILL)
        assert zygote.wait(ranks[0]) in (1, 2), read(log)
    finish(zygote, prepared, stormy, **settings)
    expected, got = tensors(calm, 34), tensors(stormy, 34)
    assert set(got) == set(expected)
    for key, tensor in expected.items():
        assert torch.equal(tensor, got[key]), key
    assert lines(stormy) == lines(calm)
    assert not list(stormy.glob("tmp-*"))
    own = load_file(calm / "checkpoint-32" / "rank-00001.safetensors")
    assert all(
        torch.equal(tensor, load_file(stormy / "checkpoint-32" / "rank-00001.safetensors")[key])
        for key, tensor in own.items()
    )
