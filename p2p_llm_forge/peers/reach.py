"""Whether every rank reaches every other, by small packets and by large ones; if not, why.

Each rank opens a door, a port of its own, and tries the doors of the others: a connection, one byte
there and back, then 64 KiB both ways. A firewall stops the first. A link that carries less than the
interface promises stops the last (an MTU black hole), after which gloo would hang. A router that
translates addresses (NAT) is known by its work: rank 0 sees other addresses than their owners.
"""

from __future__ import annotations

import contextlib
import re
import socket
import socketserver
import threading
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import psutil

from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.peers import addresses
from p2p_llm_forge.peers.findings import Finding, failure
from p2p_llm_forge.peers.routes import addresses_by_interface, route_to

SILENT, STALLED, VANISHING = "silent", "stalled", "large packets vanish"
PIECE_BYTES, PIECES = 16 << 10, 4
ANSWER_S = 10.0  # a busy machine answers late
STALL_S = 5.0  # without one byte: TCP has sent a lost packet five times again
LONGEST_S = addresses.CONNECT_S + ANSWER_S + 3 * STALL_S  # that a try may take, about
TRIED_MTUS = (1280, 576)  # the least that IPv6 and IPv4 ask of every link
BYTE = b"!"
STATES = (*addresses.CLOSED, addresses.OPEN, SILENT, STALLED, VANISHING)
ADDRESS = re.compile(r"[\da-fA-F.:]+(%\w+)?")
INTERFACE = re.compile(r"[\w.:@-]{1,15}")


class Door(socketserver.ThreadingTCPServer):
    """A port at `address` that answers the tries of the others."""

    daemon_threads, block_on_close, request_queue_size = True, False, 128

    def __init__(self, address: str) -> None:
        self.address_family = socket.AF_INET6 if ":" in address else socket.AF_INET
        super().__init__((address, 0), _Answer)

    def handle_error(self, request: Any, client_address: Any) -> None:
        """A connection that ends early is its caller's matter."""


@contextlib.contextmanager
def opened_door(address: str) -> Iterator[int]:
    """A door at an address of this machine, open as long as the block lasts; yields its port."""
    with Door(address) as door:
        thread = threading.Thread(target=door.serve_forever, args=(0.05,), daemon=True, name="door")
        thread.start()
        try:
            yield door.server_address[1]
        finally:
            door.shutdown()


class _Answer(socketserver.BaseRequestHandler):
    def handle(self) -> None:
        stream: socket.socket = self.request
        stream.settimeout(2 * STALL_S)
        for count in (1, *[PIECE_BYTES] * PIECES):
            _receive(stream, count)
            stream.sendall(BYTE)
        for _ in range(PIECES):
            stream.sendall(bytes(PIECE_BYTES))
        _receive(stream, 1)  # whoever closes first would cut off what is on its way


def _receive(stream: socket.socket, count: int) -> None:
    while count:
        received = len(stream.recv(min(count, PIECE_BYTES)))
        if not received:
            raise ConnectionResetError("closed")
        count -= received


def try_door(host: str, port: int) -> tuple[str, int]:
    """What a try of another's door shows: (state, 0), or (VANISHING, the MTU that helps).

    state: those of `addresses`, or SILENT (nobody of ours answers) or STALLED (64 KiB do not come
    through, in small packets neither).
    """
    state = _exchange(host, port, None)
    if state != STALLED:
        return state, 0
    for mtu in TRIED_MTUS:
        if _exchange(host, port, mtu) == addresses.OPEN:
            return VANISHING, mtu
    return STALLED, 0


def try_doors(hellos: list[dict[str, Any]]) -> list[tuple[str, int]]:
    """`try_door` of many at once, each by the address and the port of a `readable` hello."""
    doors = [(str(hello.get("address")), hello["port"]) for hello in hellos]
    with ThreadPoolExecutor(max_workers=32) as threads:
        return list(threads.map(lambda door: try_door(*door), doors))


