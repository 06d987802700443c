"""Which strategy a run gets, and which launches and models it refuses."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.sync.base import Replica, SavedSync
from p2p_llm_forge.sync.strategy import (
    build_strategy,
    refuse_different_models,
    refuse_elastic,
    refuse_to_end_in_a_round,
    refuse_unfinished_round,
)
from tests.memory_channel import clusters, run_ranks
from tests.sync.ranks import LikeDDP, Model


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sync_every": 20, "overlap_steps": 5, "save_every": 40}, None),
        ({"sync_every": 20, "save_every": 50}, "use 40 or 60"),
        ({"sync_every": 20, "fragments": 2, "save_every": 40}, "--fragments 2 leaves no moment"),
    ],
)
def test_peers_can_come_and_go_only_where_a_round_ends_for_the_whole_model(settings, expected):
    elastic = SimpleNamespace(launch=Launch(world_size=2, is_elastic=True))
    config = TrainConfig(sync="diloco", **settings)
    with pytest.raises(ForgeError, match=expected) if expected else nullcontext():
        refuse_elastic(config, elastic)


@pytest.mark.parametrize(
    ("settings", "name", "has_own_state"),
    [
        ({}, "GradientAveraging", False),
        ({"compress": "bf16"}, "GradientAveraging", True),
        ({"compress": "powersgd"}, "PowerSGD", True),
        ({"sync": "diloco"}, "DiLoCo", True),
    ],
)
def test_a_run_gets_the_strategy_that_it_asks_for(settings, name, has_own_state):
    config = TrainConfig("data", "run", **settings)

    def build(cluster):
        lm = Model()
        return build_strategy(config, cluster, Replica(LikeDDP(lm), lm, None, total_steps=9))

    with clusters(2) as ranks:
        for sync in run_ranks(ranks, build):
            assert type(sync).__name__ == name and sync.has_own_state == has_own_state
            assert sync.has_own_state == config.keeps_own_state()
            assert sync.settings()["sync"] == config.sync
            assert sync.trains_alone == (config.sync == "diloco")


def layers(*widths: int, seed: int = 0) -> nn.Sequential:
    torch.manual_seed(seed)
    return nn.Sequential(*(nn.Linear(width, 2) for width in widths))


def problems_of(models: list[nn.Module], is_loaded: bool) -> list:
    """What each rank finds when it has this model."""

    def judge(cluster):
        try:
            refuse_different_models(cluster, models[cluster.rank], is_loaded)
        except ForgeError as error:
            return error.problems
        return ()

    with clusters(len(models)) as ranks:
        first, *others = run_ranks(ranks, judge)
    assert all(other == first for other in others), "all ranks end alike"
    return list(first)


def test_equal_models_are_accepted_and_those_from_scratch_may_differ_in_their_weights():
    assert problems_of([layers(3, 4), layers(3, 4), layers(3, 4)], is_loaded=True) == []
    assert problems_of([layers(3, 4), layers(3, 4, seed=1)], is_loaded=False) == []


def test_loaded_weights_that_differ_are_refused_by_the_name_of_the_rank():
    models = [layers(3, 4), layers(3, 4, seed=1), layers(3, 4)]
    (problem,) = problems_of(models, is_loaded=True)
    assert problem.where.startswith("rank 1 (") and "other weights than rank 0" in problem.found
    assert "copy the model's folder from rank 0" in problem.fix


@pytest.mark.parametrize("is_loaded", [True, False])
def test_models_of_other_shapes_are_refused_by_rank_and_parameter(is_loaded):
    models = [layers(3, 4), layers(3, 5), layers(3, 4), layers(3, 4, 6)]
    one, other = problems_of(models, is_loaded)
    assert one.where.startswith("rank 1 (") and other.where.startswith("rank 3 (")
    assert "1.weight is [2, 5], not [2, 4]" in one.found
    assert "2.bias is [2], not missing" in other.found
    assert "--config-overrides" in one.fix


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
    assert refuse_unfinished_round(checkpoint, strategy(**now), ranks, step=20) is None


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


def test_of_a_model_with_adapters_what_stays_must_be_equal():
    def adapted(base: int, adapters: int) -> nn.Sequential:
        frozen = layers(3, 4, seed=base).requires_grad_(False)
        return nn.Sequential(frozen, layers(2, seed=adapters))

    assert problems_of([adapted(0, 0), adapted(0, 1)], is_loaded=True) == []
    (problem,) = problems_of([adapted(0, 0), adapted(1, 0)], is_loaded=True)
    assert problem.where.startswith("rank 1 (") and "other weights than rank 0" in problem.found
