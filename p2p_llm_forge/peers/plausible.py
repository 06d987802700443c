"""Whether numbers that other ranks have sent can be true at all."""

from __future__ import annotations

import math
import sys
from collections.abc import Sequence
from typing import Any

from p2p_llm_forge.peers.findings import SAME_VERSION_FIX
from p2p_llm_forge.peers.rank_failure import RankFailure

LEAST, LARGEST = -sys.float_info.max, sys.float_info.max  # of what is finite
LONGEST_SHOWN = 40  # characters of what a rank has sent


def require_numbers(
    what: str,
    by_rank: Sequence[Any],
    least: float = 0.0,
    most: float = math.inf,
    *,
    are_whole: bool = False,
) -> None:
    """Raise RankFailure, naming the rank, unless all are finite numbers between `least` and `most`.

    what: they are, in a message. by_rank: of each rank, as they came: any JSON.
    """
    for rank, value in enumerate(by_rank):
        is_number = isinstance(value, int | float) and not isinstance(value, bool)
        if not is_number or not LEAST <= value <= LARGEST or not least <= value <= most:
            raise _implausible(what, rank, value)
        if are_whole and value != int(value):
            raise _implausible(what, rank, value)


def entry(values: Any, number: int) -> Any:
    """What stands at a place of a list that a rank has sent; None if there is none."""
    return values[number] if isinstance(values, list) and number < len(values) else None


def _implausible(what: str, rank: int, value: Any) -> RankFailure:
    shown = ascii(value)
    shown = shown if len(shown) <= LONGEST_SHOWN else shown[:LONGEST_SHOWN] + "..."
    return RankFailure(f"rank {rank} says that {what} {shown}, which cannot be", SAME_VERSION_FIX)
