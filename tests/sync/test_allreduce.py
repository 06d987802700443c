"""Sums in place, against float64 and against a loop, with and without a secret."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.sync import allreduce
from p2p_llm_forge.sync.allreduce import AllReduce
from tests.memory_channel import channels, run_ranks

SECRET = b"correct horse battery staple"


def vector(rank, count):
    return torch.randn(count, generator=torch.Generator().manual_seed(rank))


def summed(ranks, count, secret):
    made = channels(ranks, secret)

    def act(channel):
        values, reduction = vector(channel.rank, count), AllReduce(channel, "what is summed")
        found = channel.in_background(lambda: reduction.begin(values), reduction.finish).result(60)
        assert found is values, "in its memory"
        return values

    found = run_ranks(made, act)
    for channel in made:
        channel.close()
    return found


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("count", [1, 2, 7, 64, 1000])
def test_all_ranks_get_the_sum_in_the_order_of_the_ranks(monkeypatch, ranks, count):
    monkeypatch.setattr(allreduce, "PIECE", 16)  # many pieces in few values
    expected = vector(0, count)
    for rank in range(1, ranks):
        expected = expected + vector(rank, count)
    exact = sum(vector(rank, count).double() for rank in range(ranks))
    for secret in (None, SECRET):
        for found in summed(ranks, count, secret):
            assert torch.equal(found, expected), "bit for bit"
            torch.testing.assert_close(found.double(), exact, rtol=0, atol=1e-5)


def test_ranks_that_sum_different_things_notice_it_where_there_is_a_secret():
    made = channels(2, SECRET)

    def act(channel):
        reduction = AllReduce(channel, f"bucket of rank {channel.rank}")
        with pytest.raises(Exception, match="does not open with the cluster's secret"):
            reduction.finish(reduction.begin(vector(channel.rank, 8)))
        return True

    assert all(run_ranks(made, act))
    for channel in made:
        channel.close()
