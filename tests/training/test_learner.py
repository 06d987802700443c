"""The model of a run is the same on every rank, and ready before the first update."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training.learner import (
    build_or_load,
    first_micro_batch,
    new_model,
    prime,
    text_spec_of,
)


def test_a_checkpoint_that_this_machine_does_not_see_is_named(open_small_job, tmp_path):
    with pytest.raises(ForgeError, match="checkpoint-9 is not seen from here") as error:
        build_or_load(open_small_job(), tmp_path / "checkpoint-9")
    assert error.value.problems[0].fix == "share the folder, or copy it to this machine"


def test_a_run_begins_with_a_model_that_fits_its_data(open_small_job, prepared):
    job = open_small_job()
    lm, manifest = new_model(job), job.data.manifest
    assert lm.config.vocab_size == manifest.vocab_size
    assert lm.config.n_positions == manifest.sequence_length
    assert lm.config.eos_token_id == manifest.eos_token_id
    assert text_spec_of(job.data).tokenizer_dir == prepared / "tokenizer"


def test_the_first_micro_batch_is_that_of_the_split(open_small_job):
    job = open_small_job(micro_batch_size=2)
    inputs, targets, begins = first_micro_batch(job, job.data.train_blocks())
    assert begins is None
    assert inputs.shape == targets.shape == (2, 32)
    assert torch.equal(inputs[0, 1:], targets[0, :-1])
    assert inputs[0, 0] == job.data.manifest.eos_token_id


def test_priming_takes_a_backward_and_leaves_no_gradient(open_small_job):
    job, seen = open_small_job(), []

    class Model(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(1))

        def forward(self, inputs, targets, begins):
            self.weight.register_hook(seen.append)
            return self.weight.sum() * inputs.numel(), None

    model, sync = Model(), SimpleNamespace(priming=contextlib.nullcontext)
    prime(job, SimpleNamespace(model=model), sync, job.data.train_blocks())
    assert [float(gradient) for gradient in seen] == [8 * 32] and model.weight.grad is None
