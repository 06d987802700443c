"""Doors answer those who try them; what keeps ranks apart is named for what it is."""

from __future__ import annotations

import socket
import threading

import pytest

from p2p_llm_forge.peers import addresses, reach

HERE = "127.0.0.1"


def test_an_open_door_takes_64_kb_both_ways():
    with reach.opened_door(HERE) as port:
        assert reach.try_doors([{"address": HERE, "port": port}] * 5) == [(addresses.OPEN, 0)] * 5
        assert reach._exchange(HERE, port, 1280) == addresses.OPEN
    assert reach.try_door(HERE, port) == (addresses.REFUSED, 0)


def test_a_program_that_is_not_of_ours_is_silent(monkeypatch):
    monkeypatch.setattr(reach, "ANSWER_S", 0.3)
    with socket.create_server((HERE, 0)) as other:
        assert reach.try_door(HERE, other.getsockname()[1]) == (reach.SILENT, 0)


def swallow(server, limit):
    """Answer what is small, and nothing once more than `limit` bytes came."""
    while True:
        try:
            stream, _ = server.accept()
        except OSError:
            return
        stream.recv(1)
        stream.sendall(b"!")
        total = 0
        while data := stream.recv(1 << 16):
            total += len(data)
            if total % reach.PIECE_BYTES == 0 and total <= limit:
                stream.sendall(b"!")
        stream.close()


def test_64_kb_that_do_not_come_through_in_small_packets_either_are_stalled(monkeypatch):
    monkeypatch.setattr(reach, "STALL_S", 0.3)
    with socket.create_server((HERE, 0)) as server:
        threading.Thread(target=swallow, args=(server, 2 << 14), daemon=True).start()
        assert reach.try_door(HERE, server.getsockname()[1]) == (reach.STALLED, 0)


def test_a_stranger_at_a_door_does_no_harm(capfd):
    with reach.opened_door(HERE) as port:
        for data in (b"", b"GET / HTTP/1.1\r\n\r\n", bytes(1 << 17)):
            with socket.create_connection((HERE, port)) as stranger:
                stranger.sendall(data)
        assert reach.try_door(HERE, port) == (addresses.OPEN, 0)
    assert capfd.readouterr().err == ""


def hello(host, address, main="10.0.0.1", to_main=None, interface="eth0"):
    own = {"address": address, "addresses": ["127.0.0.1", address], "interface": interface}
    return reach.readable({"host": host, **own, "main": [main], "to_main": to_main or address})


ANNA, BERT = hello("anna", "10.0.0.1"), hello("bert", "10.0.0.2", interface="wg0")
BOTH_SEEN = ["10.0.0.1", "10.0.0.2"]


def judge(hellos, state, seen, mtu=0, back=None):
    facts = [
        {"tries": {"1": [state, mtu]}, "seen": seen},
        {"tries": {"0": list(back or (state, mtu))}},
    ]
    return reach.judge_tries(hellos, facts)


def test_ranks_that_reach_each_other_make_no_finding():
    assert judge([ANNA, BERT], addresses.OPEN, []) == []


@pytest.mark.parametrize(
    ("state", "fix"),
    [
        (addresses.FILTERED, "ufw allow from 10.0.0.1"),
        (addresses.NO_ROUTE, "ip route get 10.0.0.2"),
    ],
)
def test_ranks_that_do_not_reach_each_other_are_named_in_pairs(state, fix):
    first, second = judge([ANNA, BERT], state, BOTH_SEEN)
    assert f"rank 0 (anna) cannot reach rank 1 (bert) at 10.0.0.2: {state}" in first.found
    assert fix in first.fix and second.found.startswith("rank 1 (bert) cannot reach rank 0 (anna)")


def test_a_black_hole_is_named_once_for_a_pair_with_the_command_for_each_machine():
    (finding,) = judge([ANNA, BERT], reach.VANISHING, BOTH_SEEN, mtu=1280)
    assert "between rank 0 (anna) and rank 1 (bert) small packets pass" in finding.found
    assert "on anna: sudo ip link set dev eth0 mtu 1280" in finding.fix
    assert "on bert: sudo ip link set dev wg0 mtu 1280" in finding.fix


def test_a_rank_that_is_seen_under_another_address_is_behind_nat_and_no_firewall_is_blamed():
    bert = hello("bert", "192.168.7.2")
    (finding,) = judge(
        [ANNA, bert], addresses.NO_ROUTE, ["10.0.0.1", "10.0.0.99"], back=(addresses.OPEN, 0)
    )
    assert finding.topic == "nat" and "its own address is 192.168.7.2" in finding.found
    assert "rank 0 sees 10.0.0.99" in finding.found and "ufw" not in finding.fix
    assert (
        finding.fix.index("Tailscale") < finding.fix.index("WireGuard") < finding.fix.index("UDP")
    )


def test_a_main_machine_behind_a_forwarded_port_is_behind_nat():
    anna, bert = hello("anna", "192.168.7.2", "10.0.0.9"), hello("bert", "10.0.0.2", "10.0.0.9")
    (finding,) = judge([anna, bert], addresses.FILTERED, ["10.0.0.2"], back=(addresses.OPEN, 0))
    assert finding.topic == "nat" and "rank 0 (anna) is behind a router" in finding.found
    assert "forward the main port, but peers open further ports" in finding.found


def test_where_nothing_is_known_of_who_is_seen_nobody_is_behind_nat():
    assert {one.topic for one in judge([ANNA, BERT], addresses.FILTERED, [])} == {"reach"}


@pytest.mark.parametrize("target", ["127.0.0.1", None])
def test_an_address_that_only_its_machine_knows_is_named(target):
    finding, _ = judge([ANNA, hello("bert", target)], addresses.REFUSED, [])
    assert "known on its own machine only" in finding.found and "GLOO_SOCKET_IFNAME" in finding.fix


@pytest.mark.parametrize(
    "tries", [None, [], {"x": ["open", 0]}, {"9": ["open", 0]}, {"1": 3}, {"1": ["a", "b"]}]
)
def test_what_strangers_write_as_tries_is_no_finding(tries):
    facts = [{"tries": tries}, {"tries": tries, "seen": 5}]
    assert reach.judge_tries([ANNA, BERT], facts) == []


@pytest.mark.parametrize("evil", ["$(reboot)", "a; reboot", "", None, 5, [], {}, "x" * 99])
def test_what_strangers_write_as_a_hello_becomes_no_part_of_a_command(evil):
    keys = ("address", "to_main", "interface", "port")
    odd = reach.readable({key: evil for key in keys} | {"addresses": [evil], "main": evil})
    assert odd["address"] is None and odd["port"] in (0, 5) and odd["main"] == []
    assert reach.try_doors([odd]) != [(addresses.OPEN, 0)]
    for finding in judge([ANNA, odd], reach.VANISHING, ["10.0.0.1"], 1280):
        assert "reboot" not in finding.found + finding.fix


def test_those_who_are_connected_are_seen():
    with socket.create_server((HERE, 0)) as server, socket.create_connection(server.getsockname()):
        assert reach.seen_at(server.getsockname()[1]) == [HERE]


def test_the_place_of_this_machine_is_known():
    facts = reach.facts_of(HERE, HERE)
    assert HERE in facts["addresses"] and facts["main"] == [HERE] and facts["to_main"] is None
    assert reach.facts_of(None, "no.such.host.invalid")["main"] == []
