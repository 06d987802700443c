"""DiLoCo's rounds on real ranks: as those between threads, of which tests/sync/test_diloco.py has
all kinds."""

from __future__ import annotations

import json

import pytest

from tests.runs import by_hand, read
from tests.sync.ranks import Rounds, Trace, rounds_in_memory
from tests.sync.simulation import HALVES, simulated

pytestmark = pytest.mark.slow


def real_rounds(zygote, folder, rounds, **settings):
    """The traces of real ranks."""
    ranks, launch = range(len(rounds.tokens)), by_hand(len(rounds.tokens))
    order = {"rounds": vars(rounds), "folder": str(folder)}
    pids = []
    for rank in ranks:
        config = {**launch, "rank": rank, "sync": "diloco", "peer_timeout": 10.0, **settings}
        words = [json.dumps({**order, "config": config})]
        pids.append(zygote.start(words, folder / "log", script="tests.multiprocess.rounds"))
    assert [zygote.wait(pid) for pid in pids] == [0 for _ in ranks], read(folder / "log")
    return [Trace(**json.loads((folder / f"rank{r}.json").read_text())) for r in ranks]


def test_rounds_are_those_of_a_simulation_in_float64(zygote, tmp_path):
    settings = {"sync_every": 6, "outer_lr": 1.0, "outer_momentum": 0.5, "outer_warmup_rounds": 0}
    settings |= {"fragments": 2, "overlap_steps": 3}
    traces = real_rounds(zygote, tmp_path, Rounds(14, (1, 1, 2)), **settings)
    expected = simulated(14, (1, 1, 2), settings, HALVES)
    for step in range(14):
        for rank, trace in enumerate(traces):
            assert trace.weights[step] == pytest.approx(expected[step][rank], abs=1e-4), step
    assert 2 < sum(sent > 0 for sent in traces[0].bytes_sent) < 14


@pytest.mark.parametrize("settings", [{}, {"fragments": 2, "overlap_steps": 2}])
def test_real_ranks_come_to_the_bits_of_ranks_in_memory(zygote, tmp_path, settings):
    """Also what they send, where they agree, and where a round with NaN rolls all of them back."""
    rounds = Rounds(16, (1, 3), broken=[(1, 5)], stalled=11)
    settings = {"sync_every": 4, "compress": "int4", **settings}
    real = real_rounds(zygote, tmp_path, rounds, **settings)
    in_memory = rounds_in_memory(rounds, **settings)
    for one, other in zip(real, in_memory, strict=True):
        # When a thread in the background has sent what, only the clock knows.
        one.bytes_sent, other.bytes_sent = [sum(one.bytes_sent)], [sum(other.bytes_sent)]
        for what, seen in vars(one).items():
            assert json.dumps(seen) == json.dumps(vars(other)[what]), what  # NaN is not itself
    assert real[0].is_agreed[-1] and real[0].residuals[0]
