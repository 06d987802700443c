"""Whether a run is compiled: as asked, as begun, or by a trial; all ranks come to one answer."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.compiling import Trial, require_compiler
from p2p_llm_forge.training import compilation
from p2p_llm_forge.training.compilation import has_compiler, pays_back, was_compiled


@pytest.mark.parametrize(
    ("trial", "updates", "pays"),
    [
        (Trial(eager_s=1.0, compiled_s=0.8, compile_s=10.0), 51, True),  # 10.2 s for 10 s
        (Trial(eager_s=1.0, compiled_s=0.8, compile_s=10.0), 49, False),
        (Trial(eager_s=1.0, compiled_s=1.2, compile_s=10.0), 10**6, False),
        (Trial(eager_s=1.0, compiled_s=0.99, compile_s=0.1), 10**6, False),  # within the noise
    ],
)
def test_compiling_pays_where_it_saves_more_than_it_takes(trial, updates, pays):
    assert pays_back(trial, updates) is pays


@pytest.mark.parametrize(
    ("recorded", "answer"),
    [
        ({"compile": "on"}, "on"),
        ({"compile": "off"}, "off"),
        ({"compile": True}, "on"),  # as it was recorded when it was a flag
        ({"compile": False}, "off"),
        ({}, "off"),
    ],
)
def test_a_checkpoint_says_whether_its_run_was_compiled(recorded, answer):
    assert was_compiled(recorded) == answer


@pytest.mark.parametrize(
    ("update_s", "trials", "answer"),
    [
        (0.001, [], False),  # a run of seconds is not worth a trial
        (100.0, [Trial(1.0, 0.5, 9.0)], True),
        (100.0, [Trial(1.0, 1.1, 9.0)], False),
    ],
)
def test_a_trial_is_made_where_it_can_pay(monkeypatch, open_small_job, update_s, trials, answer):
    job, left = open_small_job(max_steps=50), list(trials)
    monkeypatch.setattr(compilation, "update_s_at_most", lambda *_: update_s)
    monkeypatch.setattr(compilation, "trial", lambda *_: left.pop())
    monkeypatch.setattr(compilation, "repeated_layers", lambda _: ["layer"])
    model = type("Model", (), {"lm": None})
    assert compilation.pays(job, model) is answer
    assert not left, "no trial was made"


def test_without_triton_a_gpu_compiles_nothing_until_it_is_installed(monkeypatch):
    gpu, is_there = torch.device("cuda"), [False]
    monkeypatch.setattr("torch.utils._triton.has_triton", lambda: is_there[0])
    with pytest.raises(ForgeError, match="--compile needs Triton") as refused:
        require_compiler(gpu)
    install, leave_out = refused.value.problems[0].fix.split(", or ")
    assert leave_out == "leave --compile out" and not has_compiler(gpu)  # which auto asks
    assert "install the triton" in install
    is_there[0] = True
    require_compiler(gpu)
