"""Text is shown in whole characters, and all of it."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.config import GenerateConfig
from p2p_llm_forge.using.writing import TextStream, sampling
from tests.using.models import byte_tokenizer

TOKENIZER = byte_tokenizer()


def pieces_of(prompt: list[int], tokens: list[int]) -> list[str]:
    shown: list[str] = []
    stream = TextStream(TOKENIZER, prompt, shown.append)
    stream.put(torch.tensor([prompt]))
    for token in tokens:
        stream.put(torch.tensor([token]))
    stream.finish()
    return shown


@settings(max_examples=50, deadline=None)
@given(st.text(min_size=1, max_size=30), st.text(max_size=5))
def test_pieces_are_whole_characters_and_make_up_the_text(text, prompt):
    text, prompt = (one.replace("\ufffd", "?") for one in (text, prompt))
    pieces = pieces_of(TOKENIZER(prompt)["input_ids"], TOKENIZER(text)["input_ids"])
    assert "".join(pieces) == text
    assert not any("\ufffd" in piece for piece in pieces)


@settings(max_examples=50, deadline=None)
@given(st.lists(st.integers(1, len(TOKENIZER) - 1), max_size=40))
def test_whatever_is_drawn_is_shown_as_the_tokenizer_spells_it(tokens):
    assert "".join(pieces_of([5], tokens)) == TOKENIZER.decode(tokens)


def test_text_is_shown_before_it_ends():
    tokens = TOKENIZER("Mara bakes bread, and Ines mends the nets")["input_ids"]
    assert len([piece for piece in pieces_of([], tokens) if piece]) == len(tokens)


def test_temperature_zero_takes_the_most_probable_token():
    assert sampling(GenerateConfig(temperature=0))["do_sample"] is False
    assert sampling(GenerateConfig(top_k=3, top_p=0.5, temperature=2)) == {
        **{"do_sample": True, "temperature": 2, "top_k": 3, "top_p": 0.5}
    }
