"""The optimizer's groups are those of the field."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.model.optimizer import build_optimizer
from tests.runs import TINY_MODEL

KINDS = {
    "adamw": torch.optim.AdamW,
    "adafactor": torch.optim.Adafactor,
    "sgd": torch.optim.SGD,
}


@pytest.fixture(scope="module")
def lm(text):
    return build_model(TrainConfig(config_overrides=TINY_MODEL), text)


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
