"""The optimizer of a run, and its learning rate at every update."""

from __future__ import annotations

from collections.abc import Callable

import torch
from transformers import get_scheduler

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.muon import BETAS, Muon, are_fusible, matrices_inside_layers

SHORT_NAMES = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}


def build_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer, with weight decay on matrices only (biases, norms and such go free).

    Raises ForgeError where Muon has nothing to do in the model.
    """
    parameters = [p for p in model.parameters() if p.requires_grad]
    orthogonalised = matrices_inside_layers(model) if config.optimizer == "muon" else []
    taken = set(map(id, orthogonalised))
    left = [p for p in parameters if id(p) not in taken]
    groups = [
        {"params": [p for p in left if p.dim() >= 2], "weight_decay": config.decay()},
        {"params": [p for p in left if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    rate = config.learning_rate or 0.0  # the loop sets it at every update
    if config.optimizer == "muon":
        if not orthogonalised:
            raise ForgeError(
                "--optimizer muon is for matrices inside layers, and this model has none to train",
                "use --optimizer adamw",
            )
        return Muon(orthogonalised, groups, rate, config.decay())
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=rate)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=rate)
    fused = are_fusible(parameters)
    return torch.optim.AdamW(groups, lr=rate, betas=BETAS, fused=fused)


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The fraction of the peak learning rate at an update (counted from 0): a function of it alone.

    The shapes are transformers' own; because they depend on nothing but the step, no scheduler
    state is kept, saved or stepped. Which ones do is known to `config.train.SCHEDULES`.
    """
    asked = config.lr_scheduler or "cosine"
    name = SHORT_NAMES.get(asked, asked)
    # WSD decays over the last fifth, as its authors do for short runs (arXiv 2404.06395).
    special = {"num_decay_steps": max(1, total_steps // 5)} if name == "warmup_stable_decay" else {}
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    schedule = get_scheduler(
        name, unused, config.warmup_steps or 0, total_steps, scheduler_specific_kwargs=special
    )
    return schedule.lr_lambdas[0]
