"""Numbers that cannot be are refused by the name of the rank that sent them."""

from __future__ import annotations

import math

import pytest

from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.peers.rank_failure import RankFailure


@pytest.mark.parametrize(
    "bad",
    [math.nan, math.inf, -math.inf, -1, 1.5, 101, 10**400, True, None, "7", [7], {}, "\ud800"],
)
def test_what_is_no_whole_number_in_range_is_refused_by_name(bad):
    assert require_numbers("it trained on", [1, 100.0, 7], 1, 100, are_whole=True) is None
    with pytest.raises(RankFailure, match="rank 2 says that it trained on .*, which cannot be"):
        require_numbers("it trained on", [1, 2, bad], 1, 100, are_whole=True)


def test_a_fraction_is_one_where_numbers_need_not_be_whole():
    assert require_numbers("its seconds are", [0.0, 1.5]) is None
    with pytest.raises(RankFailure, match="rank 1 says that its tokens are 1.5, which cannot be"):
        require_numbers("its tokens are", [0.0, 1.5], are_whole=True)


def test_what_is_shown_of_it_is_short():
    with pytest.raises(RankFailure) as refusal:
        require_numbers("its host is", ["\x1b[2J" * 10_000])
    (problem,) = refusal.value.problems
    assert len(problem.found) < 120 and problem.found.isprintable()
