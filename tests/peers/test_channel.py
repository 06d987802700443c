"""Exchanges between ranks bring what a loop would copy, and count what leaves a rank."""

from __future__ import annotations

import threading

import pytest
import torch

from p2p_llm_forge.peers.channel import Channel
from tests.memory_channel import channels, run_ranks


@pytest.fixture(params=[(1, None), (3, None), (3, b"correct horse battery staple")])
def ranks(request):
    made = channels(*request.param)
    yield made
    for channel in made:
        channel.close()


def sent_by(rank, world_size):
    return torch.arange(world_size * 2, dtype=torch.float32).view(world_size, 2) + 100 * rank


def test_row_r_goes_to_rank_r(ranks):
    world_size = len(ranks)

    def act(channel):
        return channel.all_to_all(sent_by(channel.rank, world_size))()

    for rank, received in enumerate(run_ranks(ranks, act)):
        expected = torch.stack([sent_by(source, world_size)[rank] for source in range(world_size)])
        assert torch.equal(received, expected)
        assert ranks[rank].bytes_sent == (world_size - 1) * 2 * 4


def test_a_row_goes_to_all(ranks):
    world_size = len(ranks)

    def act(channel):
        row = torch.tensor([channel.rank, 1], dtype=torch.int16)
        into = torch.zeros(world_size, 2, dtype=torch.int16)
        into[channel.rank] = row
        channel.all_gather(into[channel.rank], into=into)()
        return channel.all_gather(row)(), into if world_size > 1 else row.unsqueeze(0)

    for rank, (rows, into) in enumerate(run_ranks(ranks, act)):
        assert rows.tolist() == into.tolist() == [[source, 1] for source in range(world_size)]
        assert ranks[rank].bytes_sent == 2 * (world_size - 1) * 4


def test_what_the_main_process_sends_is_in_place_on_all(ranks):
    def act(channel):
        values = torch.full((3,), channel.rank + 0.5, dtype=torch.bfloat16)
        channel.send_from_main_(values)
        return values.tolist()

    assert run_ranks(ranks, act) == [[0.5] * 3] * len(ranks)
    assert [one.bytes_sent for one in ranks] == [(len(ranks) - 1) * 6] + [0] * (len(ranks) - 1)


def test_the_next_exchange_begins_while_one_is_being_finished():
    channel, second_has_begun = Channel(0, 1), threading.Event()

    def finish(value):
        assert second_has_begun.wait(30), "the second waits for the first to be finished"
        return value

    first = channel.in_background(lambda: 1, finish)
    second = channel.in_background(lambda: second_has_begun.set() or 2, lambda value: value)
    assert (first.result(30), second.result(30)) == (1, 2)
    channel.close()


def test_an_error_in_the_beginning_is_that_of_the_exchange():
    channel = Channel(0, 1)
    future = channel.in_background(lambda: 1 // 0, lambda value: value)
    with pytest.raises(ZeroDivisionError):
        future.result(30)
    channel.close()


def test_an_exchange_is_under_way_until_it_was_waited_for():
    over, channel = threading.Event(), Channel(0, 2)
    assert not channel.is_exchanging()
    first, second = (channel._begun(over, torch.ones(1), torch.ones(1)) for _ in range(2))
    assert channel.is_exchanging()
    over.set()
    first()
    assert channel.is_exchanging()
    second()
    assert not channel.is_exchanging()
    channel.close()
