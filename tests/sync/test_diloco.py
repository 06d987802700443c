"""DiLoCo's rounds between threads, against a simulation of all ranks in float64."""

from __future__ import annotations

import math

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.sync.base import Replica
from p2p_llm_forge.sync.diloco import DiLoCo
from tests.memory_channel import clusters, run_ranks
from tests.sync.ranks import LikeDDP, Model, Rounds, resumed, rounds_in_memory
from tests.sync.simulation import HALVES, WHOLE, simulated

CODECS = ["none", "bf16", "int8", "int4"]
STREAMING = {"fragments": 2, "overlap_steps": 2}


@pytest.mark.parametrize(
    ("tokens", "settings", "groups"),
    [
        ((1, 1), {"sync_every": 3, "outer_lr": 1.0, "outer_momentum": 0.0}, WHOLE),
        ((1, 3), {"sync_every": 3, "outer_lr": 0.7, "outer_momentum": 0.9}, WHOLE),
        ((2, 1, 1), {"sync_every": 4, "outer_lr": 0.7, "outer_momentum": 0.6}, WHOLE),
        ((1, 1, 2), {"sync_every": 3, "outer_lr": None, "outer_momentum": 0.5}, WHOLE),
        ((1, 1), {"sync_every": 4, "outer_momentum": 0.5, "overlap_steps": 2}, WHOLE),
        ((1, 2), {"sync_every": 4, "outer_momentum": 0.5, "fragments": 2}, HALVES),
        (
            (1, 1, 2),
            {"sync_every": 6, "outer_momentum": 0.5, "fragments": 2, "overlap_steps": 3},
            HALVES,
        ),
    ],
)
def test_rounds_are_those_of_a_simulation_in_float64(tokens, settings, groups):
    settings = {"outer_lr": 1.0, "outer_warmup_rounds": 0, **settings}
    traces = rounds_in_memory(Rounds(14, tokens), **settings)
    expected = simulated(14, tokens, settings, groups)
    for step in range(14):
        for rank, trace in enumerate(traces):
            assert trace.weights[step] == pytest.approx(expected[step][rank], abs=1e-4), step
    assert 2 < sum(sent > 0 for sent in traces[0].bytes_sent) < 14


@pytest.mark.parametrize("compress", CODECS)
def test_weights_are_the_same_bits_on_all_ranks_after_every_round(compress):
    traces = rounds_in_memory(Rounds(12, (1, 2, 1)), sync_every=3, compress=compress)
    for step in range(12):
        first, *others = [trace.weights[step] for trace in traces]
        is_boundary = (step + 1) % 3 == 0
        assert all((other == first) == is_boundary for other in others)
        assert all(trace.is_agreed[step] == is_boundary for trace in traces)


@pytest.mark.parametrize("streaming", [{}, STREAMING])
def test_a_round_with_nan_on_one_rank_is_given_up_by_all(streaming):
    """The first of rank 1's weights becomes NaN in its sixth update."""
    rounds = Rounds(16, (1, 1), broken=[(1, 5)])
    traces = [trace.weights for trace in rounds_in_memory(rounds, sync_every=4, **streaming)]
    # Half of the layers is due after that update, all of them two updates later.
    back = 5 if streaming else 7
    if not streaming:
        assert math.isnan(traces[1][6][0])
        assert traces[0][back] == traces[0][3], "nothing is left of the round"
    assert traces[0][back] == traces[1][back]
    for step in [*range(5), *range(back, 16)]:
        assert all(math.isfinite(weight) for trace in traces for weight in trace[step])
    assert traces[0][-1] == traces[1][-1]
    assert traces[0][-1] != traces[0][back], "training continues"


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({}, [2, 5, 8, [1]]),
        # Half of the layers agreed after update 4, and that much of updates 3 and 4 is kept.
        ({"fragments": 2}, [2, 5, 6, [1]]),
        ({"ddp_warmup_steps": 2}, [2, 5, 8, [1]]),
    ],
)
def test_a_round_that_is_given_up_is_reported_when_that_happens(settings, expected):
    """By all ranks alike, also by those that have resumed in its middle."""
    settings = {"sync_every": 4, **settings}
    rounds = Rounds(16, (1, 3), broken=[(1, 5)], saved_at=[5])
    whole = rounds_in_memory(rounds, **settings)
    assert [trace.discarded for trace in whole] == [[expected]] * 2
    again = rounds_in_memory(resumed(rounds, 5), whole, **settings)
    assert [trace.discarded for trace in again] == [[expected]] * 2


