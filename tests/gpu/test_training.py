"""Runs of train.py on a GPU: precisions, compiling, kills, and two ranks that share one card."""

from __future__ import annotations

import math
import os
import signal

import pytest
import torch

from p2p_llm_forge.training.checkpoint import read_state
from tests.gpu.devices import DEVICE, IS_REHEARSAL, ON_A_GPU
from tests.runs import (
    DROPOUT,
    finish,
    flags,
    lines,
    read,
    start_each,
    tensors,
    wait_for_checkpoint,
    weights,
)

pytestmark = [*ON_A_GPU, pytest.mark.slow]
GPT2 = {"model_type": "gpt2", "optimizer": "adamw", "batch_size": 8, "log_every": 1}
GPT2["compile"] = "off"  # compiling takes longer than such a run
STEPS = 24


def losses(folder) -> list[float]:
    return [line["loss"] for line in lines(folder) if "loss" in line]


def test_bf16_learns_as_float32_does_and_keeps_float32_weights(zygote, generated, tmp_path):
    half, full = (
        finish(zygote, generated, tmp_path / name, 1, **GPT2, max_steps=STEPS, mixed_precision=name)
        for name in ("bf16", "no")
    )
    log = (tmp_path / "bf16.log").read_text()
    assert f"on {DEVICE}, precision bf16" in log
    assert losses(half) != losses(full)
    assert losses(half) == pytest.approx(losses(full), rel=0.01)
    assert losses(half)[-1] < losses(half)[0] - 0.1
    assert {tensor.dtype for tensor in weights(half).values()} == {torch.float32}


def test_compiled_updates_are_those_of_eager_ones(zygote, generated, tmp_path):
    asked = {**GPT2, "max_steps": 6, "mixed_precision": "no"}
    eager = finish(zygote, generated, tmp_path / "eager", 1, **asked)
    asked["compile"] = "on"
    log, words = tmp_path / "log", flags(generated, tmp_path / "compiled", **asked)
    # C++ takes a minute on a slow CPU: a rehearsal compiles with what needs no compiler.
    environ = {"ACCELERATE_DYNAMO_BACKEND": "eager"} if IS_REHEARSAL else {}
    assert zygote.wait(zygote.start(words, log, environ)) == 0, read(log)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(eager), rel=1e-4)


def test_fp16_skips_updates_that_overflow_and_resumes_its_scale(zygote, generated, tmp_path):
    asked = {**GPT2, "lr_scheduler": "constant"}
    # A scale at which fp16 overflows; float32, for which a CPU is asked here, does not.
    asked["mixed_precision"], first = ("no", 2.0**20) if IS_REHEARSAL else ("fp16", 2.0**36)

    def run(folder, first_scale: float, steps: int):
        log, words = folder.with_suffix(".log"), flags(generated, folder, **asked, max_steps=steps)
        how = {"environ": {"FIRST_SCALE": str(first_scale)}, "script": "tests.multiprocess.scaled"}
        assert zygote.wait(zygote.start(words, log, **how)) == 0, read(log)
        return folder

    calm, broken = run(tmp_path / "calm", first, STEPS), run(tmp_path / "broken", first, 12)
    run(broken, 64.0, STEPS)  # takes the scale of the checkpoint, not this one
    assert all(math.isfinite(loss) for loss in losses(calm))
    scaler = read_state(calm / f"checkpoint-{STEPS}")["scaler"]
    if not IS_REHEARSAL:
        norms = [line["grad_norm"] for line in lines(calm) if "grad_norm" in line]
        assert norms[0] is None and 0 < norms.count(None) < STEPS
        assert 1 < scaler[0]["scale"] < first
    assert scaler == read_state(broken / f"checkpoint-{STEPS}")["scaler"]
    assert_same(tensors(calm, STEPS), tensors(broken, STEPS))


@pytest.mark.parametrize("precision", ["no", "bf16"])
def test_a_killed_run_resumes_bit_for_bit(zygote, generated, tmp_path, precision):
    asked = {**GPT2, "config_overrides": DROPOUT, "mixed_precision": precision}
    asked |= {"micro_batch_size": 4, "save_every": 4, "eval_every": 12, "max_steps": 60}
    assert_resumes_bit_for_bit(zygote, generated, tmp_path, kills_after=(4, 24), **asked)


# Attention's fast kernels share a block of more than a hundred tokens out, and add its gradients in
# whatever order the parts are done (torch 2.13, unless deterministic algorithms are asked for).
AS_IT_IS = pytest.param(
    "train", marks=pytest.mark.xfail(not IS_REHEARSAL, reason="adds in any order", strict=False)
)


@pytest.mark.parametrize("script", [AS_IT_IS, "tests.gpu.deterministic"])
def test_a_killed_run_on_long_blocks_resumes_bit_for_bit(zygote, long_blocks, tmp_path, script):
    asked = {**GPT2, "mixed_precision": "bf16", "save_every": 4, "max_steps": 12}
    assert_resumes_bit_for_bit(
        zygote, long_blocks, tmp_path, kills_after=(4,), script=script, **asked
    )


def assert_resumes_bit_for_bit(
    zygote, data, tmp_path, kills_after, script="train", **asked
) -> None:
    """Compare a run that was killed after these steps, and resumed, with one that was not."""
    steps, logs = (
        asked["max_steps"],
        {name: tmp_path / f"{name}.log" for name in ("calm", "broken")},
    )

    def start(name: str) -> int:
        return zygote.start(flags(data, tmp_path / name, **asked), logs[name], script=script)

    assert zygote.wait(start("calm")) == 0, read(logs["calm"])
    for step in kills_after:
        pid = start("broken")
        wait_for_checkpoint(zygote, pid, tmp_path / "broken", step, logs["broken"])
        os.kill(pid, signal.SIGKILL)
        assert zygote.wait(pid) == -signal.SIGKILL
    assert zygote.wait(start("broken")) == 0, read(logs["broken"])
    assert "resuming" in logs["broken"].read_text()
    assert_same(tensors(tmp_path / "calm", steps), tensors(tmp_path / "broken", steps))
    assert lines(tmp_path / "broken") == lines(tmp_path / "calm")


@pytest.mark.parametrize("other", ["the same card", "a CPU"])
def test_two_ranks_on_gloo_take_the_updates_of_one(zygote, generated, tmp_path, other):
    asked = {**GPT2, "max_steps": 8, "mixed_precision": "no", "micro_batch_size": 4}
    alone = finish(zygote, generated, tmp_path / "alone", 1, **asked)
    both, logs = tmp_path / "both", [tmp_path / "rank0.log", tmp_path / "rank1.log"]
    words = flags(generated, both, **asked, backend="gloo")
    of_each = [words, [*words, "--cpu"] if other == "a CPU" else words]
    ranks = start_each(zygote, of_each, logs)
    statuses = [zygote.wait(pid) for pid in ranks]
    assert statuses == [0, 0], read(logs[0]) + read(logs[1])
    assert f"2 process(es) on {DEVICE}" in logs[0].read_text()
    assert losses(both) == pytest.approx(losses(alone), rel=1e-4)
    found, expected = weights(both), weights(alone)
    assert all(torch.allclose(found[key], one, atol=2e-4) for key, one in expected.items())


def assert_same(found: dict, expected: dict) -> None:
    """The same names, and every tensor to the last bit."""
    assert found.keys() == expected.keys()
    differing = [name for name, one in expected.items() if not torch.equal(one, found[name])]
    assert not differing
