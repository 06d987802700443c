"""The order of data is pure arithmetic: every block once an epoch, whatever the world."""

from __future__ import annotations

import itertools

import pytest

from p2p_llm_forge.data import order as data_order


@pytest.mark.parametrize("size", [1, 2, 3, 4, 5, 16, 17, 100, 255, 1000, 4097])
def test_an_epoch_is_a_permutation_of_the_blocks(size):
    order = [data_order.permute(index, size, seed=3, epoch=1) for index in range(size)]
    assert sorted(order) == list(range(size))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {
        tuple(data_order.permute(index, 100, seed, epoch) for index in range(100))
        for seed in range(4)
        for epoch in range(4)
    }
    assert len(orders) == 16


def test_a_permutation_looks_shuffled():
    size = 10_000
    order = [data_order.permute(index, size, seed=0, epoch=0) for index in range(size)]
    # Of a random permutation about one element stays in place and half of the neighbours ascend.
    assert sum(place == index for index, place in enumerate(order)) < 10
    ascents = sum(a < b for a, b in itertools.pairwise(order))
    assert 0.47 * size < ascents < 0.53 * size


def test_any_position_of_a_huge_corpus_is_found_without_walking_there():
    blocks = data_order.blocks_at(10**6 * 512, count=512, num_blocks=10**9, seed=1)
    assert len(set(blocks)) == 512 and max(blocks) < 10**9


WORLDS = [
    (world, micro, factor, blocks)
    for world in (1, 2, 3, 4, 8)
    for micro in (1, 2, 5)
    for factor in (1, 3)
    for blocks in (7, 64, 101)
]


@pytest.mark.parametrize(("world", "micro", "factor", "num_blocks"), WORLDS)
def test_every_block_is_read_once_an_epoch_by_exactly_one_rank(world, micro, factor, num_blocks):
    batch_size = world * micro * factor
    steps = 2 * num_blocks  # 2 * batch_size whole epochs
    stream = []
    for step in range(steps):
        update = data_order.blocks_at(step * batch_size, batch_size, num_blocks, seed=5)
        sizes = [micro * factor] * world
        shares = [data_order.share_of_rank(update, sizes, rank) for rank in range(world)]
        for share in shares:
            assert [len(m) for m in data_order.micro_batches(share, micro)] == [micro] * factor
        assert list(itertools.chain(*shares)) == update
        stream += update
    assert len(stream) == 2 * batch_size * num_blocks
    for start in range(0, len(stream), num_blocks):
        assert sorted(stream[start : start + num_blocks]) == list(range(num_blocks))
