"""Addresses and ports: what a name means, who may reach it, and whether anybody answers there."""

from __future__ import annotations

import contextlib
import errno
import ipaddress
import os
import socket
import time
from collections.abc import Iterator

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.findings import Finding, failure, fine, warning
from p2p_llm_forge.polling import wait_for

# What a connection attempt shows.
OPEN, REFUSED, FILTERED, NO_ROUTE = "open", "refused", "filtered", "no route"
CLOSED = (REFUSED, FILTERED, NO_ROUTE)
CONNECT_S = 3.0  # a packet that is lost is sent again after 1 s and 3 s: one loss is forgiven
NAT_FIX = (
    "put all machines on a network of their own. Simplest is Tailscale: `sudo tailscale up` on"
    " each, and the main address is what `tailscale ip -4` prints on machine 0. Or WireGuard, for"
    " which the router of one machine forwards one UDP port, 51820, to it (docs/security.md)"
)
NO_ROUTE_ERRORS = (errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EACCES, errno.EPERM, errno.EINVAL)


@contextlib.contextmanager
def brief_lookups() -> Iterator[None]:
    """Let a name server out of reach cost 2 s and not 10, unless RES_OPTIONS says otherwise.

    torch (2.13) looks up the name of each address that it connects to, for its log, until a lookup
    fails. glibc reads the variable once in a process, before its first lookup: resolv.conf(5).
    """
    is_ours = "RES_OPTIONS" not in os.environ
    if is_ours:
        os.environ["RES_OPTIONS"] = "timeout:1 attempts:2"
    try:
        yield
    finally:
        if is_ours:
            os.environ.pop("RES_OPTIONS", None)


