"""Conversations in blocks: whole, none lost, full blocks, the same each time."""

from __future__ import annotations

import random

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from p2p_llm_forge.data.conversation_encoder import IS_TRAINED
from p2p_llm_forge.data.conversation_packing import OpenBlocks, parts_of

PADDING = 9999


def talk_of(size: int, number: int, trained: list[bool] | None = None) -> np.ndarray:
    """Tokens that are the conversation's number, of which the last is trained."""
    marks = np.array(trained if trained is not None else [False] * (size - 1) + [True])
    return np.where(marks, number | IS_TRAINED, number).astype(np.uint32)


def packed(talks: list[np.ndarray], length: int, most: int = 256) -> list[list[np.ndarray]]:
    blocks = OpenBlocks(length, PADDING, most)
    closed = [block for talk in talks for block in blocks.add(talk)]
    return closed + list(blocks.close_all())


@given(st.lists(st.integers(2, 20), max_size=60), st.integers(1, 8))
def test_every_conversation_is_whole_in_one_block(sizes, most):
    talks = [talk_of(size, number) for number, size in enumerate(sizes)]
    blocks = packed(talks, 20, most)
    assert all(sum(map(len, block)) <= 20 for block in blocks)
    found = sorted(part.tolist() for block in blocks for part in block)
    assert found == sorted(talk.tolist() for talk in talks)
    assert [[p.tolist() for p in block] for block in packed(talks, 20, most)] == [
        [p.tolist() for p in block] for block in blocks
    ]


def test_a_conversation_goes_where_it_leaves_least_room():
    talks = [talk_of(size, number) for number, size in enumerate([12, 14, 6, 8, 20])]
    numbers = [[int(part[0]) for part in block] for block in packed(talks, 20)]
    assert numbers == [[1, 2], [0, 3], [4]]  # each full, so closed in this order


def test_few_blocks_are_open_and_yet_they_get_full():
    draw = random.Random(1)
    talks = [talk_of(draw.randint(10, 256), number) for number in range(4000)]
    blocks = OpenBlocks(512, PADDING)
    closed, most_open = [], 0
    for talk in talks:
        closed += blocks.add(talk)
        most_open = max(most_open, len(blocks._parts))
    assert most_open <= 256
    full = sum(map(len, talks)) / (512 * len(closed + list(blocks.close_all())))
    assert full > 0.98, full


def test_a_block_is_marked_where_conversations_and_padding_begin():
    parts = [talk_of(3, 1), talk_of(4, 2, [False, True, False, True])]
    tokens, trained, begins = OpenBlocks(10, PADDING).block_of(parts)
    assert tokens.tolist() == [1] * 3 + [2] * 4 + [PADDING] * 3
    assert np.flatnonzero(trained).tolist() == [2, 4, 6]
    assert np.flatnonzero(begins).tolist() == [0, 3, 7]
    full = OpenBlocks(7, PADDING).block_of(parts)
    assert np.flatnonzero(full[2]).tolist() == [0, 3] and len(full[0]) == 7


@given(st.lists(st.booleans(), min_size=2, max_size=80), st.integers(2, 12))
def test_cutting_loses_no_trained_token_and_none_is_predicted_from_another_place(marks, length):
    marks[0] = False
    tokens = np.arange(len(marks), dtype=np.uint32)
    whole = np.where(marks, tokens | IS_TRAINED, tokens).astype(np.uint32)
    predicted = []
    for part in parts_of(whole, length):
        assert len(part) <= length and (len(marks) <= length or (part >= IS_TRAINED).any())
        numbers = part & ~IS_TRAINED
        assert (np.diff(numbers) == 1).all()  # what stands before a token stood there before
        assert part[0] < IS_TRAINED
        predicted += numbers[part >= IS_TRAINED].tolist()
    assert predicted == np.flatnonzero(marks).tolist()
