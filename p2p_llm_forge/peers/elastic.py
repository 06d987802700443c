"""The elastic launch: machines come and go, and the workers are started again with who is there.

Each machine runs one launcher, `launch/elastic.py`. That of the main machine also decides the
rounds (elastic_rounds.py); each launcher keeps one signed connection to it, and starts and ends the
workers of its own machine. torch's own elastic agent is not used: it unpickles what anyone may
write into an open store, compares the clocks of different machines, and waits 60 s for the answers
of agents that have gone (torch 2.13).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import secrets
import signal
import socket
import time
from dataclasses import dataclass
from typing import Any

from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.peers import addresses
from p2p_llm_forge.peers.elastic_main import BEAT_S, GREETING_S, MainMachine
from p2p_llm_forge.peers.elastic_rounds import TO_END_S, TO_EXPLAIN_S, Rounds
from p2p_llm_forge.peers.elastic_workers import Workers
from p2p_llm_forge.peers.findings import refuse_failures
from p2p_llm_forge.peers.routes import own_addresses, route_to
from p2p_llm_forge.peers.secret import read_secret
from p2p_llm_forge.peers.signed_stream import Gone, Message, SignedStream, Stranger

DEFAULT_PORT = 29600
RETRY_S = 0.5
LONGEST_LINE = 2000  # characters of what is said about the launch
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
AFTER_MAIN = (
    "start the same line again, on the main machine first; if that is gone for good, with --main of"
    " another machine, on that one first: it resumes if the script's line has --resume auto"
)


@dataclass(frozen=True, kw_only=True)
class ElasticLaunch:
    """What a launcher was asked for; the same on all machines. Times are seconds."""

    script: list[str]  # and its arguments
    main: str  # address of the main machine
    port: int = DEFAULT_PORT
    secret_file: str | None = None
    allow_unauthenticated: bool = False
    allow_public_address: bool = False
    processes: int = 1  # on this machine
    min_peers: int = 1
    max_peers: int | None = None
    last_call: float = 5.0
    join_timeout: float = 600.0
    lost_after: float = 8.0
    max_restarts: int = 10

    @property
    def where(self) -> str:
        """The main machine's address and port."""
        main = f"[{self.main}]" if ":" in self.main else self.main
        return f"{main}:{self.port}"


@dataclass(frozen=True)
class Place:
    """Where this machine stands. own: its address as the others reach it."""

    own: str
    is_main: bool
    secret: bytes | None


def find_place(launch: ElasticLaunch) -> Place:
    """This machine's place in the launch.

    Raises ForgeError where the main address leads nowhere, is public, or open to strangers.
    """
    secret = read_secret(launch.secret_file)
    found = addresses.judge_name(launch.main, machines=2)
    meaning, here = addresses.resolve(launch.main), own_addresses()
    mine = next((address for address in meaning if address in here), None)
    route = route_to(launch.main)
    own = mine or (route.address if route else meaning[0])
    found += addresses.judge_public([*meaning, own], launch.allow_public_address)
    refuse_failures(found)
    if secret is None and not (addresses.is_loopback(own) or launch.allow_unauthenticated):
        raise ForgeError(
            f"the launch at {launch.main} has no secret: whoever reaches port {launch.port} could"
            " join the run, change it or end it",
            "make a secret with `(umask 077; openssl rand -hex 32 > cluster.secret)`, copy it to"
            " all machines, and add --secret-file cluster.secret; or add --allow-unauthenticated"
            " where only you reach the network",
        )
    return Place(own, mine is not None or addresses.is_loopback(own), secret)


def run_elastic(launch: ElasticLaunch) -> int:
    """Take part in an elastic launch until it ends. Returns the exit status."""
    return asyncio.run(_run(launch, find_place(launch)))


async def _run(launch: ElasticLaunch, place: Place) -> int:
    listener = _listen(place.own, launch.port) if place.is_main else None
    main, serving = None, None
    if listener:
        rounds = Rounds(
            token=secrets.token_hex(16),
            min_peers=launch.min_peers,
            max_peers=launch.max_peers,
            last_call_s=launch.last_call,
            join_timeout_s=launch.join_timeout,
            max_restarts=launch.max_restarts,
            say=say,
        )
        main = MainMachine(rounds, place.secret, launch.lost_after)
        serving = asyncio.ensure_future(main.serve(listener))
    try:
        stream = await _reach(launch, place)
        peer = Peer(launch, place.own, stream, is_main=main is not None)
        status = await peer.take_part()
        if main:
            await main.farewell()
        return status
    finally:
        if serving:
            serving.cancel()


