"""Compressed sums over all ranks, between threads, against float64; nothing is lost."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from p2p_llm_forge.sync import compressed_allreduce
from p2p_llm_forge.sync.base import SavedSync
from p2p_llm_forge.sync.compress import CODECS
from p2p_llm_forge.sync.compressed_allreduce import (
    OF_SENDING,
    OF_SUM,
    CompressedAllReduce,
    is_finite,
    joined_by_name,
    redistributed_residuals,
    split_by_name,
)
from tests.memory_channel import channels, run_ranks

COUNT = 5000  # no multiple of a group, a shard or a chunk
PARTS = [("a", 1300), ("b", 3700)]
by_codec = pytest.mark.parametrize("codec", CODECS.values(), ids=CODECS)
by_ranks = pytest.mark.parametrize("ranks", [1, 2, 3])


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Several chunks for a vector of a few thousand values."""
    monkeypatch.setattr(compressed_allreduce, "CHUNK", 1024)


def values_of(rank: int, round_: int) -> torch.Tensor:
    return torch.randn(COUNT, generator=torch.Generator().manual_seed(100 * rank + round_))


def sums(ranks: int, codec, rounds: int) -> tuple[list[list[torch.Tensor]], list, list]:
    """By rank the sums of so many rounds; the reductions, and their channels."""
    opened = channels(ranks)
    reductions = [CompressedAllReduce(channel, codec, PARTS) for channel in opened]
    try:
        found = run_ranks(
            range(ranks),
            lambda rank: [
                reductions[rank].finish(reductions[rank].begin(values_of(rank, n)))
                for n in range(rounds)
            ],
        )
    finally:
        for channel in opened:
            channel.close()
    return found, reductions, opened


def exact_sum(ranks: int, rounds: int) -> np.ndarray:
    """Of all rounds, in float64."""
    values = [values_of(rank, n).double() for rank in range(ranks) for n in range(rounds)]
    return sum(values).numpy()


@by_ranks
@by_codec
def test_all_ranks_get_the_same_bits_near_the_sum(codec, ranks):
    found, _, _ = sums(ranks, codec, rounds=1)
    assert all(torch.equal(one[0], found[0][0]) for one in found)
    error = np.linalg.norm(found[0][0].double().numpy() - exact_sum(ranks, 1))
    # A value's own error in two encodings, of uniform rounding in groups of normal values.
    relative = {"none": 1e-6, "bf16": 0.005, "int8": 0.02, "int4": 0.25}[codec.name]
    assert error < relative * np.linalg.norm(exact_sum(ranks, 1))
    if codec.is_lossy and ranks > 1:
        assert error > 1e-4 * np.linalg.norm(exact_sum(ranks, 1)), "it was compressed"


@by_ranks
@by_codec
def test_sums_and_residuals_add_up_to_all_that_was_given(codec, ranks):
    rounds = 7
    found, reductions, _ = sums(ranks, codec, rounds)
    arrived = sum(one.double() for one in found[0]).numpy()
    residuals = [reduction.residuals() for reduction in reductions]
    for residual in residuals:
        for kind in (OF_SENDING, OF_SUM):
            arrived = arrived + joined_by_name(residual, kind, PARTS).double().numpy()
    assert np.abs(arrived - exact_sum(ranks, rounds)).max() < 1e-4
    assert all(bool(residual) == (codec.is_lossy and ranks > 1) for residual in residuals)


@by_codec
def test_error_feedback_keeps_the_error_of_many_rounds_that_of_one(codec):
    found, _, _ = sums(2, codec, rounds=30)
    arrived = sum(one.double() for one in found[0]).numpy()
    one_round = np.abs(found[0][0].double().numpy() - exact_sum(2, 1)).max()
    assert np.abs(arrived - exact_sum(2, 30)).max() < 3 * one_round + 1e-4


@by_codec
def test_a_rank_sends_the_encoded_vector_but_its_own_shard_twice(codec):
    _, _, opened = sums(3, codec, rounds=1)
    groups_of_shard = -(-COUNT // (3 * codec.group))
    shard = codec.wire_bytes(groups_of_shard * codec.group)
    assert [channel.bytes_sent for channel in opened] == [2 * 2 * shard] * 3


@pytest.mark.parametrize("codec", [c for c in CODECS.values() if c.is_lossy], ids=lambda c: c.name)
def test_saved_residuals_give_the_next_sum_its_bits(codec):
    calm, _, _ = sums(3, codec, rounds=2)
    _, reductions, _ = sums(3, codec, rounds=1)
    saved = [reduction.residuals() for reduction in reductions]
    opened = channels(3)

    def second_round(rank: int) -> torch.Tensor:
        reduction = CompressedAllReduce(opened[rank], codec, PARTS)
        reduction.restore(saved[rank])
        return reduction.finish(reduction.begin(values_of(rank, 1)))

    for found in run_ranks(range(3), second_round):
        assert torch.equal(found, calm[0][1])


def test_dropped_residuals_leave_nothing():
    _, (reduction, _), _ = sums(2, CODECS["int8"], rounds=1)
    assert reduction.residuals()
    reduction.drop_residuals()
    assert reduction.residuals() == {}


def test_vectors_are_split_by_name_and_joined_again():
    flat = torch.arange(7.0)
    named = split_by_name(flat, "x.", [("a", 3), ("b", 4)])
    assert {name: part.tolist() for name, part in named.items()} == {
        "x.a": [0, 1, 2],
        "x.b": [3, 4, 5, 6],
    }
    assert torch.equal(joined_by_name(named, "x.", [("a", 3), ("b", 4)]), flat)
    with_missing = joined_by_name(named, "x.", [("a", 3), ("c", 2)])
    assert with_missing.tolist() == [0, 1, 2, 0, 0]


@pytest.mark.parametrize("bad", [torch.nan, torch.inf, -torch.inf])
def test_one_value_that_is_not_finite_is_seen(bad):
    values = torch.zeros(10_000)
    assert is_finite(values)
    values[7777] = bad
    assert not is_finite(values)


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
