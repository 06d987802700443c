"""Routers between the machines: an MTU black hole and NAT are named, and the fix is followed."""

from __future__ import annotations

import re
import shutil

import pytest

from tests.multihost.checks import WILL_NOT_WORK, WORKS, Peers, on_one_line
from tests.multihost.hosts import why_not
from tests.multihost.networks import block_messages, forward, in_a_row, translate, tunnel
from tests.runs import flags

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(bool(why_not()), reason=why_not() or ""),
    pytest.mark.skipif(not shutil.which("nft"), reason="needs `nft` (package nftables)"),
]


COUNT_QUERIES = (
    "add table inet dns; add chain inet dns out { type filter hook output priority 0; };"
    " add rule inet dns out udp dport 53 counter"
)


def meet(zygote, machines, folder, main=None, forwarded=()):
    """The statuses of a check on all machines, and what was printed, each on one line."""
    folder.mkdir()
    peers = Peers(zygote, machines, folder, len(machines), main)
    if forwarded:
        forward(forwarded[0], "tcp", peers.port, forwarded[1])
    peers.meet("--rendezvous-timeout=20")
    statuses, printed = peers.end()
    return list(statuses.values()), [on_one_line(text) for text in printed.values()]


def test_a_black_hole_is_named_and_its_fix_opens_the_way(zygote, tmp_path):
    with in_a_row(1500, 1300, 1500) as row:
        for router in row[1:3]:
            block_messages(router)
        machines = [row[0], row[3]]
        statuses, printed = meet(zygote, machines, tmp_path / "before")
        assert statuses == [WILL_NOT_WORK] * 2, printed
        for text in printed:
            found = re.findall(r"FAILED mtu between (.*?) fix: (.*?\.) For WireGuard", text)
            assert len(found) == 1, text
            both, fix = found[0]
            for number, host in enumerate(machines):
                assert f"rank {number} ({host.name})" in both
        steps = re.findall(r"on (\S+): sudo (.*?)[;.]", fix)
        assert [name for name, _ in steps] == [host.name for host in machines]
        for host, (_, command) in zip(machines, steps, strict=True):
            host.run(*command.split())
        statuses, printed = meet(zygote, machines, tmp_path / "after")
        assert statuses == [WORKS] * 2, printed


def test_name_servers_out_of_reach_do_not_keep_peers_apart(zygote, tmp_path, prepared):
    """Each of three would be asked twice, for 5 s and more: longer than peers wait for others."""
    servers = tmp_path / "resolv.conf"
    servers.write_text("".join(f"nameserver 10.99.99.{number}\n" for number in (1, 2, 3)))
    with in_a_row(1500, 1500) as (one, router, other):
        block_messages(router)  # nobody says that there is no way to them
        peers = Peers(zygote, [one, other], tmp_path, 2)
        words = [*flags(prepared, tmp_path / "run", world_size=2, master_addr=one.address)]
        words += ["--dry-run", f"--master-port={peers.port}", "--rendezvous-timeout=20"]
        for number, host in enumerate((one, other)):
            host.run("nft", COUNT_QUERIES)
            peers.start(number, *words, f"--rank={number}", script="train", name_servers=servers)
        statuses, printed = peers.end()
        assert statuses == {0: 0, 1: 0}, printed
        for host in (one, other):
            counted = host.run("nft", "list", "chain", "inet", "dns", "out")
            assert "counter packets" in counted and "packets 0" not in counted, counted


@pytest.mark.parametrize("inside", [1, 0], ids=["a peer", "the main machine"])
def test_nat_is_explained_and_a_tunnel_through_one_udp_port_helps(zygote, tmp_path, inside):
    with in_a_row(1500, 1500) as (outside_host, router, inside_host):
        translate(router)
        machines = [outside_host, inside_host] if inside else [inside_host, outside_host]
        main = () if inside else (router.address, (router, inside_host))
        statuses, printed = meet(zygote, machines, tmp_path / "before", *main)
        assert statuses == [WILL_NOT_WORK] * 2, printed
        for text in printed:
            assert text.count("FAILED") == 1 and "ufw" not in text
            (nat,) = re.findall(
                r"FAILED nat rank (\d) \((\S+)\) is behind a router that translates", text
            )
            assert nat == (str(inside), inside_host.name)
            assert f"its own address is {inside_host.address}" in text
            assert ("rank 0 sees " + router.address in text) == bool(inside)
            assert re.search("Simplest is Tailscale: .* Or WireGuard, .* one UDP port, 51820", text)
        forward(router, "udp", 51820, inside_host)
        tunnel(outside_host, inside_host, router.address)
        outside_host.address, inside_host.address = "10.9.0.1", "10.9.0.2"
        statuses, printed = meet(zygote, machines, tmp_path / "after")
        assert statuses == [WORKS] * 2, printed
