"""The rendezvous: how the ranks of a launch find each other, before anything else is exchanged.

torch's own rendezvous waits for a missing peer and does not name it; gloo hangs when a firewall
lets the main port through and nothing else. So the ranks first meet in the launch's key-value
store: everyone appears, proves that it knows the secret if there is one, and tries to
reach everyone else. Whatever fails is reported by rank, on all of them, within a deadline.
"""

from __future__ import annotations

import contextlib
import datetime
import errno
import json
import platform
import socket
import time
from collections.abc import Callable, Mapping
from concurrent import futures
from dataclasses import dataclass, field, replace
from typing import Any

import torch.distributed as dist

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.files import parse_json
from p2p_llm_forge.peers import addresses, reach
from p2p_llm_forge.peers.claims import Claim, check_rank
from p2p_llm_forge.peers.findings import (
    failure,
    failures,
    findings_of_peer,
    refusal,
    refuse_failures,
)
from p2p_llm_forge.peers.launch import DEFAULT_PORT, Launch
from p2p_llm_forge.peers.liveness import SHORTEST_TIMEOUT_S, Liveness
from p2p_llm_forge.peers.routes import address_of, are_neighbours
from p2p_llm_forge.peers.secret import Session, new_nonce, read_secret
from p2p_llm_forge.peers.store import Store, StoreLost
from p2p_llm_forge.polling import in_thread, pauses, wait_for

LONGEST_PAUSE_S = 0.05  # between looks at the store
FAREWELL_S = 3.0
LOOK_THERE = "see whether that machine runs and what it printed, then start all again"
LISTED = 8  # ranks or pairs that a message names
RENDEZVOUS_TIMEOUTS = 3  # of --peer-timeout, where nothing else is asked for
# Of an elastic launch: who came is known, and one who is lost is noticed by the launchers. Only the
# imports are waited for, which take minutes on a busy machine with a slow disk.
ELASTIC_RENDEZVOUS_S = 300.0
MISSING = '"missing"'  # a verdict of which every rank sees for itself whom it means


@dataclass(frozen=True, kw_only=True)
class Endpoint:
    """One process at the rendezvous."""

    rank: int
    world_size: int
    local_world_size: int
    main_address: str
    main_port: int
    serves_store: bool
    own_address: str | None  # where the others reach it; None: all are on this machine
    timeout_s: float  # until all have come
    peer_timeout_s: float = 10.0  # until one that came and shows no sign of life is given up
    secret: bytes | None
    nonce: str = field(default_factory=new_nonce)  # of this rendezvous alone

    @property
    def main(self) -> str:
        return f"{self.main_address}:{self.main_port}"


def choose_endpoint(
    config: TrainConfig, launch: Launch, interface: Mapping[str, str]
) -> Endpoint | None:
    """Where this process takes part; None for a process alone.

    interface: as `choose_interface` returns it. Raises ForgeError for addresses that cannot bring
    machines together, and for public ones.
    """
    if launch.world_size == 1:
        return None
    check_rank(launch.rank, launch.world_size)
    host, own = launch.master_addr or "127.0.0.1", None
    if launch.machines > 1:
        name = interface.get("GLOO_SOCKET_IFNAME") or launch.gloo_interface
        own = address_of(name.split(",")[0]) if name else None
        listening = [*addresses.resolve(host), *([own] if own else [])]
        if launch.by_torchrun and not config.allow_unauthenticated:
            _refuse_open_launcher(listening)
        found = addresses.judge_name(host, launch.machines)
        refuse_failures(found + addresses.judge_public(listening, config.allow_public_address))
    usual_s = RENDEZVOUS_TIMEOUTS * config.peer_timeout
    if launch.is_elastic:
        usual_s = max(usual_s, ELASTIC_RENDEZVOUS_S)
    return Endpoint(
        rank=launch.rank,
        world_size=launch.world_size,
        local_world_size=launch.local_world_size,
        main_address=host,
        main_port=launch.master_port or DEFAULT_PORT,
        serves_store=launch.rank == 0 and not launch.serves_store,
        own_address=own,
        timeout_s=config.rendezvous_timeout or usual_s,
        peer_timeout_s=config.peer_timeout,
        secret=read_secret(config.cluster_secret_file),
    )


def _refuse_open_launcher(listening: list[str]) -> None:
    """Refuse torchrun's elastic rendezvous where others could reach it.

    Its agents unpickle, each second, what anyone may write into their open store (torch 2.13): no
    secret of ours can keep a stranger from running code on all machines.
    """
    outward = [address for address in listening if not addresses.is_loopback(address)]
    if outward:
        raise ForgeError(
            f"torchrun's elastic launch on {outward[0]}: whoever reaches its port can run programs"
            " as you on all machines",
            "start it by `python launch/elastic.py --main ADDRESS --secret-file cluster.secret"
            " train.py ...`, the same line on every machine; or add --allow-unauthenticated where"
            " only you reach the network",
        )


