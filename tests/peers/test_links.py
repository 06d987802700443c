"""What is computed from measured links; the measuring itself is tested on hosts."""

from __future__ import annotations

import math

import pytest

from p2p_llm_forge.peers.links import Links, _slope

NAN = math.nan
LINKS = Links(
    latency_s=[[NAN, 0.001, 0.002], [0.001, NAN, 0.003], [0.002, 0.003, NAN]],
    bytes_per_s=[[NAN, 1e8, 1e8], [1e8, NAN, 2e6], [1e6, 1e8, NAN]],
)


def test_the_slowest_link_is_a_direction():
    assert LINKS.slowest() == (2, 0, 1e6)


def test_the_burst_at_the_start_of_a_stream_does_not_count():
    # 1 MB arrives at once, then 100 kB every tenth of a second: 1 MB/s.
    arrivals = [(10.01, 1_000_000)]
    arrivals += [(10.01 + n / 10, 1_000_000 + n * 100_000) for n in range(1, 11)]
    assert _slope(10.0, arrivals) == pytest.approx(1e6)
