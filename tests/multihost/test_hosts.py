"""Shaped hosts send as fast as was asked for, in both directions, and count what they send."""

from __future__ import annotations

import time

import pytest

from tests import ROOT
from tests.multihost.hosts import PYTHON, hosts, why_not

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
]
EXCHANGE = ROOT / "tests" / "multihost" / "exchange.py"
HEADERS = 1514 / 1448  # of a packet that is full: Ethernet, IP and TCP


def exchange(machines, count, tmp_path) -> list[list[float]]:
    """What exchange.py prints, on each of two hosts that get `count` bytes from each other."""
    logs = [tmp_path / f"{host.name}-{time.monotonic_ns()}.log" for host in machines]
    for host, log, role in zip(machines, logs, ("listen", "connect"), strict=True):
        host.start(PYTHON, EXCHANGE, role, machines[0].address, count, log=log)
    statuses = [status for host in machines for status in host.wait()]
    assert statuses == [0] * len(statuses), [log.read_text() for log in logs]
    return [[float(word) for word in log.read_text().split()] for log in logs]


def rates(machines, count, tmp_path) -> list[tuple[float, float]]:
    """Mbit/s on the wire in each direction of an exchange: from the first moment on, and from the
    first byte on."""
    return [
        (count * 8 * HEADERS / whole_s / 1e6, rest * 8 * HEADERS / rest_s / 1e6)
        for whole_s, rest, rest_s in exchange(machines, count, tmp_path)
    ]


def assert_shaped(machines, mbit, count, tmp_path) -> None:
    """Never too fast; and not too slow, but for moments in which a busy machine was."""
    for _ in range(5):
        found = rates(machines, count, tmp_path)
        assert max(whole for whole, _ in found) < 1.1 * mbit
        if min(rest for _, rest in found) > 0.9 * mbit:
            return
    raise AssertionError(f"{found} instead of {mbit} Mbit/s, five times")


@pytest.mark.parametrize(("mbit", "megabytes"), [(50, 2), (50, 8), (200, 16), (1000, 64)])
def test_both_directions_have_the_rate_that_was_asked_for(mbit, megabytes, tmp_path):
    with hosts(2, mbit=mbit) as machines:
        assert_shaped(machines, mbit, megabytes * 1_000_000, tmp_path)


def test_the_interface_counts_what_was_sent_and_received(tmp_path):
    count = 4_000_000
    with hosts(2, mbit=200) as machines:
        before = [(host.bytes_sent(), host.bytes_received()) for host in machines]
        exchange(machines, count, tmp_path)
        after = [(host.bytes_sent(), host.bytes_received()) for host in machines]
    for then, now in zip(before, after, strict=True):
        for direction in (0, 1):
            assert count < now[direction] - then[direction] < 1.1 * count


def test_shaping_again_replaces_the_rate(tmp_path):
    with hosts(2) as machines:
        unshaped = min(whole for whole, _ in rates(machines, 8_000_000, tmp_path))
        for mbit in (20, 40):
            for host in machines:
                host.shape(mbit)
            assert_shaped(machines, mbit, 2_000_000, tmp_path)
    assert unshaped > 80
