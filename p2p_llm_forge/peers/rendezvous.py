"""How the ranks of a launch find each other, before anything is exchanged that matters.

torch's own rendezvous waits for a missing peer and cannot say which; gloo hangs when a firewall
lets the main port through and nothing else. So the ranks first meet in the launch's key-value
store: everyone says that it is here, proves that it knows the secret if there is one, and tries to
reach everyone else. Whatever fails is told by rank, on all of them, within a deadline.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import platform
import socket
import threading
import time
from collections.abc import Iterator, Mapping
from concurrent import futures
from dataclasses import dataclass
from typing import Any

import torch.distributed as dist

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import addresses
from p2p_llm_forge.peers import secret as shared_secret
from p2p_llm_forge.peers.findings import Finding, Refused, failure

SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.05  # between looks at the store
FAREWELL_S = 3.0
LISTED = 8  # ranks or pairs that a message names
VERDICT = "forge/meeting/verdict"


@dataclass(frozen=True)
class Place:
    """One process's place in a meeting."""

    rank: int
    world_size: int
    local_world_size: int
    main_address: str
    main_port: int
    own_address: str | None  # where the others reach it; None: all are on this machine
    patience_s: float
    secret: bytes | None

    def name(self) -> str:
        return f"rank {self.rank}"


def meet(place: Place, environ: Mapping[str, str]) -> dist.Store:
    """Wait for all ranks, check that each may be here and reaches the others; returns the store.

    Raises Refused, on all ranks that came, when a rank is missing, has not the secret, or cannot
    be reached.
    """
    store = open_store(place, environ)
    try:
        with _open_door(place) as port:
            hellos = _say_hello(place, store, port)
            _prove(place, store, hellos)
            _reach(place, store, hellos)
    except Refused as refusal:
        _tell(place, store, refusal)
        raise
    except (dist.DistError, RuntimeError) as error:
        raise Refused(
            failure(
                "meeting",
                f"{place.name()} lost the main process at {place.main_address}:{place.main_port}"
                f" while the peers met ({str(error).splitlines()[0]})",
                "see what rank 0 printed: it ended first",
            )
        ) from error
    return store


def open_store(place: Place, environ: Mapping[str, str]) -> dist.Store:
    """The launch's key-value store, served by rank 0 or by its launcher. Raises Refused."""
    host, port = place.main_address, place.main_port
    timeout = datetime.timedelta(seconds=place.patience_s)
    served_by_launcher = environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    serves = place.rank == 0 and not served_by_launcher
    listener = _listen(host, port) if serves else None
    # Rank 0 is a client of its own store, and comes to it by the main address too.
    patience_s = addresses.CONNECT_S if serves else place.patience_s
    state = addresses.wait_until_open(host, port, patience_s)
    if state != addresses.OPEN:
        raise Refused(_lost_itself(place) if serves else _unreachable_main(place, state))
    options: dict[str, Any] = {"master_listen_fd": listener.detach()} if listener else {}
    opened: futures.Future[dist.Store] = futures.Future()

    def open_it() -> None:
        try:
            where = (host, port, place.world_size, serves, timeout, False)
            opened.set_result(dist.TCPStore(*where, multi_tenant=True, **options))
        except (dist.DistError, RuntimeError) as error:
            opened.set_exception(error)

    # In a thread: where something else listens and says nothing, torch (2.13) waits for ever.
    threading.Thread(target=open_it, daemon=True, name="store").start()
    try:
        return opened.result(place.patience_s)
    except futures.TimeoutError as error:
        told = f"it said nothing for {place.patience_s:.0f} s"
        raise Refused(_no_store(place, told)) from error
    except (dist.DistError, RuntimeError) as error:
        raise Refused(_no_store(place, str(error))) from error


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the main port: on the main address alone where it is this machine's own."""
    # A name may mean another address elsewhere, and a router may forward the port to here.
    named = [host] if addresses.is_literal(host) or host == "localhost" else []
    for address in (*named, "::", "0.0.0.0"):
        is_any, family = address == "::", socket.AF_INET6 if ":" in address else socket.AF_INET
        if is_any and not socket.has_dualstack_ipv6():
            continue
        try:
            return socket.create_server(
                (address, port), family=family, backlog=128, dualstack_ipv6=is_any
            )
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                raise Refused(addresses.judge_own_port(port)) from error
    raise Refused(addresses.judge_own_port(port))


