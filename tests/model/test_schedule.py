"""Learning rates are those of transformers' schedulers, as functions of the step alone."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.model.schedule import learning_rate_factor


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
