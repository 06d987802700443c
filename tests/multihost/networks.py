"""Networks with routers between the hosts: links that carry less than they say, and NAT."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator

from tests.multihost.hosts import Host, ip


@contextlib.contextmanager
def in_a_row(*mtus: int) -> Iterator[list[Host]]:
    """Hosts in a row, one link of an MTU between each and the next; those between are routers.

    The interface of the first and the last is eth0; a router has `left` and `right`. Everything
    vanishes with the block.
    """
    tag, third = f"forge{os.getpid()}", os.getpid() % 250
    row: list[Host] = []
    try:
        for number in range(len(mtus) + 1):
            link = max(0, number - 1)  # its address is that on the link to its left
            row.append(Host(f"{tag}-r{number}", address(third, link, min(number, 1) + 1)))
            ip("netns", "add", row[-1].name)
        for link, mtu in enumerate(mtus):
            _join(row, link, mtu, third)
        for number, host in enumerate(row):
            _route(row, number, host, third)
        yield row
    finally:
        for host in row:
            host.switch_off()
            ip("netns", "del", host.name)


def address(third: int, link: int, end: int) -> str:
    return f"10.{78 + link}.{third}.{end}"


def _join(row: list[Host], link: int, mtu: int, third: int) -> None:
    """Two neighbours by a cable, whose left end is 1 and whose right end is 2."""
    one, other = row[link], row[link + 1]
    left = "right" if link else "eth0"
    right = "left" if link + 2 < len(row) else "eth0"
    ip(
        *("link", "add", left, "netns", one.name, "mtu", str(mtu), "type", "veth"),
        *("peer", "name", right, "netns", other.name, "mtu", str(mtu)),
    )
    for host, name, end in ((one, left, 1), (other, right, 2)):
        ip("-n", host.name, "address", "add", f"{address(third, link, end)}/24", "dev", name)
        ip("-n", host.name, "link", "set", name, "up")
        ip("-n", host.name, "link", "set", "lo", "up")


def _route(row: list[Host], number: int, host: Host, third: int) -> None:
    last = len(row) - 1
    host.run("sh", "-c", "echo 1 > /proc/sys/net/ipv4/ip_forward")
    if number == 0:
        ip("-n", host.name, "route", "add", "default", "via", address(third, 0, 2))
    if number == last:
        ip("-n", host.name, "route", "add", "default", "via", address(third, last - 1, 1))
    if not 0 < number < last:
        return
    for link in range(last):
        network = f"10.{78 + link}.{third}.0/24"
        if link > number:
            ip("-n", host.name, "route", "add", network, "via", address(third, number, 2))
        if link < number - 1:
            ip("-n", host.name, "route", "add", network, "via", address(third, number - 1, 1))


def block_messages(router: Host) -> None:
    """Let the router drop too large packets without a word, as badly set firewalls do."""
    router.run(
        "nft",
        "add table ip quiet; add chain ip quiet out { type filter hook output priority 0; };"
        " add rule ip quiet out icmp type destination-unreachable drop",
    )


def translate(router: Host) -> None:
    """Let all on the router's right appear on its left under the router's own address (NAT), and
    nobody on the left open a connection to the right."""
    router.run(
        "nft",
        "add table ip nat;"
        " add chain ip nat out { type nat hook postrouting priority 100; };"
        " add rule ip nat out oifname left masquerade;"
        " add chain ip nat in { type nat hook prerouting priority -100; };"
        " add chain ip nat pass { type filter hook forward priority 0; };"
        " add rule ip nat pass iifname left ct state new ct status ! dnat drop",
    )


def forward(router: Host, protocol: str, port: int, inside: Host) -> None:
    """Let what arrives at a port of the router's left address go to a host on its right, also what
    comes from there (hairpin)."""
    rule = f"ip daddr {router.address} {protocol} dport {port} dnat to {inside.address}"
    router.run("nft", f"add rule ip nat in {rule}")
    router.run("nft", "add rule ip nat out iifname right oifname right masquerade")


def tunnel(one: Host, other: Host, seen_other: str) -> None:
    """A network of their own through one UDP port, as WireGuard makes it; here it is VXLAN, which
    every kernel has. seen_other: the address of `other` as `one` sees it."""
    for host, far, own in ((one, seen_other, "10.9.0.1"), (other, one.address, "10.9.0.2")):
        ip(
            *("-n", host.name, "link", "add", "wg0", "type", "vxlan", "id", "7", "remote", far),
            *("dstport", "51820", "srcport", "51820", "51821"),
        )
        ip("-n", host.name, "address", "add", f"{own}/24", "dev", "wg0")
        ip("-n", host.name, "link", "set", "wg0", "up")