def test_a_third_round_with_nan_in_a_row_ends_the_run_on_all_ranks():
    rounds = Rounds(12, (1, 1), broken=[(1, 1), (1, 4), (1, 7)])
    with pytest.raises(ForgeError) as error:
        rounds_in_memory(rounds, sync_every=3)
    (problem,) = error.value.problems
    assert "in 3 rounds in a row (now on rank 1)" in problem.found
    assert problem.fix.startswith("lower --learning-rate")


@pytest.mark.parametrize("compress", CODECS[1:])
def test_a_checkpoint_waits_for_the_pseudo_gradient_that_is_on_its_way(compress):
    """The residuals are known only when the exchange is over."""
    settings = {"sync_every": 4, "overlap_steps": 2, "compress": compress}
    for trace in rounds_in_memory(Rounds(8, (1, 1), stalled=3), **settings):
        at_once, later = trace.residuals
        assert later and at_once == later


@pytest.mark.parametrize("streaming", [{}, {"overlap_steps": 2}, STREAMING])
@pytest.mark.parametrize("compress", CODECS)
def test_rounds_resumed_after_any_update_end_bit_for_bit_alike(compress, streaming):
    settings = {"sync_every": 4, "compress": compress, "outer_warmup_rounds": 3, **streaming}
    rounds = Rounds(14, (1, 3), saved_at=range(1, 14))
    calm = rounds_in_memory(rounds, **settings)
    for at in rounds.saved_at:
        again = rounds_in_memory(resumed(rounds, at), calm, **settings)
        for trace, before in zip(again, calm, strict=True):
            assert trace.weights == before.weights[at:]


@pytest.mark.parametrize(
    ("tokens", "changes"),
    [
        ((1, 1, 2), {}),
        ((1,), {"outer_lr": None}),
        ((1, 1), {"sync_every": 3}),
        ((1, 1, 2), {"outer_lr": None, "fragments": 2}),
    ],
)
def test_ranks_may_change_while_the_pseudo_gradients_of_a_round_are_on_their_way(tokens, changes):
    """Until the next are sent it does not matter whether ranks wait for exchanges."""
    settings = {"sync_every": 5, "compress": "int8", "outer_warmup_rounds": 2}
    settings |= {"outer_momentum": 0.9, "outer_lr": changes.get("outer_lr", 0.7)}
    ends = []
    for overlap in (0, 2):
        first = rounds_in_memory(Rounds(18, (1, 1), saved_at=[15]), **settings)
        # Rounds of another length, so that both redistribute their residuals.
        longer = {**settings, "sync_every": 10, "overlap_steps": overlap}
        rounds = Rounds(23, (1, 1), first=15, saved_at=[20])
        second = rounds_in_memory(rounds, first, **longer)
        facts = second[0].saved[20][1].facts
        assert (sum(facts["lands_at"]) > 0) == (overlap > 0)
        assert facts["outer"][0][1] == pytest.approx(0.45), "half of the warm-up is over"
        last = rounds_in_memory(Rounds(31, tokens, first=20), second, **settings | changes)
        assert len({tuple(trace.weights[-1]) for trace in last}) == 1
        ends.append(last[0].weights[-1])
    assert ends[0] == ends[1]