def _exchange(host: str, port: int, mtu: int | None) -> str:
    """The state after one exchange, in packets of at most `mtu` bytes."""
    try:
        stream = _connect(host, port, mtu)
    except OSError as error:
        return addresses.state_of(error)
    with stream:
        try:
            stream.settimeout(ANSWER_S)
            stream.sendall(BYTE)
            _receive(stream, 1)
        except OSError:
            return SILENT
        try:
            stream.settimeout(STALL_S)
            for _ in range(PIECES):
                stream.sendall(bytes(PIECE_BYTES))
                _receive(stream, 1)
            _receive(stream, PIECES * PIECE_BYTES)
            stream.sendall(BYTE)
        except TimeoutError:
            return STALLED
        except OSError:
            return SILENT
    return addresses.OPEN


def _connect(host: str, port: int, mtu: int | None) -> socket.socket:
    """Raises OSError as connecting does."""
    if mtu is None:
        return socket.create_connection((host, port), timeout=addresses.CONNECT_S)
    family, headers = (socket.AF_INET6, 60) if ":" in host else (socket.AF_INET, 40)
    stream = socket.socket(family, socket.SOCK_STREAM)
    try:
        # The other side learns it too, and then sends no larger packets either.
        stream.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, mtu - headers)
        stream.settimeout(addresses.CONNECT_S)
        stream.connect((host, port))
    except BaseException:
        stream.close()
        raise
    return stream


def facts_of(own_address: str | None, main_address: str) -> dict[str, Any]:
    """What the others need to know of this machine's place in the network."""
    by_interface = addresses_by_interface()
    facts: dict[str, Any] = {"address": own_address, "interface": None, "to_main": None, "main": []}
    facts["addresses"] = [one for found in by_interface.values() for one in found]
    with contextlib.suppress(ForgeError):
        facts["main"] = addresses.resolve(main_address)
        if route := route_to(main_address):
            facts["to_main"] = route.address
    for name, found in by_interface.items():
        if own_address in found:
            facts["interface"] = name
    return facts


def seen_at(port: int) -> list[str]:
    """The addresses from which others are connected to a port of this machine."""
    connections: list[Any]
    try:
        connections = list(psutil.net_connections("tcp"))
    except (psutil.AccessDenied, OSError):  # of all processes: macOS asks for root
        connections = list(psutil.Process().net_connections("tcp"))
    found = [one.raddr.ip for one in connections if one.raddr and one.laddr.port == port]
    return sorted({address.removeprefix("::ffff:") for address in found})


def judge_tries(hellos: list[dict[str, Any]], facts: list[dict[str, Any]]) -> list[Finding]:
    """What is wrong between the ranks, the same on all of them.

    hellos: `readable`, by rank. facts: by rank, its `tries` as {other: (state,
    MTU)}; of rank 0 also what `seen_at` the main port returned.
    """
    found: dict[Any, Finding] = {}
    seen = _addresses(facts[0].get("seen"))
    for rank, fact in enumerate(facts):
        for other, (state, mtu) in _readable_tries(fact.get("tries"), len(hellos)):
            if state == addresses.OPEN:
                continue
            behind = [one for one in (other, rank) if _is_behind_nat(one, hellos, seen)]
            for one in behind:
                found["nat", one] = _nat(one, hellos, seen)
            if not behind and state == VANISHING:
                pair = min(rank, other), max(rank, other)
                found.setdefault(pair, _black_hole(hellos, *pair, mtu))
            elif not behind:
                found[rank, other, state] = _closed(hellos, rank, other, state)
    return list(found.values())


def readable(sent: dict[str, Any]) -> dict[str, Any]:
    """A hello whose facts are what they should be: some become part of a command to copy."""
    port, interface = sent.get("port"), str(sent.get("interface") or "")
    return {
        **sent,
        "address": next(iter(_addresses([sent.get("address")])), None),
        "to_main": next(iter(_addresses([sent.get("to_main")])), None),
        "host": in_one_line(sent.get("host")),
        "port": port if type(port) is int and 0 < port < 1 << 16 else 0,
        "interface": interface if INTERFACE.fullmatch(interface) else "eth0",
        "addresses": _addresses(sent.get("addresses")),
        "main": _addresses(sent.get("main")),
    }


