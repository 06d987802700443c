"""Ranks are timed by one block first, and by more as far as time and memory go."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import micro_batch, trial
from p2p_llm_forge.training.learner import new_model
from p2p_llm_forge.training.planner import Text, products
from p2p_llm_forge.training.trial import new_trial, take_turns
from tests.training.slow_models import SlowModels, too_small_for_more_than


@pytest.fixture
def open_job(open_small_job):
    """A job whose forwards need no Accelerate, and take 8 blocks where nothing is asked."""

    def opened(**settings):
        job = open_small_job(optimizer="adamw", **settings)
        job.cluster.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
        return job

    return opened


@pytest.fixture
def slow(monkeypatch):
    return SlowModels(trial, monkeypatch)


def tried(job, most_s=1e9, least_s=0.0, suffices_for=None):
    one = new_trial(job, job.data.train_blocks(), most_s)
    if suffices_for is not None:
        one._model.register_forward_pre_hook(too_small_for_more_than(suffices_for))
    take_turns([one], least_s)
    return one


def test_a_trial_measures_a_token_and_an_update(open_job):
    job = open_job()
    one = tried(job)
    token_s, update_s = one.figures()
    assert 0 < token_s < 1 and 0 < update_s < 10
    total = sum(p.numel() for p in new_model(job).parameters())
    assert one.parameters == total - 32 * 32  # embeddings of positions; that of words is the head


def test_the_size_of_a_given_model_is_what_the_law_was_fitted_on(open_small_job):
    """Of a chosen one it is computed from the depth: the embedding is no product, the head is."""
    job = open_small_job(**dict.fromkeys(("model_type", "config_overrides")), depth=2)
    job.cluster.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    text = Text(1, 1.0, vocabulary=300, sequence_length=32, compressed=2.5)
    found = new_trial(job, job.data.train_blocks()).parameters
    assert found == pytest.approx(products(2, text), rel=0.005)
    assert found < 0.95 * sum(p.numel() for p in new_model(job).parameters())


def test_with_time_it_goes_on_with_as_many_blocks_as_the_run_takes(open_job, slow):
    slow.block_s = 0.5
    one = tried(open_job())
    assert slow.sizes == [1, 1, 8, 8, 8]
    assert one.figures()[0] == pytest.approx(0.5 / 32)
    slow.sizes.clear()
    tried(open_job(), least_s=30.0)
    assert slow.sizes == [1, 1, *[8] * 8] and slow.now() > 30


@pytest.mark.parametrize(
    ("most_s", "sizes"),
    [
        (30.0, [1]),  # one alone takes 37 s
        (40.0, [1]),
        (80.0, [1, 1]),
        (150.0, [1, 1, 1]),
        (37 * 11, [1, 1, 3, 3, 3]),
    ],
)
def test_a_slow_model_is_tried_with_what_there_is_time_for(open_job, slow, most_s, sizes):
    slow.block_s = 37.0
    one = tried(open_job(), most_s)
    assert slow.sizes == sizes and one.spent_s <= max(most_s, 37.0)
    assert one.figures()[0] == pytest.approx(37 / 32)


def test_a_slow_trial_keeps_none_from_its_turns(open_job, slow):
    """What is left of its own time is none of the other's."""
    blocks, seen = open_job().data.train_blocks(), []
    first, second = (new_trial(open_job(), blocks, 20.0) for _ in range(2))
    for one, block_s in ((first, 15.0), (second, 0.1)):
        real = one.run

        def run(real=real, one=one, block_s=block_s):
            slow.block_s = block_s
            seen.append(one)
            real()

        one.run = run
    take_turns([first, second], least_s=2.0)
    assert seen == [first, *[second] * 5]
    assert slow.sizes == [1, 1, 1, 8, 8, 8]


@pytest.mark.parametrize(("suffices_for", "last"), [(8, 8), (7, 4), (2, 2), (1, 1)])
def test_auto_is_tried_with_half_where_memory_is_too_small(open_job, slow, suffices_for, last):
    one = tried(open_job(micro_batch_size="auto"), suffices_for=suffices_for)
    assert slow.sizes[-2:] == [last, last]
    assert one.figures()[0] >= 0


@pytest.mark.parametrize("most_s", [14.0, 22.0, 40.0])
def test_where_time_is_over_when_memory_was_too_small_the_figures_before_count(
    open_job, slow, monkeypatch, most_s
):
    """A token takes the same with any number of blocks here: 1 s a block."""
    slow.block_s, real = 1.0, trial.Trial._update

    def update(self):
        slow.wait(4.0)
        real(self)

    monkeypatch.setattr(trial.Trial, "_update", update)
    one = tried(open_job(micro_batch_size="auto"), most_s, suffices_for=2)
    assert one.figures() == [pytest.approx(1 / 32), 4.0]


def test_a_slow_start_alone_decides_nothing(open_job, slow):
    slow.block_s = 2.5  # of which most is a library's start
    job = open_job()
    one = new_trial(job, job.data.train_blocks(), 1.5)
    one.run()
    slow.block_s = 0.2
    take_turns([one], 0.0)
    assert slow.sizes[:2] == [1, 1] and one.figures()[0] == pytest.approx(0.2 / 32)


def test_auto_is_tried_with_no_more_than_memory_has_been_seen_to_suffice_for(
    open_job, slow, monkeypatch
):
    """Where too much kills the process, it is never tried."""
    job = open_job(micro_batch_size="auto")
    need = micro_batch.measured_memory(job, tried(job)._model, moments=0)
    free = (need.fixed + 3.5 * need.per_block) / micro_batch.USABLE_SHARE
    monkeypatch.setattr(micro_batch, "free_bytes", lambda device: free)
    slow.sizes.clear()
    tried(job)
    assert max(slow.sizes) == slow.sizes[-1] == 3


def test_where_one_block_does_not_fit_a_trial_says_what_would(open_job):
    with pytest.raises(ForgeError, match="not even one block of 32 tokens fits") as error:
        tried(open_job(micro_batch_size="auto"), suffices_for=0.5)
    assert "prepare the data with --sequence-length 16" in error.value.problems[0].fix


def test_a_size_that_was_asked_for_is_tried_as_it_is(open_job, slow):
    with pytest.raises(torch.OutOfMemoryError):
        tried(open_job(micro_batch_size=4), suffices_for=2)
    assert slow.sizes[-1] == 1  # the hook comes before the forward of 4


def test_time_that_memory_is_looked_at_counts(open_job, slow):
    """Three blocks more, and no growth without time for it."""
    slow.block_s = 1.0
    one = tried(open_job(micro_batch_size="auto"), most_s=9.0)
    assert slow.sizes == [1, 1, 1, 2, 1] and one.spent_s == 6.0
