"""Runs of tokens, put together and taken apart, against lists of lists."""

from __future__ import annotations

import numpy as np
import pytest

from p2p_llm_forge.data import token_runs
from p2p_llm_forge.data.token_runs import interleaved, joined, without


def run_of(documents):
    lengths = [-1 if one is None else len(one) for one in documents]
    flat = [token for one in documents for token in one or ()]
    return np.array(flat, np.uint32), np.array(lengths, np.int64)


def assert_same(run, documents):
    for ours, right in zip(run, run_of(documents), strict=True):
        assert ours.dtype == right.dtype and ours.tolist() == right.tolist()


DOCUMENTS = [[1, 2], [], None, [3], [4, 5, 6], None, []]


def test_a_run_is_made_of_lists():
    assert_same(token_runs.run_of(DOCUMENTS), DOCUMENTS)
    assert_same(token_runs.run_of([]), [])


@pytest.mark.parametrize("mask", [0, 0b1111111, 0b0000100, 0b1010101, 0b0101010])
def test_runs_are_as_their_documents(mask):
    chosen = np.array([bool(mask >> place & 1) for place in range(len(DOCUMENTS))])
    first = [one for one, is_second in zip(DOCUMENTS, chosen, strict=True) if not is_second]
    second = [one for one, is_second in zip(DOCUMENTS, chosen, strict=True) if is_second]
    assert_same(interleaved(chosen, run_of(first), run_of(second)), DOCUMENTS)
    assert_same(without(chosen, run_of(DOCUMENTS)), first)
    assert_same(joined([run_of(first), run_of(second), run_of([])]), first + second)
    assert_same(joined([run_of(first)]), first)