def rendezvous(endpoint: Endpoint) -> Store:
    """Wait for all ranks, check that each may be here and reaches the others; returns the store.

    Raises ForgeError, on all that came, when a rank is missing, without the secret or unreachable.
    """
    store = open_store(endpoint)
    try:
        claim = Claim(store, endpoint.rank, endpoint.world_size, endpoint.main)
        claim.take()  # whoever is refused here leaves the others alone
        size, timeout_s = endpoint.world_size, endpoint.peer_timeout_s
        peers = Liveness(store, endpoint.rank, size, timeout_s, phase="rendezvous").start()
        try:
            session = _meet(endpoint, peers, claim)
        except ForgeError as error:
            _publish(endpoint, peers, error)
            raise
        finally:
            peers.stop()  # before values are signed: no rank takes another's for a stranger's
    except StoreLost as error:
        found = f"rank {endpoint.rank} lost rank 0, the main process at {endpoint.main}, during the"
        found = f"{found} rendezvous ({error})"
        fix = "see what rank 0 printed: it ended first, or its machine is gone"
        raise refusal("rendezvous", found, fix) from error
    store.session = session
    return store


def _meet(endpoint: Endpoint, peers: Liveness, claim: Claim) -> Session | None:
    """The session of those who know the secret; None where no rank has one."""
    own = endpoint.own_address
    with reach.opened_door(own) if own else contextlib.nullcontext() as port:
        hello = {
            "host": platform.node(),
            "nonce": endpoint.nonce,
            "has_secret": endpoint.secret is not None,
            "port": port,  # where the others may try
            **reach.facts_of(own, endpoint.main_address),
        }
        try:
            said = _gather(endpoint, peers, "hello", json.dumps(hello), claim.beat)
        except ForgeError as error:
            raise type(error).of([*failures("rendezvous", error), *claim.refused()]) from error
        claim.all_came()
        # This rank's own as it was said, whatever the store holds by now.
        said[endpoint.rank] = json.dumps(hello)
        hellos = [reach.readable(_dict(text)) for text in said]
        session = _prove(endpoint, peers, hellos)
        _reach(endpoint, peers, hellos, session)
    return session


def open_store(endpoint: Endpoint) -> Store:
    """The launch's key-value store, served by rank 0 or by its launcher. Raises ForgeError."""
    host, port = endpoint.main_address, endpoint.main_port
    listener = _listen(host, port) if endpoint.serves_store else None
    # Rank 0 is a client of its own store, and comes to it by the main address too.
    timeout_s = addresses.CONNECT_S if listener else endpoint.timeout_s
    state = addresses.wait_until_open(host, port, timeout_s)
    if state != addresses.OPEN:
        raise _no_way_to_main(endpoint, state)
    options: dict[str, Any] = {"master_listen_fd": listener.detach()} if listener else {}
    options |= {"world_size": endpoint.world_size, "is_master": listener is not None}
    options |= {"timeout": datetime.timedelta(seconds=endpoint.timeout_s)}
    options |= {"wait_for_workers": False, "multi_tenant": True}
    # In a thread: where something else listens and never answers, torch (2.13) waits for ever.
    opened = in_thread(lambda: dist.TCPStore(host, port, **options))
    try:
        client = opened.result(endpoint.timeout_s)
        return Store(client, endpoint.rank, max(endpoint.peer_timeout_s, SHORTEST_TIMEOUT_S))
    except (futures.TimeoutError, dist.DistError, RuntimeError) as error:
        reason = str(error) or f"no answer for {endpoint.timeout_s:.0f} s"
        found = f"rank {endpoint.rank}: what answers at {endpoint.main} is not rank 0 of a run"
        raise refusal(
            "rendezvous",
            f"{found} ({reason.splitlines()[0]})",
            "see on that machine which program has the port, and choose one that is free, the same"
            " on all machines (main_process_port, --master-port)",
        ) from error


def _server(address: str, port: int, is_dual: bool = False) -> socket.socket:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    return socket.create_server((address, port), family=family, backlog=128, dualstack_ipv6=is_dual)


def _listen(host: str, port: int) -> socket.socket:
    """A socket at the main port: on the main address alone where it is this machine's own."""
    # A name may mean another address elsewhere, and a router may forward the port to here.
    named = [host] if addresses.is_literal(host) or host == "localhost" else []
    for address in (*named, *(["::"] if socket.has_dualstack_ipv6() else []), "0.0.0.0"):
        try:
            return _server(address, port, is_dual=address == "::")
        except OSError as error:
            if error.errno not in (errno.EADDRNOTAVAIL, errno.EAFNOSUPPORT):
                break
    raise ForgeError.of([addresses.judge_own_port(port)])