def resolve(host: str) -> list[str]:
    """The IP addresses that a name means on this machine. Raises ForgeError if it means none."""
    try:
        found = socket.getaddrinfo(host, None, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        meaning = f"the main address {host} means nothing on this machine ({error})"
        fix = "write its IP address, or add the name to /etc/hosts"
        raise ForgeError(meaning, fix) from error
    return list(dict.fromkeys(str(entry[4][0]).split("%")[0] for entry in found))


def is_literal(host: str) -> bool:
    """Whether a host is given by its IP address and not by a name."""
    try:
        ipaddress.ip_address(host)
    except ValueError:
        return False
    return True


def is_loopback(address: str) -> bool:
    """Whether an address never leaves the machine."""
    return ipaddress.ip_address(address).is_loopback


def is_public(address: str) -> bool:
    """Whether the internet could reach an address. Tailscale's 100.64.0.0/10 is private too."""
    return ipaddress.ip_address(address).is_global


def judge_name(host: str, machines: int) -> list[Finding]:
    """Whether the main address, as this machine understands it, can bring machines together."""
    found = resolve(host)
    loopback = [address for address in found if is_loopback(address)]
    if machines == 1 or not loopback:
        return [fine("address", host if found == [host] else f"{host} is {found[0]}")]
    if is_literal(host) or host == "localhost":
        own = f"{host} is each machine's own: {machines} machines will not meet there"
        fix = "write the address of machine 0 as the others reach it (`ip -brief address` there);"
        return [warning("address", own, f"{fix} this is right only if all run on this machine")]
    own = f"the name {host} means {loopback[0]} on this machine, where no other can reach it"
    fix = "write the machine's IP address instead of its name, or in /etc/hosts in place of"
    return [failure("address", own, f"{fix} {loopback[0]} before {host}")]


def judge_public(addresses: list[str], is_allowed: bool) -> list[Finding]:
    """Whether the peers would listen where strangers can reach them."""
    public = [address for address in dict.fromkeys(addresses) if is_public(address)]
    if not public:
        return []
    found = (
        f"{', '.join(public)} is a public address, and whoever reaches the ports of a run can read"
        " and change it: nothing there is encrypted"
    )
    fix = "use the address of a private network or a VPN (docs/security.md)"
    if is_allowed:
        return [warning("public", found, f"{fix}, or keep a firewall before it")]
    return [failure("public", found, f"{fix}; --allow-public-address if a firewall guards it")]


def probe(host: str, port: int, timeout_s: float = CONNECT_S) -> str:
    """What a connection to the port shows: OPEN, REFUSED, FILTERED or NO_ROUTE."""
    try:
        with socket.create_connection((host, port), timeout=timeout_s):
            return OPEN
    except OSError as error:
        return state_of(error)


def state_of(error: OSError) -> str:
    """What an attempt to connect that ended with the error shows."""
    if isinstance(error, TimeoutError):
        return FILTERED
    if isinstance(error, ConnectionRefusedError):
        return REFUSED
    return NO_ROUTE if error.errno in NO_ROUTE_ERRORS else FILTERED


def opening(machine: str, port: int | None, source: str) -> str:
    """The commands on a machine that let `source` through to a port, or to all of them."""
    ufw = f" to any port {port} proto tcp" if port else ""
    nft = f"{'ip6' if ':' in source else 'ip'} saddr {source}" + (f" tcp dport {port}" * bool(port))
    firewalld = f"--add-port={port}/tcp" if port else f"--zone=trusted --add-source={source}"
    return (
        f"on {machine}: sudo ufw allow from {source}{ufw}  (or, into the chain that holds your own"
        f" rules: sudo nft insert rule inet filter input {nft} accept; firewalld: sudo firewall-cmd"
        f" {firewalld})"
    )


def letting_in(port: int, source: str, are_neighbours: bool) -> str:
    """`opening` of the main machine, and what to do where a router makes that vain."""
    nat = f". If a router between them translates addresses (NAT), that is not enough: {NAT_FIX}"
    return opening("machine 0", port, source) + ("" if are_neighbours else nat)


def judge_reach(
    state: str, host: str, port: int, own_address: str, are_neighbours: bool = True
) -> Finding:
    """What a try to reach the main port means. The port may not be served yet.

    are_neighbours: the address is one of a network of this machine, with no router between.
    """
    where, fix = f"{host}:{port}", letting_in(port, own_address, are_neighbours)
    if state == OPEN:
        return fine("port", f"{where} answers")
    if state == REFUSED:
        found = f"{where} refused the connection: nobody listens there yet, or a firewall rejects"
        fix = f"start machine 0 first; if it runs already, let the port through: {fix}"
        return warning("port", found, fix)
    if state == FILTERED:
        found = f"{where} does not answer within {CONNECT_S:.0f} s: a firewall drops the packets,"
        return failure("port", f"{found} or the address is nobody's", fix)
    # firewalld answers what it forbids by ICMP "prohibited", which Linux reports as no route.
    found = f"there is no route to {where}, or its firewall says that it is prohibited"
    check = f"check the address, the cable or VPN, and `ip route get {host}`"
    fix = f"{check}; if that shows a way, open the firewall: {fix}"
    return failure("port", found, fix)


def judge_own_port(port: int) -> Finding:
    """Whether the main port can be served on this machine, which is the main one."""
    with socket.socket() as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(("", port))
            listener.listen(1)
        except OSError as error:
            found = f"port {port} is not to be had ({error.strerror})"
            fix = "choose another port, the same on all machines (main_process_port, --master-port)"
            if error.errno == errno.EADDRINUSE:
                found = f"port {port} is taken"
                fix = f"see who has it: ss -ltnp 'sport = :{port}'; end that program, or {fix}"
            return failure("port", found, fix)
    return fine("port", f"{port} is free")


def wait_until_open(host: str, port: int, timeout_s: float) -> str:
    """Try a port until it is open; returns the last state.

    A refusal means that the machine is there and not ready yet: that is waited for. Silence or a
    missing route will hardly pass, so they are tried a second time only.
    """
    deadline, tries = time.monotonic() + timeout_s, 0

    def look() -> str | None:
        nonlocal tries
        left_s = deadline - time.monotonic()
        state = probe(host, port, max(0.1, min(CONNECT_S, left_s)))
        tries += state != REFUSED
        return state if state == OPEN or left_s <= 0 or tries == 2 else None

    return wait_for(look) or REFUSED
