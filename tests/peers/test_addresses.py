"""Addresses are judged as the standards define them, ports by real sockets."""

from __future__ import annotations

import os
import socket

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import addresses


@pytest.mark.parametrize(
    ("address", "public"),
    [
        ("10.0.0.1", False),
        ("172.16.3.4", False),
        ("192.168.178.20", False),
        ("169.254.1.1", False),
        ("127.0.0.1", False),
        ("100.101.102.103", False),  # Tailscale, RFC 6598
        ("fd7a:115c:a1e0::1", False),  # Tailscale, RFC 4193
        ("fe80::1", False),
        ("172.32.0.1", True),
        ("8.8.8.8", True),
        ("2a00:1450:4001::1", True),
    ],
)
def test_what_the_internet_can_reach_is_public(address, public):
    assert addresses.is_public(address) == public
    assert bool(addresses.judge_public([address], is_allowed=False)) == public


def test_a_public_address_is_a_failure_unless_allowed():
    (refused,) = addresses.judge_public(["8.8.8.8", "10.0.0.1", "8.8.8.8"], is_allowed=False)
    assert refused.level == "failure" and refused.found.startswith("8.8.8.8 is a public address")
    (allowed,) = addresses.judge_public(["8.8.8.8"], is_allowed=True)
    assert allowed.level == "warning"


def test_an_open_port_and_a_refused_one_are_told_apart():
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        port = server.getsockname()[1]
        assert addresses.probe("127.0.0.1", port) == addresses.REFUSED
        assert addresses.judge_own_port(port).level == "failure", "bound by another"
        server.listen()
        assert addresses.probe("127.0.0.1", port) == addresses.OPEN
    assert addresses.judge_own_port(port).level == "fine"
    assert addresses.wait_until_open("127.0.0.1", port, 0.3) == addresses.REFUSED


def test_a_name_that_means_nothing_is_reported():
    with pytest.raises(ForgeError, match="no.such.host.invalid means nothing on this machine"):
        addresses.resolve("no.such.host.invalid")


def test_loopback_brings_several_machines_together_only_if_they_are_one():
    (finding,) = addresses.judge_name("127.0.0.1", machines=2)
    assert finding.level == "warning"
    (finding,) = addresses.judge_name("localhost", machines=1)
    assert finding.level == "fine"


def test_the_users_own_waits_for_name_servers_stay(monkeypatch):
    monkeypatch.delenv("RES_OPTIONS", raising=False)
    with addresses.brief_lookups():
        ours = os.environ["RES_OPTIONS"]
        with addresses.brief_lookups():
            assert os.environ["RES_OPTIONS"] == ours
        assert os.environ["RES_OPTIONS"] == ours
    assert "RES_OPTIONS" not in os.environ
    monkeypatch.setenv("RES_OPTIONS", "timeout:9")
    with addresses.brief_lookups():
        assert os.environ["RES_OPTIONS"] == "timeout:9"
    assert os.environ["RES_OPTIONS"] == "timeout:9"
