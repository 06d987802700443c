"""The work on the pieces is divided among ranks and threads, and nothing is done twice."""

from __future__ import annotations

import threading
from unittest import mock

import pytest

from p2p_llm_forge.data import sources
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.tokenizing import in_order, pieces_to_do
from p2p_llm_forge.data.unfinished import Ranks


@pytest.mark.usefixtures("small_pieces")
def test_the_pieces_are_divided_among_the_ranks(text):
    found = sources.find([str(text)], ReadOptions(piece_bytes=3_000))
    pieces = mock.Mock(has_all_of=lambda *_: False, record=lambda *_: None)
    preparation = mock.Mock(parts=found.parts, read_options=ReadOptions(piece_bytes=3_000))
    job = mock.Mock(preparation=preparation, pieces=pieces)
    alone = [piece.number for piece, _ in pieces_to_do(job, Ranks())]
    assert len(alone) > 20
    for world in (2, 3, 50):
        of_ranks = [
            [piece.number for piece, _ in pieces_to_do(job, Ranks(rank, world))]
            for rank in range(world)
        ]
        assert sorted(number for of_rank in of_ranks for number in of_rank) == alone
        assert world == 50 or min(map(len, of_ranks)) > len(alone) / world / 2


def test_results_come_in_the_order_of_the_items_and_few_wait():
    begun = []

    def work(number):
        begun.append(number)
        return number * number

    results = in_order(work, range(100), 3, lambda: None)
    assert [next(results) for _ in range(3)] == [0, 1, 4]
    assert len(begun) < 15, "the rest is not begun before it is asked for"
    assert list(results) == [number * number for number in range(3, 100)]


def test_what_fails_in_a_thread_is_raised_and_the_others_are_asked_to_give_up():
    given_up = threading.Event()

    def work(number):
        if number == 0:
            raise ValueError("no such piece")
        assert given_up.wait(60)

    with pytest.raises(ValueError, match="no such piece"):
        list(in_order(work, range(9), 3, given_up.set))
