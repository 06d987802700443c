"""The law of the loss: more of anything never hurts, and repetitions are worth less and less."""

from __future__ import annotations

import bz2

import pytest

from p2p_llm_forge.training import law


def test_more_parameters_more_text_and_an_easier_text_lower_the_loss():
    at = law.bits_per_byte(1e6, 1e6, 1e7, compressed=2.5)
    assert law.bits_per_byte(2e6, 1e6, 1e7, 2.5) < at
    assert law.bits_per_byte(1e6, 2e6, 1e7, 2.5) < at
    assert law.bits_per_byte(1e6, 1e6, 1e7, 2.0) < at
    assert 0 < law.bits_per_byte(1e9, 1e13, 1e13, 2.5) < at


def test_text_that_is_read_again_is_worth_less_each_time():
    assert law.worth(5e5, 1e6) == 5e5 and law.worth(1e6, 1e6) == 1e6
    gains = [law.worth((n + 1) * 1e6, 1e6) - law.worth(n * 1e6, 1e6) for n in range(1, 40)]
    assert gains[0] > 0.9e6 and all(a > b > 0 for a, b in zip(gains, gains[1:], strict=False))
    # What the paper says of four epochs: nearly as good as new text.
    assert law.worth(4e6, 1e6) > 0.85 * 4e6
    assert law.worth(1e12, 1e6) == pytest.approx(1e6 * (1 + law.REPEATS))


def test_a_model_that_is_large_for_its_text_learns_it_by_heart():
    # Runs on 42 KB: 2.64 bits per byte after ten readings by depth 1, 3.83 after forty by depth 2.
    loss = [law.bits_per_byte(3e5, read, 4.2e4, 2.5) for read in (1.7e5, 4.2e5, 1.7e6)]
    assert loss[2] > 1.1 * loss[1] and loss[2] > loss[0]
    # On a text ten thousand times as large, reading on goes on helping.
    loss = [law.bits_per_byte(3e5, read, 7.5e8, 2.5) for read in (7.5e8, 3e9, 1.2e10)]
    assert loss[0] > loss[1] > loss[2]


def test_the_compressor_sees_the_beginning_of_a_text():
    text = b"To be, or not to be, that is the question. " * 10_000
    assert law.compressed_bits(text) == 8 * len(bz2.compress(text[:200_000])) / 200_000
    assert law.compressed_bits(b"")  # nothing, but no error