def _lost_itself(place: Place) -> Finding:
    where = f"{place.main_address}:{place.main_port}"
    return failure(
        "meeting",
        f"rank 0 listens at port {place.main_port}, and {where} does not lead to it",
        "write the address of this machine that the others reach (main_process_ip, --master-addr;"
        " `ip -brief address` shows them), or start rank 0 on the machine of that address",
    )


def _no_store(place: Place, told: str) -> Finding:
    first_line = told.splitlines()[0] if told else "no reason given"
    return failure(
        "meeting",
        f"{place.name()}: what answers at {place.main_address}:{place.main_port} is not rank 0 of"
        f" a run ({first_line})",
        "see on that machine which program has the port, and choose one that is free, the same on"
        " all machines (main_process_port, --master-port)",
    )


def _unreachable_main(place: Place, state: str) -> Finding:
    host, port = place.main_address, place.main_port
    told = f"{place.name()} could not meet the {place.world_size} processes at {host}:{port}: "
    if state == addresses.REFUSED:
        return failure(
            "meeting",
            f"{told}the connection was refused for {place.patience_s:.0f} s",
            "start rank 0 on that machine, with the same address and port; if it runs there, its"
            " firewall rejects: " + addresses.opening(port, place.own_address or "127.0.0.1"),
        )
    finding = addresses.judge_reach(state, host, port, place.own_address or "127.0.0.1")
    return failure("meeting", told + finding.found, finding.mend)


def _gather(place: Place, store: dist.Store, subject: str, own: dict[str, Any]) -> list[dict]:
    """What every rank says on a subject, by rank. Raises Refused naming those who are missing."""
    keys = [f"forge/meeting/{subject}/{rank}" for rank in range(place.world_size)]
    store.set(keys[place.rank], json.dumps(own))
    deadline, pause = time.monotonic() + place.patience_s, SHORTEST_PAUSE_S
    for key in keys:
        # Not store.wait(), which prints a warning of its own when its time is over (torch 2.13).
        while not store.check([key]):
            if store.check([VERDICT]):
                raise Refused(*_findings(store.get(VERDICT)))
            if time.monotonic() > deadline:
                missing = [rank for rank, key in enumerate(keys) if not store.check([key])]
                raise Refused(_missing(place, missing))
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE_S)
    return [_dict(store.get(key)) for key in keys]


