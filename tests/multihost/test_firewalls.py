"""Firewalls are opened by the lines that check_cluster.py prints for them, as they are printed."""

from __future__ import annotations

import contextlib
import re
import socket

import pytest

from p2p_llm_forge.peers import addresses
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.routes import Main, judge_route
from tests import ROOT
from tests.multihost.checks import WILL_NOT_WORK, WORKS, Peers, on_one_line
from tests.multihost.firewalls import TOOLS, guarded, missing
from tests.multihost.hosts import hosts, why_not
from tests.multihost.networks import tunnel
from tests.multihost.places import on

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.skipif(bool(missing()), reason=f"needs the programs {', '.join(missing())}"),
]
CLOSED = {
    "ufw": "does not answer within 3 s: a firewall drops the packets",
    "nft": "does not answer within 3 s: a firewall drops the packets",
    "firewall-cmd": "or its firewall says that it is prohibited",
}
LINE = re.compile(
    r"rank (\d) \(\S+\) cannot reach rank (\d) \(\S+\) at \S+ (?:filtered|no route); .*? fix:"
    r" (?:check .*? if that shows a way, )?let the peers talk freely: on the machine of rank (\d):"
    r" (.*?\))"
)


def of_port(host, main, port):
    """What a machine alone finds about the main port of another."""
    place = Main(main.address, port, 2, is_here=False, will_be_waited_for=False)
    found = on(host, lambda: judge_route(place, Launch(), allow_public_address=False))
    (finding,) = [finding for finding in found if finding.topic == "port"]
    return finding


def test_the_lines_for_each_firewall_open_it(zygote, tmp_path):
    with hosts(3) as machines, contextlib.ExitStack() as stack:
        behind = [
            stack.enter_context(guarded(host, tool, tmp_path / tool))
            for host, tool in zip(machines, TOOLS, strict=True)
        ]
        peers = Peers(zygote, machines, tmp_path, 3)
        # Each machine as the main one; the ufw of the first must let both others in.
        for other, main in ((1, 0), (2, 0), (0, 1), (1, 2)):
            finding = of_port(machines[other], machines[main], peers.port)
            assert finding.level == "failure" and CLOSED[TOOLS[main]] in finding.found
            assert "on machine 0: sudo" in finding.fix and "NAT" not in finding.fix
            for command in re.findall(r"`(ip route get .*?)`; if that shows a way", finding.fix):
                assert f"{machines[main].address} dev eth0" in machines[other].run(*command.split())
            behind[main].follow(finding.fix, TOOLS[main])
            finding = of_port(machines[other], machines[main], peers.port)
            assert finding.level == "warning" and "refused the connection" in finding.found

        peers.meet("--rendezvous-timeout=60")
        statuses, printed = peers.end()
        assert set(statuses.values()) == {WILL_NOT_WORK}, printed
        pairs = LINE.findall(on_one_line(printed[0]))
        assert len(pairs) == 6, printed[0]
        for source, target, where, fix in pairs:
            assert where == target != source
            behind[int(target)].follow(fix, TOOLS[int(target)])
        peers.meet("--rendezvous-timeout=60")
        statuses, printed = peers.end()
        assert set(statuses.values()) == {WORKS}, printed


def test_a_firewall_that_rejects_is_opened_by_the_same_line(tmp_path):
    with hosts(2) as machines, guarded(machines[0], "ufw", tmp_path / "ufw") as main:
        main.run("ufw default reject incoming")
        with on(machines[0], lambda: socket.create_server((machines[0].address, 29500))):
            finding = of_port(machines[1], machines[0], 29500)
            assert finding.level == "warning" and "or a firewall rejects" in finding.found
            main.follow(finding.fix, "ufw")
            assert of_port(machines[1], machines[0], 29500).level == "fine"


def test_the_firewall_of_the_documents_lets_the_peers_in_and_nobody_else(tmp_path):
    """What KEEP_OUT names: a tunnel between the peers, and nothing else open."""
    page = (ROOT / "docs" / "security.md").read_text(encoding="utf-8")
    (step,) = re.findall(r"^2\. \*\*A firewall\.\*\* .*?(?=\(With Tailscale)", page, re.M | re.S)
    commands = re.findall(r"`(sudo ufw .*?)`", step)
    assert len(commands) == 5
    with hosts(3) as (main, peer, stranger), guarded(main, "nothing", tmp_path / "main") as machine:
        tunnel(main, peer, peer.address)
        reached = [(peer, "10.9.0.1"), (peer, main.address), (stranger, main.address)]

        def states():
            return [
                on(host, lambda at=at: addresses.probe(at, 29500, timeout_s=1.5))
                for host, at in reached
            ]

        with on(main, lambda: socket.create_server(("", 29500))):
            assert states() == [addresses.OPEN] * 3
            for command in commands:
                machine.run(command.replace("ufw enable", "ufw --force enable"))
            assert states() == [addresses.OPEN, addresses.FILTERED, addresses.FILTERED]
