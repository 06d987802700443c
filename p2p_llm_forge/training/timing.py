"""What a run with `--minutes` comes to in that time: measured, then planned."""

from __future__ import annotations

import time
from dataclasses import replace
from typing import Any

import torch

from p2p_llm_forge.model.fit import in_evaluation
from p2p_llm_forge.training.budget import FEWEST_UPDATES, Budget
from p2p_llm_forge.training.forecast import update_s_by_rank
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.learner import new_model
from p2p_llm_forge.training.manifest import steps_saved

SAMPLED = 60  # tokens in the sample of text
AROUND = 1.5  # what writing a token of it takes, over the forward
DISK = 200e6  # bytes per second, of a slow one
FIRST_GUESS = 1000  # updates of a run that resumes, until its checkpoint says how many


def timed(job: Job, began: float) -> Job:
    """The job with the number of updates that `--minutes` has time for. All ranks must call.

    began: when this session did, by `time.monotonic`. Raises ForgeError where that is no time.
    """
    config, cluster, plan = job.config, job.cluster, job.plan
    assert config.minutes is not None
    budget = Budget(config.minutes * 60, began)
    if config.resume and cluster.main_only(lambda: bool(steps_saved(job.output_dir))):
        return replace(job, plan=replace(plan, total_steps=FIRST_GUESS), budget=budget)
    cluster.main_only(budget.require_start)
    update_s = max(update_s_by_rank(job, cluster.together(lambda: new_model(job))))
    ending = FEWEST_UPDATES * update_s
    cluster.main_only(lambda: budget.require_start(ending))
    (left_s,) = cluster.gather_numbers([budget.left_s])[0]
    total_steps = max(FEWEST_UPDATES, int(left_s / update_s))
    return replace(job, plan=replace(plan, total_steps=total_steps), budget=budget)


def ending_s(lm: Any) -> float:
    """Seconds that the end of a run takes after its last evaluation: saving, and a sample of text.

    What is imported for it is imported now, when nothing depends on how long that takes.
    """
    import p2p_llm_forge.training.language_modeling_metric  # noqa: F401

    token, spent_s = torch.zeros((1, 1), dtype=torch.long, device=lm.device), []
    with in_evaluation(lm):
        for _ in range(3):
            began = time.perf_counter()
            float(lm(token).logits.sum())
            spent_s.append(time.perf_counter() - began)
    # Weights and two moments are copied, written, read for their checksums; weights are published.
    saving_s = 8 * sum(p.nbytes for p in lm.parameters()) / DISK
    return AROUND * SAMPLED * min(spent_s) + saving_s + 20 * min(spent_s) + 1.0


def validation_tokens(job: Job) -> int:
    """Tokens that this rank evaluates at the end."""
    split = job.data.manifest.splits.get("validation")
    tokens = split.blocks * job.data.manifest.sequence_length if split else 0
    return -(-tokens // job.cluster.world_size)