def _addresses(value: Any) -> list[str]:
    texts = [str(one) for one in value] if isinstance(value, list) else []
    return [one for one in texts if ADDRESS.fullmatch(one) and addresses.is_literal(one)]


def _readable_tries(tries: Any, ranks: int) -> list[tuple[int, tuple[str, int]]]:
    """Those of a rank's tries that make sense; a stranger may have written them."""
    return [
        (int(other), (value[0], value[1]))
        for other, value in (tries if isinstance(tries, dict) else {}).items()
        if other in map(str, range(ranks)) and isinstance(value, list) and len(value) == 2
        if value[0] in STATES and value[1] in (0, *TRIED_MTUS)
    ]


def _is_behind_nat(rank: int, hellos: list[dict[str, Any]], seen: list[str]) -> bool:
    if rank == 0:
        own = set(hellos[0]["addresses"])
        return any(hello["main"] and own.isdisjoint(hello["main"]) for hello in hellos if own)
    own_address = hellos[rank]["to_main"]
    return bool(seen and own_address) and own_address not in seen


def _nat(rank: int, hellos: list[dict[str, Any]], seen: list[str]) -> Finding:
    who = f"{_name(rank, hellos)} is behind a router that translates addresses (NAT):"
    address = hellos[rank]["address"]
    if rank == 0:
        found = f"{who} its own address is {address}, and not the main one. The router may forward"
        found = f"{found} the main port, but peers open further ports to each other"
    else:
        known = {one for hello in hellos for one in hello["addresses"]}
        others = ", ".join(one for one in seen if one not in known) or "another"
        found = f"{who} its own address is {address}, and rank 0 sees {others}. Nobody"
        found = f"{found} outside can open a connection to it, and peers open them to each other"
    return failure("nat", found, addresses.NAT_FIX)


def _black_hole(hellos: list[dict[str, Any]], one: int, other: int, mtu: int) -> Finding:
    both = f"{_name(one, hellos)} and {_name(other, hellos)}"
    found = (
        f"between {both} small packets pass and large ones vanish: a link on the way carries less"
        " than their interfaces say (MTU), and the message about it is blocked"
    )
    commands = "; ".join(
        f"on {hellos[rank]['host']}: sudo ip link set dev {hellos[rank]['interface']} mtu {mtu}"
        for rank in (one, other)
    )
    fix = f"{commands}. For WireGuard also write `MTU = {mtu}` below [Interface], which keeps it"
    return failure("mtu", found, fix)


def _closed(hellos: list[dict[str, Any]], rank: int, other: int, state: str) -> Finding:
    source, target = hellos[rank]["address"], hellos[other]["address"]
    found = f"{_name(rank, hellos)} cannot reach {_name(other, hellos)} at {target}: {state}"
    if target is None or addresses.is_loopback(target):
        fix = "unset GLOO_SOCKET_IFNAME there, or set it to the interface of the common network"
        return failure("reach", f"{found}: that address is known on its own machine only", fix)
    if state == SILENT:
        fix = f"give every machine an address of its own: on {target} another program answers, or"
        return failure("reach", found, f"{fix} that rank has ended: see what it printed")
    if state == STALLED:
        found += ": small messages pass, 64 KB do not, in small packets neither"
        fix = "look for what loses packets on the way (Wi-Fi, a cable, a firewall's rule), until"
        ping = f"`ping -c 20 -i 0.2 -W 1 -s 1000 {target}` on the first shows no loss"
        return failure("reach", found, f"{fix} {ping}")
    fix = addresses.opening(f"the machine of rank {other}", None, str(source))
    fix = f"let the peers talk freely: {fix}"
    if state == addresses.NO_ROUTE:
        check = f"check `ip route get {target}` on the first, and that both are on one network"
        fix = f"{check} (GLOO_SOCKET_IFNAME chooses the interface); if that shows a way, {fix}"
    found += "; gloo and NCCL open ports of their own beside the main port"
    return failure("reach", found, fix)


def _name(rank: int, hellos: list[dict[str, Any]]) -> str:
    return f"rank {rank} ({hellos[rank]['host']})"
