"""A process that runs out of memory takes the same updates in smaller micro-batches."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

from tests import ROOT
from tests.runs import finish, flags, lines, read, results, start_each

pytestmark = pytest.mark.slow
# 512 blocks at a time keep some hundred MB, 64 a few dozen.
LARGE = {
    **{"config_overrides": "n_layer=2,n_head=2,n_embd=128,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"},
    **{"model_type": "gpt2", "batch_size": 512, "max_steps": 2, "log_every": 1},
    **{"learning_rate": 1e-3, "optimizer": "adamw"},
}


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: only it limits address space")
def test_a_run_out_of_memory_goes_on_with_the_same_updates(zygote, prepared, tmp_path):
    whole = finish(zygote, prepared, tmp_path / "whole", 1, **LARGE, micro_batch_size=64)
    words = flags(prepared, tmp_path / "little", **LARGE, micro_batch_size="auto")
    module = ["-m", "tests.multiprocess.little_memory", str(150 * 2**20)]
    done = subprocess.run(
        [sys.executable, *module, *words],
        cwd=ROOT,
        # Each tensor for itself: what lies free in the heap would be there beside the limit.
        env={**os.environ, "HF_HUB_OFFLINE": "1", "MALLOC_MMAP_THRESHOLD_": str(1 << 20)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    said = done.stdout + done.stderr
    assert "out of memory with micro-batches of 512; the same updates go on with 256" in said
    for ours, theirs in zip(lines(tmp_path / "little"), lines(whole), strict=True):
        assert ours["step"] == theirs["step"]
        for name in {"loss", "grad_norm"} & set(theirs):
            assert ours[name] == pytest.approx(theirs[name], rel=1e-4)


def test_ranks_with_settings_of_their_own_train_together(zygote, prepared, tmp_path):
    """One is to find the size that the other was given."""
    own = ({"micro_batch_size": "auto"}, {"micro_batch_size": 2})
    logs = [tmp_path / f"{rank}.log" for rank in range(2)]
    words = [flags(prepared, tmp_path / "run", **settings) for settings in own]
    ranks = start_each(zygote, words, logs)
    statuses = [zygote.wait(pid) for pid in ranks]
    assert statuses == [0, 0], read(logs[0]) + read(logs[1])
    assert results(tmp_path / "run")["steps"] == 3
