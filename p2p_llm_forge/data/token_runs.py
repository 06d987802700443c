"""Tokens of many documents, one after the other, with the length of each: put together.

A length of -1 is that of a document which could not be encoded; it has no tokens.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence

import numpy as np

Run = tuple[np.ndarray, np.ndarray]  # tokens (uint32), lengths (int64)


def run_of(ids: Sequence[Sequence[int] | None]) -> Run:
    """The tokens of each document as a run; None: it could not be encoded."""
    lengths = np.fromiter((-1 if one is None else len(one) for one in ids), np.int64, len(ids))
    flat = itertools.chain.from_iterable(one or () for one in ids)
    return np.fromiter(flat, np.uint32, int(lengths.clip(0).sum())), lengths


def joined(runs: list[Run]) -> Run:
    """Several runs as one."""
    if len(runs) == 1:
        return runs[0]
    tokens, lengths = zip(*runs, strict=True)
    return np.concatenate(tokens), np.concatenate(lengths)


def interleaved(is_second: np.ndarray, first: Run, second: Run) -> Run:
    """Two runs as one, in which `is_second` (bool) says of each document which run it is from."""
    lengths = np.empty(len(is_second), np.int64)
    lengths[~is_second], lengths[is_second] = first[1], second[1]
    of_second = np.repeat(is_second, lengths.clip(0))
    tokens = np.empty(len(of_second), np.uint32)
    tokens[~of_second], tokens[of_second] = first[0], second[0]
    return tokens, lengths


def without(is_out: np.ndarray, run: Run) -> Run:
    """A run without some of its documents (bool)."""
    tokens, lengths = run
    return tokens[~np.repeat(is_out, lengths.clip(0))], lengths[~is_out]
