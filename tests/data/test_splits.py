"""Which documents are held out, and what a piece gives to each split."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from p2p_llm_forge.data.splits import (
    TRAIN,
    VALIDATION,
    EncodeOptions,
    encode_piece,
    held_out,
    with_document_ends,
)

EOS = 7


def splitmix64(state: int) -> int:
    """Java's SplittableRandom, in Python's own integers."""
    mask = 2**64 - 1
    state = (state + 0x9E3779B97F4A7C15) & mask
    state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & mask
    state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & mask
    return state ^ (state >> 31)


@pytest.mark.parametrize("seed", [0, 5, -1])
def test_held_out_documents_are_the_hash_of_their_numbers(seed):
    assert splitmix64(0) == 0xE220A8397B1DCDAF, "published first output for seed 0"
    chosen = held_out(3, 1_000, 0.1, seed)
    base = splitmix64((splitmix64(seed % 2**64) + 3) % 2**64)
    expected = [splitmix64((base + n) % 2**64) < int(0.1 * 2**64) for n in range(1_000)]
    assert chosen.tolist() == expected
    assert 70 < sum(expected) < 130


def test_held_out_documents_are_spread_and_change_with_the_seed():
    chosen = np.concatenate([held_out(unit, 5_000, 0.2, 0) for unit in range(10)])
    thirds = [part.mean() for part in np.array_split(chosen, 3)]
    assert all(abs(fraction - 0.2) < 0.02 for fraction in thirds)
    other = np.concatenate([held_out(unit, 5_000, 0.2, 1) for unit in range(10)])
    assert 0.02 < (chosen & other).mean() < 0.06
    assert not held_out(0, 1_000, 0.0, 0).any()


def test_every_document_is_followed_by_eos():
    tokens = np.array([1, 2, 3, 4], np.uint32)
    joined = with_document_ends(tokens, np.array([2, 0, 1, 1]), EOS, "uint16")
    assert joined.dtype == np.uint16
    assert joined.tolist() == [1, 2, EOS, EOS, 3, EOS, 4, EOS]


def lengths_as_tokens(documents):
    """An encoder for tests: of a document of n bytes, n times the token n."""
    lengths = np.array([len(document.as_py()) for document in documents], np.int64)
    return np.repeat(lengths, lengths).astype(np.uint32), lengths


@pytest.mark.parametrize("is_validation", [False, True])
def test_a_piece_gives_its_documents_in_order_to_train_on_and_then_those_held_out(is_validation):
    sizes = [100 + n for n in range(50)]
    column = pa.array([b"x" * size for size in sizes], pa.large_binary())
    options = EncodeOptions(lengths_as_tokens, EOS, "uint16", validation_fraction=0.3, seed=1)
    tokens, counts = encode_piece(4, column, is_validation, options)
    hidden = [True] * 50 if is_validation else held_out(4, 50, 0.3, 1).tolist()
    of_split = {
        TRAIN: [size for size, is_hidden in zip(sizes, hidden, strict=True) if not is_hidden],
        VALIDATION: [size for size, is_hidden in zip(sizes, hidden, strict=True) if is_hidden],
    }
    assert is_validation or 5 < len(of_split[VALIDATION]) < 30
    expected = [
        token for sizes in of_split.values() for size in sizes for token in [size] * size + [EOS]
    ]
    assert tokens.tolist() == expected and tokens.dtype == np.uint16
    for split, sizes_of_split in of_split.items():
        assert counts[split].documents == len(sizes_of_split)
        assert counts[split].bytes == sum(sizes_of_split)
        assert counts[split].tokens == sum(sizes_of_split) + len(sizes_of_split)
