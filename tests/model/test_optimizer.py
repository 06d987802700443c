"""The optimizer's groups are those of the field, and rates those of transformers' schedulers."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.model.muon import Muon
from p2p_llm_forge.model.optimizer import build_optimizer, learning_rate_factor
from tests.runs import TINY

KINDS = {
    "adamw": torch.optim.AdamW,
    "muon": Muon,
    "adafactor": torch.optim.Adafactor,
    "sgd": torch.optim.SGD,
}


@pytest.fixture(scope="module")
def lm(text):
    return build_model(TrainConfig(**TINY), text)


@pytest.mark.parametrize("name", KINDS)
def test_only_matrices_are_decayed(lm, name):
    optimizer = build_optimizer(TrainConfig(optimizer=name, weight_decay=0.3), lm)
    assert type(optimizer) is KINDS[name]
    decay_of = {
        id(p): group["weight_decay"] for group in optimizer.param_groups for p in group["params"]
    }
    assert len(decay_of) == len(list(lm.parameters()))
    for name, parameter in lm.named_parameters():
        assert decay_of[id(parameter)] == (0.3 if parameter.dim() >= 2 else 0.0), name


def test_frozen_parameters_and_empty_groups_are_left_out():
    layers = torch.nn.Sequential(torch.nn.Linear(2, 3, bias=False), torch.nn.Linear(3, 1))
    layers[1].requires_grad_(False)
    (group,) = build_optimizer(TrainConfig(), layers).param_groups
    assert group["params"] == [layers[0].weight]


@pytest.mark.parametrize(
    ("name", "theirs", "extra"),
    [
        ("linear", "linear", {}),
        ("cosine", "cosine", {}),
        ("constant", "constant_with_warmup", {}),
        ("wsd", "warmup_stable_decay", {"num_decay_steps": 20}),
        ("polynomial", "polynomial", {}),
    ],
)
def test_the_rate_at_a_step_is_that_of_transformers_scheduler_stepped_there(name, theirs, extra):
    from transformers import get_scheduler

    optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=2.0)
    stepped = get_scheduler(theirs, optimizer, 10, 100, scheduler_specific_kwargs=extra)
    factor = learning_rate_factor(TrainConfig(lr_scheduler=name, warmup_steps=10), 100)
    # The polynomial schedule ends at an absolute rate, 1e-7, so it is not exactly proportional.
    for step in range(100):
        assert 2.0 * factor(step) == pytest.approx(optimizer.param_groups[0]["lr"], abs=1e-6)
        optimizer.step()
        stepped.step()
