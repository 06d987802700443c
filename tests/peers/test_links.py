"""What is computed from measured links; the measuring itself is tested on hosts."""

from __future__ import annotations

import math
import socket
import statistics
from concurrent.futures import ThreadPoolExecutor

import pytest

from p2p_llm_forge.peers.links import (
    Links,
    _is_clear,
    _second_half,
    _slopes,
    _stream,
    _time_stream,
)

NAN = math.nan
LINKS = Links(
    latency_s=[[NAN, 0.001, 0.002], [0.001, NAN, 0.003], [0.002, 0.003, NAN]],
    bytes_per_s=[[NAN, 1e8, 1e8], [1e8, NAN, 2e6], [1e6, 1e8, NAN]],
)


def test_the_slowest_link_is_a_direction():
    assert LINKS.slowest() == (2, 0, 1e6)


STEADY = [(n / 100, n * 10_000) for n in range(1, 400)]  # 1 MB/s


def rate(samples):
    return statistics.median(_slopes(_second_half(0.0, samples)))


def test_the_burst_at_the_start_of_a_stream_does_not_count():
    assert rate([(when, 1_000_000 + count) for when, count in STEADY]) == pytest.approx(1e6)


def test_moments_without_a_byte_do_not_count():
    """For 100 ms in every second the sender sent nothing; the shaper made up for 30 kB of it."""
    idle = [(when, count - 70_000 * int(when)) for when, count in STEADY if when % 1 > 0.1]
    assert rate(idle) == pytest.approx(1e6, rel=0.1)


def test_measuring_ends_when_the_slopes_agree_or_it_takes_too_long():
    assert not _is_clear(0.0, STEADY[:40], 0.5), "too early"
    assert _is_clear(0.0, STEADY[:60], 0.5)
    faster = [(when, int(when**2 * 1e6)) for when, _ in STEADY]
    assert not _is_clear(0.0, faster[:100], 0.5)
    assert _is_clear(0.0, faster[:250], 0.5), "four times as long"
    assert _slopes([(1.0, 5)]) == [], "nothing to take a rate from"


def test_only_the_one_who_knows_the_token_is_measured():
    with socket.create_server(("127.0.0.1", 0)) as server, ThreadPoolExecutor() as threads:
        address, port = server.getsockname()
        with socket.create_connection((address, port)) as stranger:
            stranger.sendall(b"GET / HTTP/1.1\r\n\r\n" + bytes(64))
            threads.submit(_stream, address, port, {"token": "a" * 32})
            assert _time_stream(server, "a" * 32, 0.0001, 0.1) > 1e6