def test_ranks_come_and_go_between_rounds_from_the_weights_that_were_agreed_on():
    settings = {"sync_every": 5, "compress": "int8"}
    two = rounds_in_memory(Rounds(15, (1, 1), saved_at=[15]), **settings)
    three = rounds_in_memory(Rounds(30, (1, 1, 1), first=15, saved_at=[30]), two, **settings)
    one = rounds_in_memory(Rounds(40, (1,), first=30), three, **settings)
    assert len(one[0].weights) == 10
    for traces in (two, three):
        assert len({tuple(trace.weights[-1]) for trace in traces}) == 1


def test_evaluation_and_checkpoints_see_the_agreed_weights_and_leave_the_own_ones():
    rounds = Rounds(8, (1, 1), saved_at=[4, 6])
    traces = rounds_in_memory(rounds, sync_every=4)
    for trace in traces:
        at_4, at_6 = (torch.cat([v.flatten() for v in trace.saved[n][0].values()]) for n in (4, 6))
        assert torch.equal(at_4, at_6), "agreed on after update 4"
        assert trace.weights[5] != trace.weights[3]
    assert traces[0].weights[5] != traces[1].weights[5]


def test_a_rank_alone_sends_nothing_and_averages_with_itself():
    (trace,) = rounds_in_memory(
        Rounds(6, (1,)), sync_every=3, outer_lr=1.0, outer_momentum=0.0, outer_warmup_rounds=0
    )
    expected = simulated(6, (1,), {"sync_every": 3, "outer_lr": 1.0, "outer_momentum": 0.0}, WHOLE)
    assert trace.weights[-1] == pytest.approx(expected[-1][0], abs=1e-5)
    assert sum(trace.bytes_sent) == 0


def test_more_fragments_than_the_model_has_parts_are_refused():
    lm = Model()
    replica = Replica(LikeDDP(lm), lm, None, total_steps=9)
    with clusters(1) as (cluster,), pytest.raises(ForgeError) as error:
        DiLoCo(TrainConfig("data", "run", sync="diloco", fragments=5), cluster, replica)
    (problem,) = error.value.problems
    assert "this model has 4 parts" in problem.found and problem.fix == "use 4 or fewer"


def test_ranks_wait_for_each_other_in_the_warm_up_and_where_something_is_sent():
    lm = Model()
    replica = Replica(LikeDDP(lm), lm, None, total_steps=19)
    config = TrainConfig("data", "run", sync="diloco", sync_every=6, ddp_warmup_steps=4)
    with clusters(1) as (cluster,):
        sync = DiLoCo(config, cluster, replica)
    assert [n for n in range(1, 20) if sync.is_sync_point(n)] == [1, 2, 3, 4, 6, 12, 18, 19]


@pytest.mark.parametrize(
    "tokens", [[0], [-5], [2.5], [float("nan")], [10**6], [], None, "7", [True]]
)
def test_a_rank_whose_tokens_cannot_be_is_refused_by_name(tokens):
    """They decide how much its weights count."""

    def act(cluster):
        lm = Model()
        optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
        replica = Replica(LikeDDP(lm), lm, optimizer, 4, tokens_per_update=100)
        sync = DiLoCo(TrainConfig("data", "run", sync="diloco", sync_every=2), cluster, replica)
        if cluster.rank == 1:
            gather = cluster.gather_facts
            cluster.gather_facts = lambda facts: gather({**facts, "tokens": tokens})
        before = [p.clone() for p in lm.parameters()]
        sync.after_update(0, 50)
        who = 1 if cluster.rank == 0 else "."  # rank 1 compares with what it has forged itself
        says = f"rank {who} (says that the tokens that it trained on are|sent what no rank of this)"
        with pytest.raises(ForgeError, match=says):
            sync.after_update(1, 50)
        return all(torch.equal(*pair) for pair in zip(before, lm.parameters(), strict=True))

    with clusters(2) as ranks:
        assert run_ranks(ranks, act) == [True, True]
