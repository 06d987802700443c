"""Tried before a run, to know how long it takes: what comes after its updates."""

from __future__ import annotations

import time
from typing import Any

import torch

from p2p_llm_forge.model.compiling import uncompiled
from p2p_llm_forge.model.fit import in_evaluation
from p2p_llm_forge.training.job import Job

SAMPLED, AROUND = 60, 1.5  # tokens in the sample of text; the time of one over that of its forward
DISK = 200e6  # bytes per second, of a slow one


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
