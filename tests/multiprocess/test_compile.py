"""Runs with compiled layers are resumed exactly and published clean; no compiler, no run."""

from __future__ import annotations

import os
import signal
import subprocess
import sys

import pytest
import torch

from tests import ROOT
from tests.runs import (
    DROPOUT,
    finish,
    flags,
    lines,
    newest_step,
    read,
    results,
    tensors,
    wait_for_checkpoint,
    weights,
)

pytestmark = pytest.mark.slow
STEPS = 12
COMPILED = {"compile": "on", "config_overrides": DROPOUT, "micro_batch_size": 2}


def compiled_files(cache):
    """The machine code that was kept for later runs."""
    found = sorted(path for path in cache.rglob("*.so"))
    assert found
    return found


def test_a_compiled_run_is_resumed_exactly_and_published_as_any_other(zygote, prepared, tmp_path):
    from transformers import AutoModelForCausalLM

    cache = tmp_path / "kept"
    environ = {"TORCHINDUCTOR_CACHE_DIR": str(cache)}
    settings = {**COMPILED, "max_steps": STEPS, "save_every": 2, "eval_every": 6}
    calm, stormy, log = tmp_path / "calm", tmp_path / "stormy", tmp_path / "log"
    pid = zygote.start(flags(prepared, calm, **settings), log, environ=environ)
    assert zygote.wait(pid) == 0, read(log)
    assert f"compiled  layers; later runs find that in {cache}" in log.read_text()
    made = compiled_files(cache)

    pid = zygote.start(flags(prepared, stormy, **settings), log, environ=environ)
    wait_for_checkpoint(zygote, pid, stormy, 4, log)
    os.kill(pid, signal.SIGKILL)
    zygote.wait(pid)
    assert 4 <= newest_step(stormy) < STEPS
    settings["compile"] = "auto"  # goes on as it has begun
    pid = zygote.start(flags(prepared, stormy, **settings), log, environ=environ)
    assert zygote.wait(pid) == 0, read(log)
    assert compiled_files(cache) == made, "something was compiled again"
    expected, got = tensors(calm, STEPS), tensors(stormy, STEPS)
    assert expected.keys() == got.keys()
    assert all(torch.equal(one, got[name]) for name, one in expected.items())
    assert lines(stormy) == lines(calm)

    _, loading = AutoModelForCausalLM.from_pretrained(calm, output_loading_info=True)
    assert not loading["missing_keys"] and not loading["unexpected_keys"]
    assert not any("_orig_mod" in name for name in weights(calm))


@pytest.mark.parametrize("sync", ["ddp", "diloco"])
def test_ranks_train_compiled_layers_together(zygote, prepared, tmp_path, sync):
    # Three blocks for each of two ranks: the last micro-batch is smaller than the first.
    settings = {**COMPILED, "batch_size": 6, "balance": "auto", "sync": sync, "max_steps": 2}
    if sync == "diloco":
        settings["sync_every"] = 2
    run = finish(zygote, prepared, tmp_path / "run", **settings)
    assert results(run)["steps"] == 2
    assert "compiled  layers" in (tmp_path / "run.log").read_text()


def test_without_a_compiler_on_is_refused_and_auto_trains(prepared, tmp_path):
    environ = {**os.environ, "CXX": "/nowhere/g++", "HF_HUB_OFFLINE": "1"}

    def run(**settings):
        words = flags(prepared, tmp_path / "run", max_steps=1, **settings)
        command = [sys.executable, "train.py", *words]
        done = subprocess.run(
            command, cwd=ROOT, env=environ, capture_output=True, text=True, check=False
        )
        return done.returncode, done.stdout + done.stderr

    status, said = run(compile="on")
    assert status == 2, said
    assert "--compile needs a C++ compiler, and none was found" in said
    assert "sudo apt install g++" in said and "Traceback" not in said
    assert not (tmp_path / "run").exists()
    status, said = run(compile=None)  # the fix, followed
    assert status == 0, said