def _missing(place: Place, ranks: list[int]) -> Finding:
    machines = sorted({rank // place.local_world_size for rank in ranks})
    return failure(
        "meeting",
        f"{_listing([f'rank {rank}' for rank in ranks])} did not come to"
        f" {place.main_address}:{place.main_port} within {place.patience_s:.0f} s;"
        f" {place.world_size - len(ranks)} of {place.world_size} are here",
        f"start machine {_listing([str(machine) for machine in machines])} too, or see what it"
        " printed; --peer-timeout waits longer",
    )


@contextlib.contextmanager
def _open_door(place: Place) -> Iterator[int | None]:
    """A port of this rank's own where the others can try to reach it; None on one machine."""
    if place.own_address is None:
        yield None
        return
    family = socket.AF_INET6 if ":" in place.own_address else socket.AF_INET
    with socket.socket(family) as door:
        door.bind((place.own_address, 0))
        door.listen(max(16, place.world_size))
        yield door.getsockname()[1]


def _say_hello(place: Place, store: dist.Store, port: int | None) -> list[dict]:
    """Everyone's host, nonce, and address and port to try."""
    hello = {
        "host": platform.node(),
        "nonce": shared_secret.new_nonce(),
        "has_secret": place.secret is not None,
        "address": place.own_address,
        "port": port,
    }
    return _gather(place, store, "hello", hello)


def _prove(place: Place, store: dist.Store, hellos: list[dict]) -> None:
    """Prove that this rank knows the secret and check that all others do. Raises Refused."""
    without = [rank for rank, hello in enumerate(hellos) if not hello.get("has_secret")]
    if place.secret is None and len(without) == place.world_size:
        return
    copy = "copy the file of the others there and name it by --cluster-secret-file"
    if without:
        raise Refused(
            failure("secret", f"{_who(without, hellos)} did not bring the cluster's secret", copy)
        )
    assert place.secret is not None
    nonces = [str(hello.get("nonce")) for hello in hellos]
    own = shared_secret.proof(place.secret, place.rank, nonces)
    told = [str(answer.get("proof")) for answer in _gather(place, store, "proof", {"proof": own})]
    strangers = [
        rank
        for rank, answer in enumerate(told)
        if not shared_secret.is_proven(place.secret, rank, nonces, answer)
    ]
    if strangers:
        raise Refused(
            failure(
                "secret",
                f"{_who(strangers, hellos)} could not prove to {place.name()} that it knows the"
                " cluster's secret",
                copy,
            )
        )


def _reach(place: Place, store: dist.Store, hellos: list[dict]) -> None:
    """Try every other rank's door; raises Refused naming the pairs that do not reach each other."""
    if all(not hello.get("address") for hello in hellos):
        return
    others = [rank for rank in range(place.world_size) if rank != place.rank]
    states = addresses.probe_all(
        [(str(hellos[rank].get("address")), int(hellos[rank].get("port") or 0)) for rank in others]
    )
    own = dict(zip(map(str, others), states, strict=True))
    told = _gather(place, store, "reach", own)
    closed = [
        (rank, int(other), state)
        for rank, states_told in enumerate(told)
        for other, state in states_told.items()
        if state != addresses.OPEN
    ]
    if closed:
        raise Refused(*[_closed_way(hellos, *way) for way in closed[:LISTED]])


def _closed_way(hellos: list[dict], rank: int, other: int, state: str) -> Finding:
    source, target = hellos[rank].get("address"), hellos[other].get("address")
    told = f"{_who([rank], hellos)} cannot reach {_who([other], hellos)} at {target}: {state}"
    if target is None or addresses.is_loopback(str(target)):
        return failure(
            "reach",
            f"{told}: that address is known on its own machine only",
            "unset GLOO_SOCKET_IFNAME there, or set it to the interface of the common network",
        )
    mend = {
        addresses.NO_ROUTE: (
            f"check `ip route get {target}` on the first, and that both are on one"
            " network (GLOO_SOCKET_IFNAME chooses the interface)"
        )
    }
    return failure(
        "reach",
        f"{told}; gloo and NCCL open ports of their own beside the main port",
        mend.get(
            state,
            "let the peers talk freely: " + addresses.opening(None, str(source)),
        ),
    )


def _tell(place: Place, store: dist.Store, refusal: Refused) -> None:
    """Let the others know why the meeting failed; rank 0 leaves last, since it serves the store."""
    with contextlib.suppress(dist.DistError, RuntimeError):
        if not store.check([VERDICT]):
            store.set(VERDICT, json.dumps([vars(finding) for finding in refusal.findings]))
        store.set(f"forge/meeting/left/{place.rank}", "")
        deadline = time.monotonic() + FAREWELL_S
        came = [
            f"forge/meeting/left/{rank}"
            for rank in range(place.world_size)
            if store.check([f"forge/meeting/hello/{rank}"])
        ]
        while place.rank == 0 and not store.check(came) and time.monotonic() < deadline:
            time.sleep(0.01)


def _findings(text: bytes) -> list[Finding]:
    """The findings that another rank has told."""
    try:
        return [
            Finding(**{key: str(value) for key, value in told.items()}) for told in json.loads(text)
        ]
    except (ValueError, TypeError, AttributeError, AssertionError) as error:
        raise ForgeError("another rank has ended the meeting: see what it printed") from error


def _dict(text: bytes) -> dict[str, Any]:
    """What a rank has put into the store; anyone who reaches the port can write there."""
    try:
        told = json.loads(text)
    except ValueError:
        return {}
    return told if isinstance(told, dict) else {}


def _who(ranks: list[int], hellos: list[dict]) -> str:
    return _listing([f"rank {rank} ({hellos[rank].get('host')})" for rank in ranks])


def _listing(names: list[str]) -> str:
    shown = names[:LISTED] + ([f"{len(names) - LISTED} more"] if len(names) > LISTED else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