def _no_way_to_main(endpoint: Endpoint, state: str) -> ForgeError:
    port, own = endpoint.main_port, endpoint.own_address or "127.0.0.1"
    if endpoint.serves_store:
        return refusal(
            "rendezvous",
            f"rank 0 listens at port {port}, and {endpoint.main} does not lead to it",
            "write the address of this machine that the others reach (main_process_ip,"
            " --master-addr; `ip -brief address` shows them), or start rank 0 on the machine of"
            " that address (machine_rank, --rank). If it is the address of this machine's router"
            f" (NAT), forwarding the port is not enough: {addresses.NAT_FIX}",
        )
    near = are_neighbours(endpoint.main_address)
    reached = addresses.judge_reach(state, endpoint.main_address, port, own, near)
    found, fix = reached.found, reached.fix
    if state == addresses.REFUSED:
        found = f"the connection was refused for {endpoint.timeout_s:.0f} s"
        fix = "start rank 0 on that machine, with the same address and port; if it runs there, its"
        fix = f"{fix} firewall rejects: {addresses.letting_in(port, own, near)}"
    failed = f"rank {endpoint.rank} could not meet the {endpoint.world_size} processes at"
    return refusal("rendezvous", f"{failed} {endpoint.main}: {found}", fix)


def _gather(
    endpoint: Endpoint,
    peers: Liveness,
    subject: str,
    own: str,
    meanwhile: Callable[[], None] | None = None,
) -> list[str]:
    """Every rank's text on a subject, by rank. Raises ForgeError naming those who are missing."""
    store, ranks = peers.store, range(endpoint.world_size)
    keys = [_key(subject, rank) for rank in ranks]
    store.set(keys[endpoint.rank], own)
    deadline = time.monotonic() + endpoint.timeout_s
    # Not store.wait(), which prints a warning of its own when its time is over (torch 2.13).
    for _ in pauses(longest_s=LONGEST_PAUSE_S):
        if store.check(*keys):
            break
        if meanwhile:
            meanwhile()
        verdict = _published(endpoint, store)
        if verdict is not None and verdict != MISSING:
            raise _verdict(verdict)
        if peers.loss is not None:
            raise refusal("rendezvous", peers.loss.problems[0].found, LOOK_THERE)
        absent = [rank for rank in ranks if not store.check(keys[rank])]
        if absent and (verdict or time.monotonic() > deadline):
            raise _missing(endpoint, absent)
    return [store.get(key, rank) for rank, key in enumerate(keys)]


def _key(subject: str, rank: int) -> str:
    return f"forge/rendezvous/{subject}/{rank}"


class Missing(ForgeError):
    """Ranks did not come."""


