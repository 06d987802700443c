"""The benchmarks' t-test is Student's."""

from __future__ import annotations

import math

import pytest

from benchmarks.noise import against, paired_t, two_sided


@pytest.mark.parametrize(
    ("freedom", "t", "p"),
    # Printed tables of the distribution (two-sided).
    [(1, 12.706, 0.05), (2, 4.303, 0.05), (2, 9.925, 0.01), (4, 2.776, 0.05), (9, 3.250, 0.01)],
)
def test_probabilities_are_those_of_printed_tables(freedom, t, p):
    assert two_sided(t, freedom) == pytest.approx(p, rel=2e-3)
    assert two_sided(-t, freedom) == two_sided(t, freedom)


def test_it_is_what_scipy_finds():
    stats = pytest.importorskip("scipy.stats")
    first, second = [2.094, 2.066, 2.058, 2.07], [2.050, 2.035, 2.056, 2.04]
    expected = stats.ttest_rel([b / a for a, b in zip(first, second, strict=True)], [1.0] * 4)
    t = paired_t([b / a - 1 for a, b in zip(first, second, strict=True)])
    assert t == pytest.approx(expected.statistic)
    assert two_sided(t, 3) == pytest.approx(expected.pvalue, rel=1e-6)


def test_ends_of_the_scale():
    assert two_sided(0, 3) == pytest.approx(1)
    assert two_sided(math.inf, 3) == pytest.approx(0, abs=1e-9)
    assert paired_t([0.0, 0.0]) == 0
    assert paired_t([-0.1, -0.1]) == -math.inf


def test_a_difference_is_told_with_what_it_is_worth():
    first = [2.094, 2.066, 2.058]
    found = against([2.050, 2.035, 2.056], first)
    assert found == "-1.23%, t -2.1, p 0.173 of 3 seeds: within noise"
    found = against([1.05 * one for one in first], first)
    assert found.endswith("p 0.000 of 3 seeds: beyond noise")
    assert against(first, first) == "+0.00%, t +0.0, p 1.000 of 3 seeds: within noise"
    assert against([2.0], [2.1]) == "-4.76%, one seed: noise is not known"
