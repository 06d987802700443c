"""Options of an update: ranges, and the names of optimizers and schedules."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.update import SCHEDULES


@pytest.mark.parametrize("name", ["batch_size", "max_steps", "micro_batch_size"])
def test_sizes_start_at_1(name):
    (problem,) = TrainConfig("data", "run", **{name: 0}).problems().found
    assert problem.fix == "use 1 or more"


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_learning_rate_is_a_finite_number_above_0(value):
    (problem,) = TrainConfig("data", "run", learning_rate=value).problems().found
    assert problem.found == f"--learning-rate is {value}"


def test_a_seed_has_at_most_63_bits():
    assert not TrainConfig("data", "run", seed=2**63 - 1).problems().found
    assert TrainConfig("data", "run", seed=2**63).problems().found


def test_schedules_are_those_of_transformers_that_need_only_the_step():
    import torch
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType

    alone = set()
    for kind in SchedulerType:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        special = {"num_decay_steps": 2} if kind.value == "warmup_stable_decay" else {}
        try:
            made = get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=special)
            made.lr_lambdas[0](3)
        except (AttributeError, TypeError, ValueError):
            continue
        alone.add(kind.value)
    assert alone >= {"linear", "cosine"}
    assert set(SCHEDULES) == alone | {"wsd"}


@pytest.mark.parametrize(
    ("name", "fix"),
    [("cosin", "did you mean cosine"), ("reduce_lr_on_plateau", "choose from: constant")],
)
def test_schedules_that_cannot_be_used_are_refused(name, fix):
    (problem,) = TrainConfig("data", "run", lr_scheduler=name).problems().found
    assert f"unknown schedule '{name}'" in problem.found and fix in problem.fix