def _missing(endpoint: Endpoint, ranks: list[int]) -> ForgeError:
    world_size, machines = endpoint.world_size, {r // endpoint.local_world_size for r in ranks}
    found = f"{_listing([f'rank {rank}' for rank in ranks])} did not come to {endpoint.main} within"
    found += f" {endpoint.timeout_s:.0f} s; {world_size - len(ranks)} of {world_size} are here"
    fix = f"start machine {_listing([str(machine) for machine in sorted(machines)])} too, or see"
    fix += " what it printed; --rendezvous-timeout waits longer"
    return Missing.of([failure("rendezvous", found, fix)])


def _prove(endpoint: Endpoint, peers: Liveness, hellos: list[dict]) -> Session | None:
    """Prove that this rank knows the secret and check that all others do. Raises ForgeError."""
    without = [rank for rank, hello in enumerate(hellos) if not hello.get("has_secret")]
    if endpoint.secret is None and len(without) == endpoint.world_size:
        return None
    copy = "copy the file of the others there and name it by --cluster-secret-file"
    if without:
        raise refusal("secret", f"{_who(without, hellos)} did not bring the cluster's secret", copy)
    assert endpoint.secret is not None
    session = Session(endpoint.secret, hellos)
    proofs = _gather(endpoint, peers, "proof", session.proof(endpoint.rank))
    strangers = [
        rank
        for rank, proof in enumerate(proofs)
        if rank != endpoint.rank and not session.is_proven(rank, proof)
    ]
    if strangers:
        found = f"{_who(strangers, hellos)} could not prove to rank {endpoint.rank} that it knows"
        fix = f"{copy}; where all have the same file, somebody changes what the peers send:"
        fix = f"{fix} docs/security.md"
        raise refusal("secret", f"{found} the cluster's secret", fix)
    return session


def _reach(
    endpoint: Endpoint, peers: Liveness, hellos: list[dict], session: Session | None
) -> None:
    """Try every other rank's door; raises ForgeError naming the pairs that fail."""
    if all(not hello.get("address") for hello in hellos):
        return
    others = [rank for rank in range(endpoint.world_size) if rank != endpoint.rank]
    tries = reach.try_doors([hellos[rank] for rank in others])
    facts: dict[str, Any] = {"tries": dict(zip(map(str, others), tries, strict=True))}
    if endpoint.rank == 0:
        facts["seen"] = reach.seen_at(endpoint.main_port)
    own = json.dumps(facts)
    if session:
        own = session.sign(_key("reach", endpoint.rank), endpoint.rank, own)
    patient = replace(endpoint, timeout_s=endpoint.timeout_s + reach.LONGEST_S)
    found = _gather(patient, peers, "reach", own)
    if session:
        found = [
            session.verified(_key("reach", rank), rank, text.encode())
            for rank, text in enumerate(found)
        ]
    refuse_failures(reach.judge_tries(hellos, [_dict(text) for text in found])[:LISTED])


def _publish(endpoint: Endpoint, peers: Liveness, error: ForgeError) -> None:
    """Let the others know why it has failed; rank 0, which may serve the store, leaves last."""
    store, lost = peers.store, peers.silent()
    with contextlib.suppress(StoreLost):
        text = json.dumps([vars(found) for found in failures("peers", error)])
        text = MISSING if isinstance(error, Missing) else text
        came = _tell(endpoint, store, text)
        store.set(_key("left", endpoint.rank), "")

        def have_left() -> bool:
            here = came | _tell(endpoint, store, text)  # those too who come meanwhile
            return store.check(*[_key("left", rank) for rank in here if rank not in lost])

        if endpoint.rank == 0:
            wait_for(have_left, FAREWELL_S)


def _tell(endpoint: Endpoint, store: Store, verdict: str) -> set[int]:
    """Give every other rank that came a verdict unless it has one; returns who came.

    With a secret each gets it signed over the nonce of its own hello, so that a verdict of another
    rendezvous, which anyone may write there again, ends nothing here.
    """
    others = [rank for rank in range(endpoint.world_size) if rank != endpoint.rank]
    came = {rank for rank in others if store.check(_key("hello", rank))}
    for rank in came:
        nonce = _dict(store.get(_key("hello", rank), rank)).get("nonce")
        if _verdict_for(endpoint, store, rank, nonce) is None:
            key, signing = _key("verdict", rank), _signing(endpoint, nonce)
            store.set(key, signing.sign(key, endpoint.rank, verdict) if signing else verdict)
    return came


def _published(endpoint: Endpoint, store: Store) -> str | None:
    """Another rank's verdict that has ended this rendezvous; None before, and if it is unsigned."""
    return _verdict_for(endpoint, store, endpoint.rank, endpoint.nonce)


def _verdict_for(endpoint: Endpoint, store: Store, reader: int, nonce: Any) -> str | None:
    key = _key("verdict", reader)
    if not store.check(key):
        return None
    text, signing = store.get(key, reader), _signing(endpoint, nonce)
    if signing is None:
        return text
    ranks = range(endpoint.world_size)
    opened = (signing.opened(key, rank, text.encode()) for rank in ranks)
    return next((one for one in opened if one is not None), None)


def _signing(endpoint: Endpoint, nonce: Any) -> Session | None:
    """What signs a verdict for the rank with this nonce: for it there may be no session yet."""
    return Session(endpoint.secret, [{"verdict for": nonce}]) if endpoint.secret else None


def _verdict(text: str) -> ForgeError:
    """What another rank has published; anyone who reaches the port can write there."""
    try:
        return ForgeError.of(findings_of_peer("another rank", parse_json(text)))
    except ValueError:
        return ForgeError("another rank has ended the rendezvous", "see what it printed")


def _dict(text: str) -> dict[str, Any]:
    """What a rank has put into the store; anyone who reaches the port can write there.

    Each text is on one line; lists and tables are for `reach` to judge, and nothing else is kept.
    """
    try:
        value = parse_json(text)
    except ValueError:
        return {}
    fields = value.items() if isinstance(value, dict) else ()
    texts = {key: in_one_line(one, 200) for key, one in fields if isinstance(one, str)}
    return texts | {key: one for key, one in fields if isinstance(one, int | list | dict)}


def _who(ranks: list[int], hellos: list[dict]) -> str:
    return _listing([f"rank {rank} ({hellos[rank].get('host')})" for rank in ranks])


def _listing(names: list[str]) -> str:
    shown = names[:LISTED] + ([f"{len(names) - LISTED} more"] if len(names) > LISTED else [])
    return shown[0] if len(shown) == 1 else f"{', '.join(shown[:-1])} and {shown[-1]}"
