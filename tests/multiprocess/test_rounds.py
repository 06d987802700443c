"""DiLoCo's rounds on real ranks, against a simulation of all ranks in float64."""

from __future__ import annotations

import json
import math

import pytest

from tests.multiprocess.rounds import LAYERS, WIDTH, moved
from tests.ports import free_port
from tests.runs import read

pytestmark = pytest.mark.slow
SIZES = [3 * WIDTH, *[WIDTH] * LAYERS]  # embedding (tied with the head), layers


def rounds(zygote, tmp_path, updates, tokens=(1, 1), broken=None, stalled=None, **settings):
    """The weights of every rank after every update, and the bytes it sent for it."""
    by_hand = {"world_size": len(tokens), "master_addr": "127.0.0.1", "master_port": free_port()}
    pids = []
    for rank in range(len(tokens)):
        order = {"updates": updates, "tokens": tokens, "break": broken, "folder": str(tmp_path)}
        order["stalled"] = stalled
        order["config"] = {**by_hand, "rank": rank, "sync": "diloco", "peer_timeout": 10.0}
        order["config"] |= settings
        pids.append(
            zygote.start([json.dumps(order)], tmp_path / "log", script="tests.multiprocess.rounds")
        )
    assert [zygote.wait(pid) for pid in pids] == [0] * len(tokens), read(tmp_path / "log")
    traces = [json.loads((tmp_path / f"rank{r}.json").read_text()) for r in range(len(tokens))]
    assert all(len(trace) == updates for trace in traces)
    return traces


def simulated(updates, tokens, every, outer_lr, momentum, groups, overlap=0):
    """What the ranks' weights should be after every update: plain Python, one float64 at a time.

    groups: the (first, end) weights of each fragment.
    """
    count, ranks = sum(SIZES), range(len(tokens))
    start = [-1 + 2 * n / (SIZES[0] - 1) for n in range(SIZES[0])] + [0.5] * (count - SIZES[0])
    local = [list(start) for _ in ranks]
    anchor, velocity = list(start), [0.0] * count
    sent: dict[int, tuple] = {}
    sent_at: dict[int, int] = {}
    since = [[0.0] * len(groups) for _ in ranks]
    trace = []

    def land(number):
        first, end = groups[number]
        snapshots, shares = sent.pop(number)
        for w in range(first, end):
            move = sum(
                share * (anchor[w] - snap[w]) for share, snap in zip(shares, snapshots, strict=True)
            )
            velocity[w] = momentum * velocity[w] + move
            new = anchor[w] - outer_lr * (move + momentum * velocity[w])
            for rank in ranks:
                local[rank][w] += new - snapshots[rank][w]
            anchor[w] = new

    for step in range(updates):
        for rank in ranks:
            for w, amount in enumerate(moved(rank, step, count)):
                local[rank][w] += amount
            since[rank] = [n + tokens[rank] for n in since[rank]]
        done, is_last = step + 1, step + 1 == updates
        for number in list(sent):
            if is_last or sent_at[number] + overlap == done:
                land(number)
        for number in range(len(groups)):
            due = done % every == (number + 1) * every // len(groups) % every
            if is_last or due:
                total = sum(since[rank][number] for rank in ranks)
                shares = [since[rank][number] / total for rank in ranks]
                sent[number] = ([list(weights) for weights in local], shares)
                sent_at[number] = done
                for rank in ranks:
                    since[rank][number] = 0.0
                if is_last or overlap == 0:
                    land(number)
        trace.append([list(weights) for weights in local])
    return trace


WHOLE = [(0, sum(SIZES))]
HALVES = [(0, SIZES[0]), (SIZES[0], sum(SIZES))]  # the embedding is as large as all layers


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
def test_rounds_are_what_a_simulation_in_float64_says(zygote, tmp_path, tokens, settings, groups):
    updates = 14
    settings = {"outer_lr": 1.0, "outer_warmup_rounds": 0, **settings}
    traces = rounds(zygote, tmp_path, updates, tokens, **settings)
    expected = simulated(
        updates,
        tokens,
        settings["sync_every"],
        settings["outer_lr"] or (len(tokens) / 8) ** 0.5,
        settings["outer_momentum"],
        groups,
        settings.get("overlap_steps", 0),
    )
    for step in range(updates):
        for rank, trace in enumerate(traces):
            assert trace[step]["weights"] == pytest.approx(expected[step][rank], abs=1e-4), step
    exchanged = [step["bytes_sent"] > 0 for step in traces[0]]
    assert 2 < sum(exchanged) < updates


@pytest.mark.parametrize("compress", ["none", "bf16", "int8", "int4"])
def test_weights_are_the_same_bits_on_all_ranks_after_every_round(zygote, tmp_path, compress):
    traces = rounds(zygote, tmp_path, 12, (1, 2, 1), sync_every=3, compress=compress)
    for step in range(12):
        by_rank = [trace[step]["weights"] for trace in traces]
        is_boundary = (step + 1) % 3 == 0
        assert (by_rank[0] == by_rank[1] == by_rank[2]) == is_boundary
        assert all(trace[step]["is_agreed"] == is_boundary for trace in traces)


@pytest.mark.parametrize("streaming", [{}, {"fragments": 2, "overlap_steps": 2}])
def test_a_round_with_nan_on_one_rank_is_given_up_by_all(zygote, tmp_path, streaming):
    """The first of rank 1's weights becomes NaN in its sixth update."""
    traces = rounds(zygote, tmp_path, 16, (1, 1), broken=[1, 5], sync_every=4, **streaming)
    # Half of the layers is due after that update, all of them two updates later.
    back = 5 if streaming else 7
    if not streaming:
        assert math.isnan(traces[1][6]["weights"][0])
        assert traces[0][back]["weights"] == traces[0][3]["weights"], "nothing is left of the round"
    assert traces[0][back]["weights"] == traces[1][back]["weights"]
    for step in [*range(5), *range(back, 16)]:
        assert all(math.isfinite(weight) for trace in traces for weight in trace[step]["weights"])
    assert traces[0][-1]["weights"] == traces[1][-1]["weights"]
    assert traces[0][-1]["weights"] != traces[0][back]["weights"], "training has gone on"


def test_a_checkpoint_waits_for_the_move_that_is_on_its_way(zygote, tmp_path):
    """What compression owes is known only when the exchange is over."""
    settings = {"sync_every": 4, "overlap_steps": 2, "compress": "int4"}
    for trace in rounds(zygote, tmp_path, 8, stalled=3, **settings):
        at_once, later = trace[3]["residuals"]
        assert later and at_once == later
