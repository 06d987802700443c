"""From which checkpoints of rounds a run may resume, and with which residuals."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.sync.base import SavedSync
from p2p_llm_forge.sync.resume import (
    redistributed_residuals,
    refuse_to_end_in_a_round,
    refuse_unfinished_round,
)

DILOCO = {"sync": "diloco", "sync_every": 8, "fragments": 1, "overlap_steps": 0}
OVERLAP = {**DILOCO, "overlap_steps": 2}
FRAGMENTS = {**DILOCO, "fragments": 2}


def saved(settings=DILOCO, ranks=2, is_agreed=False, sent_at=(0,), lands_at=(0,)) -> SavedSync:
    """A checkpoint: in the middle of a round if nothing else is given."""
    facts = {"settings": settings, "ranks": ranks, "is_agreed": is_agreed}
    return SavedSync({**facts, "sent_at": sent_at, "lands_at": lands_at}, {}, lambda rank: {})


def strategy(**settings) -> SimpleNamespace:
    return SimpleNamespace(settings=lambda: settings)


@pytest.mark.parametrize(
    ("checkpoint", "now", "ranks"),
    [
        (saved(), DILOCO, 2),
        (saved(is_agreed=True), {**DILOCO, "sync_every": 4}, 3),
        (saved(is_agreed=True), {"sync": "ddp"}, 3),
        # The round has ended: what all have sent is on its way, whoever applies it.
        (saved(OVERLAP, sent_at=(20,), lands_at=(22,)), {**DILOCO, "sync_every": 4}, 3),
        (SavedSync({"settings": {"sync": "ddp"}}, {}, lambda rank: {}), DILOCO, 2),
    ],
)
def test_a_round_is_resumed_as_it_was_and_from_its_end_by_anyone(checkpoint, now, ranks):
    refuse_unfinished_round(checkpoint, strategy(**now), ranks, step=20)


END = "or resume from a checkpoint of the end of a round by --resume FOLDER"
ON_ITS_WAY = {"sent_at": (20,), "lands_at": (22,)}
OF_BOTH = {"sent_at": (20, 16), "lands_at": (22, 0)}


@pytest.mark.parametrize(
    ("checkpoint", "now", "ranks", "fix"),
    [
        (saved(), DILOCO, 3, END),
        (saved(), {**DILOCO, "sync_every": 4}, 2, END),
        (saved(), {"sync": "ddp"}, 2, END),
        (saved(OVERLAP, sent_at=(12,), lands_at=(14,)), OVERLAP, 3, END),
        (saved(OVERLAP, **ON_ITS_WAY), {"sync": "ddp"}, 2, "after a round without --overlap-steps"),
        (saved(FRAGMENTS, **OF_BOTH), FRAGMENTS, 3, "or change when the run has ended"),
    ],
)
def test_a_round_in_its_middle_is_resumed_only_as_it_was(checkpoint, now, ranks, fix):
    with pytest.raises(ForgeError) as error:
        refuse_unfinished_round(checkpoint, strategy(**now), ranks, step=20)
    (problem,) = error.value.problems
    assert "step 20 holds a round of 2 process(es) (--sync diloco --sync-every 8" in problem.found
    assert f"this run has {ranks} (--sync {now['sync']}" in problem.found
    assert problem.fix.startswith("resume with 2 process(es) and --sync diloco --sync-every 8")
    assert fix in problem.fix


def test_a_run_does_not_end_with_a_model_that_lacks_what_its_ranks_have_done():
    refuse_to_end_in_a_round(saved(), step=5, total_steps=6)
    refuse_to_end_in_a_round(saved(is_agreed=True), step=5, total_steps=5)
    with pytest.raises(ForgeError) as error:
        refuse_to_end_in_a_round(saved(), step=5, total_steps=5)
    (problem,) = error.value.problems
    assert "end after 5 updates" in problem.found
    assert problem.fix == "take at least one more update with --max-steps 6"


@pytest.mark.parametrize(("before", "now"), [(2, 2), (2, 3), (3, 2), (5, 2), (1, 4)])
def test_residuals_keep_their_sum_whatever_the_number_of_ranks(before, now):
    numbers = torch.Generator().manual_seed(0)
    kinds = ["residual_of_sending.a", "residual_of_sum.a", "residual_of_sending.layers.0.b"]
    own = [{kind: torch.randn(5, generator=numbers) for kind in kinds} for _ in range(before)]
    others = {"tokens": torch.ones(1), "weights.a": torch.ones(5)}
    checkpoint = SavedSync({}, {}, lambda rank: own[rank] | others)
    checkpoint.facts["ranks"] = before
    after = [redistributed_residuals(checkpoint, rank, now) for rank in range(now)]
    assert {key for one in after for key in one} == {kinds[0], kinds[2]}
    for name in ("a", "layers.0.b"):
        was = sum(one[key].double() for one in own for key in one if key.endswith(f".{name}"))
        now_is = sum(one[key].double() for one in after for key in one if key.endswith(f".{name}"))
        torch.testing.assert_close(now_is, was, rtol=0, atol=1e-6)
