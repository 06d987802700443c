"""Lines hold the mean loss of all ranks' updates, the same across a resume."""

from __future__ import annotations

import math
from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training.loss_window import NO_LOSSES, LossWindow

TOKENS = 10
ALONE = SimpleNamespace(gather_numbers=lambda values: [values])


def window_of(cluster=ALONE, first_step=0, since_log=NO_LOSSES, **settings):
    return LossWindow(cluster, first_step, since_log, **settings)


def take(window, losses):
    for loss in losses:
        window.add(torch.tensor(loss, dtype=torch.float64), TOKENS)


def test_a_line_holds_the_mean_over_the_tokens_of_all_ranks():
    other = [3.0, 4.0, 5.0]
    window = window_of(SimpleNamespace(gather_numbers=lambda values: [values, other]))
    take(window, [1.0, 2.0])
    window.end_line({"step": 2})
    assert window.has_line()
    take(window, [7.0])
    assert window.settle() == [{"step": 2, "loss": (1 + 2 + 3 + 4) / (2 * TOKENS)}]
    kept = {"nats": [7.0, 5.0], "updates": 1, "tokens": TOKENS, "is_spoiled": False}
    assert window.since_log() == kept
    assert not window.has_line()


def test_a_line_is_the_same_whether_or_not_the_run_was_resumed_in_between():
    losses = [0.1 * 3**step for step in range(12)]
    straight = window_of()
    take(straight, losses)
    straight.end_line({"step": 12})
    for cut in range(12):
        first = window_of()
        take(first, losses[:cut])
        assert first.settle() == []
        second = window_of(first_step=cut, since_log=first.since_log())
        take(second, losses[cut:])
        second.end_line({"step": 12})
        assert second.settle() == [{"step": 12, "loss": math.fsum(losses) / (12 * TOKENS)}]
    assert straight.settle() == [{"step": 12, "loss": math.fsum(losses) / (12 * TOKENS)}]


def test_a_line_counts_each_update_by_the_tokens_that_are_trained_in_it():
    """Of conversations: a mean of means would be another number."""
    window = window_of()
    for nats, tokens in ((6.0, 2), (1.0, 10), (8.0, 3)):
        window.add(torch.tensor(nats, dtype=torch.float64), tokens)
    window.end_line({"step": 3})
    assert window.settle() == [{"step": 3, "loss": 15.0 / 15}]
    assert window.since_log()["tokens"] == 0


def test_what_a_save_keeps_of_the_losses_is_a_copy():
    """The background writer reads it while the run continues."""
    window = window_of()
    take(window, [1.0])
    window.settle()
    kept = window.since_log()
    take(window, [2.0])
    window.settle()
    assert kept == {"nats": [1.0], "updates": 1, "tokens": TOKENS, "is_spoiled": False}
    assert NO_LOSSES["nats"] == []


def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_step_and_the_rank():
    window = window_of(
        SimpleNamespace(gather_numbers=lambda values: [[1.0, 1.0], values]), first_step=7
    )
    take(window, [1.0, math.nan])
    with pytest.raises(ForgeError) as error:
        window.settle()
    (problem,) = error.value.problems
    assert "NaN or infinite at step 9 (first on rank 1)" in problem.found
    assert "lower --learning-rate" in problem.fix


def test_where_rounds_are_undone_such_a_line_has_no_loss_and_the_next_has_one():
    window = window_of(rolls_back_after=1)
    take(window, [1.0, math.inf])
    window.end_line({"step": 2})
    take(window, [3.0])
    window.end_line({"step": 3})
    assert [line["loss"] for line in window.settle()] == [None, 3.0 / TOKENS]
    early = window_of(rolls_back_after=1)
    take(early, [math.inf])
    with pytest.raises(ForgeError, match="at step 1 "):
        early.settle()
