"""Micro-batches are their blocks, in order, with what conversations begin where there are any."""

from __future__ import annotations

import torch

from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.training.feeding import ahead, fed
from tests.conversations import begins_of, tokens_of, trained_of


def test_micro_batches_of_text_are_its_inputs_and_targets(prepared):
    blocks = open_prepared(prepared).train_blocks()
    found = list(fed(blocks, [[3, 1], [2]], torch.device("cpu")))
    for numbers, (inputs, targets, begins) in zip([[3, 1], [2]], found, strict=True):
        expected = blocks.inputs_and_targets(numbers)
        assert [inputs.tolist(), targets.tolist()] == [one.tolist() for one in expected]
        assert begins is None


def test_micro_batches_of_conversations_say_what_counts_and_what_begins(
    prepared_conversations, conversations
):
    data = open_prepared(prepared_conversations)
    end, there = data.manifest.eos_token_id, conversations["train"]
    (found,) = fed(data.train_blocks(), [[5, 0, 7]], torch.device("cpu"))
    for row, number in enumerate([5, 0, 7]):
        tokens, trained = tokens_of(there[number]), trained_of(there[number])
        assert found.inputs[row].tolist() == [end, *tokens[:-1]]
        pairs = zip(tokens, trained, strict=True)
        assert found.targets[row].tolist() == [t if is_one else -100 for t, is_one in pairs]
        assert found.begins[row].tolist() == begins_of(there[number])


def test_what_comes_next_is_made_while_the_last_is_used():
    made = []
    coming = ahead([1, 2, 3], lambda item: made.append(item) or item * 10)
    assert next(coming) == 10
    assert list(coming) == [20, 30] and made == [1, 2, 3]
    assert list(ahead([], str)) == []
