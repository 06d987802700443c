"""What is tried before a run takes time, and leaves nothing."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.model.compiling import repeated_layers
from p2p_llm_forge.training.learner import new_model
from p2p_llm_forge.training.rehearsal import ending_s, validation_tokens


@pytest.fixture
def job(open_small_job):
    job = open_small_job(optimizer="adamw")
    job.cluster.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    return job


def test_the_end_is_rehearsed_without_a_trace(job):
    lm = new_model(job).train()
    before = {name: value.clone() for name, value in lm.state_dict().items()}
    state = torch.random.get_rng_state()
    assert ending_s(lm) > 1
    assert lm.training and torch.equal(state, torch.random.get_rng_state())
    assert all(torch.equal(before[name], value) for name, value in lm.state_dict().items())


def test_the_tokens_of_the_evaluation_are_those_of_the_split(job):
    split = job.data.manifest.splits["validation"]
    assert validation_tokens(job) == split.blocks * 32 > 0
    sampled = replace(job, config=replace(job.config, eval_blocks=5))
    assert validation_tokens(sampled) == 5 * 32 < split.blocks * 32


@pytest.mark.parametrize(("ranks", "blocks"), [(1, 21), (2, 20), (3, 8), (4, 4), (5, 1)])
def test_the_first_rank_evaluates_as_much_as_any(job, ranks, blocks):
    """By a loop over the micro-batches, which the ranks take in turn."""
    job = replace(job, config=replace(job.config, eval_blocks=blocks))
    job = replace(job, plan=replace(job.plan, micro_batch_size=3))
    job.cluster.world_size = ranks
    taken = [0] * ranks
    for number, start in enumerate(range(0, blocks, 3)):
        taken[number % ranks] += len(range(blocks)[start : start + 3])
    assert validation_tokens(job) == 32 * taken[0] == 32 * max(taken)


def test_nothing_is_compiled_for_the_end(job):
    lm, compiled = new_model(job), []

    def backend(graph, _):
        compiled.append(graph)
        return graph.forward

    repeated_layers(lm)[0].compile(backend=backend)
    ending_s(lm)
    assert not compiled
    lm(torch.zeros((1, 8), dtype=torch.long))
    assert compiled  # so the backend is asked where something may be compiled