class Peer:
    """This machine's part in the launch: starts and ends its workers as the main machine says."""

    def __init__(
        self, launch: ElasticLaunch, own: str, stream: SignedStream, *, is_main: bool
    ) -> None:
        self._launch, self._own, self._stream, self._is_main = launch, own, stream, is_main
        self._workers: Workers | None = None
        self._tasks: set[asyncio.Future] = set()
        self._asked: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        self._asked_at = 0.0

    async def take_part(self) -> int:
        """Until the launch ends, or this machine is asked to stop. Returns the exit status."""
        for number in STOP_SIGNALS:
            asyncio.get_running_loop().add_signal_handler(number, self._ask_to_stop, number)
        own = {"address": self._own, "processes": self._launch.processes}
        self._stream.send({"type": "join", **own, "is_main": self._is_main})
        self._report_idle(None)
        self._in_background(self._beat())
        course = self._in_background(self._follow())
        try:
            await asyncio.wait({course, self._asked}, return_when=asyncio.FIRST_COMPLETED)
            if self._asked.done():
                await self._leave(course)
            status = course.result() if course.done() else 0
            return 128 + self._asked.result() if self._asked.done() else status
        finally:
            if self._workers:
                is_alone = course.done() and course.exception()
                await self._workers.stop(TO_END_S if is_alone else TO_EXPLAIN_S)
            for task in self._tasks:
                task.cancel()
            self._stream.close()

    async def _follow(self) -> int:
        """Do what the main machine says; returns the launch's exit status."""
        while True:
            try:
                message = await self._stream.receive(self._launch.lost_after)
            except (Gone, Stranger) as error:
                found = f"lost the main machine at {self._launch.where}: {error}; the workers here"
                found = f"{found} are ended"
                raise LostMain(found, AFTER_MAIN) from error
            kind = message.get("type")
            if kind == "start" and not self._asked.done():
                await self._start(message)
            elif kind == "stop" and self._workers:
                self._tell(message)
                self._in_background(self._workers.stop(float(message["patience_s"])))
            elif kind == "end":
                self._tell(message)
                return int(message["status"])

    async def _start(self, message: Message) -> None:
        processes = self._launch.processes
        self._workers = await Workers.start(self._launch.script, processes, message)
        self._in_background(self._watch(self._workers))

    async def _watch(self, workers: Workers) -> None:
        status = await workers.ended()
        self._workers = None
        self._report_idle(status)

    async def _beat(self) -> None:
        while True:
            await asyncio.sleep(BEAT_S)
            self._stream.send({"type": "alive"})

    async def _leave(self, course: asyncio.Future[int]) -> None:
        """Wait until the workers here have saved, as all others do, or the launch has ended."""
        while self._workers and not course.done():
            await asyncio.sleep(0.05)

    def _ask_to_stop(self, number: int) -> None:
        """SIGINT, SIGTERM or SIGHUP came: the first saves, a second one ends at once."""
        if self._asked.done():
            if self._workers and time.monotonic() > self._asked_at + 1:
                self._workers.send_signal(signal.SIGKILL)
            return
        self._asked_at = time.monotonic()
        self._stream.send({"type": "leaving"})
        self._asked.set_result(number)
        if self._workers:
            wanted = signal.SIGTERM if number == signal.SIGHUP else number
            self._workers.ask_to_stop(wanted)

    def _report_idle(self, status: int | None) -> None:
        with contextlib.suppress(OSError):  # the address has gone, and so will the connection
            port = _free_port(self._own)
            self._stream.send({"type": "idle", "status": status, "port": port})

    def _tell(self, message: Message) -> None:
        if message.get("reason") and not self._is_main:  # there it has been said
            say(str(message["reason"]))

    def _in_background(self, work: Any) -> asyncio.Future:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        return task


class LostMain(ForgeError):
    """The main machine is gone, and the launch with it."""

    status = 1


async def _reach(launch: ElasticLaunch, place: Place) -> SignedStream:
    """A connection to the main machine, which may be started later. Raises ForgeError."""
    where, deadline = launch.where, time.monotonic() + launch.join_timeout
    state, has_said = "", False
    while True:
        state, stream = await _try(launch, place)
        if stream:
            return stream
        if time.monotonic() > deadline:
            break
        if not has_said:
            say(f"waiting for the main machine at {where} ({state})")
            has_said = True
        await asyncio.sleep(RETRY_S)
    waited = f"the main machine did not come to {where} within {launch.join_timeout:.0f} s"
    if state == ENDS_AT_ONCE:
        found, fix = f"{where} answers and ends the connection", "see which program has the port"
        raise ForgeError(f"{waited}: {found}", f"{fix} there, or choose another --port")
    reached = addresses.judge_reach(state, launch.main, launch.port, place.own)
    fix = reached.fix or "start the same line on the machine that has this address"
    raise ForgeError(f"{waited} (--join-timeout): {reached.found}", fix)


ENDS_AT_ONCE = "the connection is closed at once"


async def _try(launch: ElasticLaunch, place: Place) -> tuple[str, SignedStream | None]:
    """What one try to reach the main machine shows, and the connection if there is one."""
    state = await asyncio.to_thread(addresses.probe, launch.main, launch.port)
    if state != addresses.OPEN:
        return state, None
    try:
        streams = await asyncio.open_connection(launch.main, launch.port)
        stream = SignedStream(*streams, is_server=False)
        await stream.greet(place.secret, GREETING_S)
        return state, stream
    except (OSError, Gone):
        return ENDS_AT_ONCE, None
    except Stranger as error:
        raise ForgeError(
            f"what answers at {launch.where} is not the main machine of this launch, or has another"
            f" secret: {error}",
            "copy the same secret to all machines and name it by --secret-file on each; see on"
            f" {launch.main} which program has port {launch.port}",
        ) from error


def _listen(address: str, port: int) -> socket.socket | None:
    """A socket at the main port, on the main address alone; None if another launcher has it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    try:
        return socket.create_server((address, port), family=family, backlog=128)
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return None  # this is a further launcher on the main machine, or the greeting fails
        raise ForgeError.of([addresses.judge_own_port(port)]) from error


def _free_port(address: str) -> int:
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    with socket.create_server((address, 0), family=family) as listener:
        return int(listener.getsockname()[1])


def say(text: str) -> None:
    """A line about the launch, of which a part may come from others; beside the workers' output."""
    with contextlib.suppress(OSError):
        print(f"elastic: {in_one_line(text, LONGEST_LINE)}", flush=True)
