"""Which route leads from this machine to the others, and whether it can bring them together."""

from __future__ import annotations

import contextlib
import ipaddress
import os
import platform
import socket
from dataclasses import dataclass

import psutil

from p2p_llm_forge.errors import ForgeError, nearest
from p2p_llm_forge.peers import addresses
from p2p_llm_forge.peers.findings import Finding, failures, fine, warning
from p2p_llm_forge.peers.launch import Launch


@dataclass(frozen=True)
class Route:
    """From this machine to the main process: own address and network interface."""

    address: str
    interface: str


def route_to(host: str) -> Route | None:
    """The route to `host`; None for this machine's loopback. Raises ForgeError if there is none."""
    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # UDP: chooses the route, sends nothing
            own = probe.getsockname()[0]
    except (OSError, UnicodeError) as error:  # no route, no such name, no name at all
        found = f"no route to the main process at {host} ({error})"
        fix = "check the address (main_process_ip, --master-addr) and this machine's network"
        raise ForgeError(found, fix) from error
    for interface, its_own in addresses_by_interface().items():
        if own in its_own and not addresses.is_loopback(own):
            return Route(own, interface)
    return None


def address_of(interface: str) -> str:
    """The address that peers reach this machine by, on an interface. Raises ForgeError if none."""
    found = addresses_by_interface()
    if found.get(interface):
        return found[interface][0]
    alike = nearest(interface, [name for name, own in found.items() if own])
    missing = f"GLOO_SOCKET_IFNAME is {interface}: no such interface with an address here ({alike})"
    fix = "unset GLOO_SOCKET_IFNAME: the interface that leads to the main machine is then taken"
    raise ForgeError(missing, fix)


def own_address() -> str:
    """The address by which gloo, and so every peer, reaches this process. Raises ForgeError."""
    name = os.environ.get("GLOO_SOCKET_IFNAME", "").split(",")[0]
    return address_of(name) if name else "127.0.0.1"


def are_neighbours(host: str) -> bool:
    """Whether the host is in a network of this machine, so that no router stands between."""
    with contextlib.suppress(ForgeError, ValueError):
        found = [ipaddress.ip_address(address) for address in addresses.resolve(host)]
        return any(one in network for one in found for network in _networks())
    return False


def _networks() -> list[ipaddress.IPv4Network | ipaddress.IPv6Network]:
    """Those that this machine's interfaces are in."""
    networks = []
    for entries in psutil.net_if_addrs().values():
        for entry in entries:
            if entry.family in (socket.AF_INET, socket.AF_INET6) and entry.netmask:
                bits = bin(int(ipaddress.ip_address(entry.netmask))).count("1")
                own = f"{entry.address.split('%')[0]}/{bits}"
                networks.append(ipaddress.ip_network(own, strict=False))
    return networks


def choose_interface(launch: Launch) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for the route to the main process.

    Gloo (torch 2.13) otherwise binds the address that the hostname resolves to, which on many
    machines is 127.0.0.1, where no peer can reach it. What the user has set is kept.
    """
    route = route_to(launch.master_addr or "127.0.0.1") if launch.machines > 1 else None
    if route is None:
        return {}
    return {
        "GLOO_SOCKET_IFNAME": launch.gloo_interface or route.interface,
        "NCCL_SOCKET_IFNAME": launch.nccl_interface or route.interface,
    }


@dataclass(frozen=True)
class Main:
    """The main process as this machine, one of several, is to reach it."""

    host: str
    port: int
    machines: int  # that are to come there
    is_here: bool  # it is this machine
    will_be_waited_for: bool  # by a rendezvous right after this, longer than a single try waits


def judge_route(main: Main, launch: Launch, allow_public_address: bool) -> list[Finding]:
    """Whether the route from this machine to the main address can bring peers together."""
    try:
        found = addresses.judge_name(main.host, main.machines)
        route = route_to(main.host)
    except ForgeError as error:
        return failures("address", error)
    own = route.address if route else "127.0.0.1"
    found += addresses.judge_public([*addresses.resolve(main.host), own], allow_public_address)
    if route:
        found.append(fine("route", f"{route.address} by {route.interface}"))
        found += _judge_interface(route.interface, launch.gloo_interface)
    found += _judge_ownership(main)
    if main.is_here and not launch.serves_store:
        found.append(addresses.judge_own_port(main.port))
    elif not main.is_here and not main.will_be_waited_for:
        state = addresses.probe(main.host, main.port)
        near = are_neighbours(main.host)
        found.append(addresses.judge_reach(state, main.host, main.port, own, near))
    return found + _judge_hostname()


def _judge_interface(leads_there: str, chosen: str | None) -> list[Finding]:
    """Whether what the user has chosen is the interface of the route."""
    if chosen in (None, leads_there):
        return []
    try:
        address = address_of(str(chosen).split(",")[0])
    except ForgeError as error:
        return failures("interface", error)
    found = f"GLOO_SOCKET_IFNAME is {chosen} ({address}), the main machine is reached by"
    fix = "unset it, unless the peers reach each other there too"
    return [warning("interface", f"{found} {leads_there}", fix)]


def _judge_ownership(main: Main) -> list[Finding]:
    """Whether the main address is that of machine 0 and of no other."""
    own = own_addresses()
    if own.isdisjoint(addresses.resolve(main.host)) != main.is_here:
        return []
    if not main.is_here:
        found = f"{main.host} is this machine's own address, and this is not machine 0"
        fix = "write the address of machine 0, or correct machine_rank; this is right only if all"
        return [warning("address", found, f"{fix} run on one machine")]
    outward = sorted(address for address in own if not addresses.is_loopback(address))
    found = f"this is machine 0, and {main.host} is not one of its addresses"
    found = f"{found} ({', '.join(outward) or 'it has none'})"
    fix = "write the one that the others reach (main_process_ip, --master-addr). If it is that of"
    fix = f"{fix} this machine's router (NAT), forwarding the port is not enough:"
    return [warning("address", found, f"{fix} {addresses.NAT_FIX}")]


def _judge_hostname() -> list[Finding]:
    """Where gloo would listen if nobody chose the interface for it."""
    name = platform.node()
    try:
        address = addresses.resolve(name)[0]
    except ForgeError:
        return []
    found = f"{name} means {address} here; the interface of the route is used instead"
    return [fine("hostname", found)] if addresses.is_loopback(address) else []


def own_addresses() -> set[str]:
    """All IP addresses of this machine."""
    return {address for found in addresses_by_interface().values() for address in found}


def addresses_by_interface() -> dict[str, list[str]]:
    """This machine's IP addresses, on each interface those of IPv4 first."""
    return {
        name: [
            entry.address.split("%")[0]
            for family in (socket.AF_INET, socket.AF_INET6)
            for entry in entries
            if entry.family == family
        ]
        for name, entries in psutil.net_if_addrs().items()
    }
