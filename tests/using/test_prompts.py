"""Prompts of any length come to tokens that a model can read."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from p2p_llm_forge.using.prompts import note_of_window, window


@given(st.lists(st.integers(0, 9), min_size=1, max_size=40), st.integers(1, 30))
def test_a_window_is_the_end_and_leaves_room_for_a_token(tokens, context):
    seen = window(tokens, context)
    assert seen and tokens[-len(seen) :] == seen
    assert len(seen) < context or context == 1
    assert seen == tokens or len(tokens) >= context
    assert window(tokens, None) == tokens


def test_what_is_left_out_is_said():
    assert note_of_window(10, 38, 48) is None and note_of_window(10, 38, None) is None
    assert "after 48 tokens" in str(note_of_window(10, 39, 48))
    assert "prompt has 60 tokens" in str(note_of_window(60, 1, 48))
    assert "does not see the first 36" in str(note_of_window(60, 1, 48))
