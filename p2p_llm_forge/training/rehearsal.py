"""Tried before a run, to know how long it takes: updates of a model, and what comes after them."""

from __future__ import annotations

import time
from statistics import median
from typing import Any

import torch

from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.model.build import recompute_activations
from p2p_llm_forge.model.compiling import uncompiled
from p2p_llm_forge.model.dropout import add_dropout
from p2p_llm_forge.model.fit import in_evaluation
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.model.optimizer import build_optimizer
from p2p_llm_forge.training.forecast import seconds
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.learner import first_micro_batch, new_model
from p2p_llm_forge.training.numbers import active_parameters

SAMPLED, AROUND = 60, 1.5  # tokens in the sample of text; the time of one over that of its forward
DISK = 200e6  # bytes per second, of a slow one


class Trial:
    """A model that takes a few updates to be timed, and is thrown away."""

    def __init__(self, job: Job, blocks: Blocks) -> None:
        lm = new_model(job)
        add_dropout(lm, job.config.dropout or 0)
        if job.config.gradient_checkpointing:
            recompute_activations(lm)
        self._accelerator = job.cluster.accelerator
        self._model = NextTokenLoss(lm.to(job.cluster.device), job.document_end).train()
        self._optimizer = build_optimizer(job.config, lm)
        self._batch = first_micro_batch(job, blocks)
        products = active_parameters(lm)  # None: how many experts a token takes is not known
        self.parameters = int(products or sum(p.numel() for p in lm.parameters()))
        self.trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        self.forwards_s: list[float] = []
        self._updates_s: list[float] = []

    def run(self) -> None:
        """One more micro-batch, and an update after each of the first."""
        self.forwards_s.append(seconds(self._micro_batch))
        if len(self._updates_s) < 3:
            self._updates_s.append(seconds(self._update))

    def figures(self) -> list[float]:
        """Seconds of a token and of an update; the first of each makes buffers and moments."""
        token_s = median(self.forwards_s[1:]) / self._batch.targets.numel()
        return [token_s, min(self._updates_s[1:])]

    def _micro_batch(self) -> None:
        with self._accelerator.autocast():
            nats, _ = self._model(*self._batch)
        (nats / self._batch.targets.numel()).backward()

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def ending_s(lm: Any, samples: int = 1, is_merged: bool = False) -> float:
    """Seconds that the end of a run takes after its last evaluation: saving, and samples of text.

    is_merged: a whole model is made of adapters then.

    What is imported for it is imported now, when nothing depends on how long that takes.
    """
    import p2p_llm_forge.training.language_modeling_metric  # noqa: F401

    token, spent_s = torch.zeros((1, 1), dtype=torch.long, device=lm.device), []
    with in_evaluation(lm), uncompiled():
        for _ in range(3):
            began = time.perf_counter()
            float(lm(token).logits.sum())
            spent_s.append(time.perf_counter() - began)
    # Weights and two moments are copied, written, read for their checksums; weights are published.
    saved = [p for p in lm.parameters() if p.requires_grad or is_merged]
    saving_s = 8 * sum(p.nbytes for p in saved) / DISK
    return AROUND * SAMPLED * samples * min(spent_s) + saving_s + 20 * min(spent_s) + 1.0


def validation_tokens(job: Job) -> int:
    """Tokens that the first rank evaluates at the end, and no rank more: they take turns."""
    split, micro = job.data.manifest.splits.get("validation"), job.plan.micro_batch_size
    there = split.blocks if split else 0
    turns, rest = divmod(
        min(job.config.eval_blocks or there, there), micro * job.cluster.world_size
    )
    return (turns * micro + min(rest, micro)) * job.data.manifest.sequence_length
