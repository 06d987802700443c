"""The main machine of an elastic launch: where the launchers of all machines come to.

It takes no state from anyone: it hears who is there and how their workers ended, and decides the
rounds. What is not signed with the cluster's secret is refused by address, and never parsed.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import re
import socket
import time
from collections import Counter
from collections.abc import Iterator

from p2p_llm_forge.peers.elastic_rounds import ENDED, Member, Rounds
from p2p_llm_forge.peers.routes import own_addresses
from p2p_llm_forge.peers.signed_stream import Gone, Message, SignedStream, Stranger

GREETING_S = 10.0  # that a stranger may hold a connection
LISTED = 100  # strangers that are named
# Connections that may be greeting at once: of one address, and of all others together, which leaves
# this process files to open (1024 on most systems). Those of this machine are not counted.
GREETINGS, ALL_GREETINGS = 8, 512
SCOPE = re.compile(r"[\w.-]{1,15}", re.ASCII)  # the interface of a link-local address
BEAT_S = 1.0
FAREWELL_S = 5.0


class MainMachine:
    """Serves the launchers of all machines. secret: None lets everyone in.

    lost_after_s: how long a machine may show no sign of life.
    """

    def __init__(self, rounds: Rounds, secret: bytes | None, lost_after_s: float) -> None:
        self.rounds = rounds
        self._secret, self._lost_after_s = secret, lost_after_s
        self._refused: set[str] = set()
        self._greeting: Counter[str] = Counter()  # by address

    async def serve(self, listener: socket.socket) -> None:
        """Serve until the task is cancelled."""
        server = await asyncio.start_server(self._take, sock=listener)
        async with server:
            while True:
                await asyncio.sleep(BEAT_S)
                self.rounds.look(time.monotonic())
                for member in self.rounds.members:
                    member.send({"type": "alive"})

    async def farewell(self) -> None:
        """Wait a few seconds until all others know that the launch has ended."""
        deadline = time.monotonic() + FAREWELL_S
        while self.rounds.members and time.monotonic() < deadline:
            await asyncio.sleep(0.05)

    async def _take(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        stream = SignedStream(reader, writer, is_server=True)
        member = None
        try:
            member = await self._greet(stream)
            if member:
                await self._listen(stream, member)
        except Stranger as error:
            self._refuse(stream.address, str(error))
        except Gone as error:
            if member:
                self.rounds.left(member, error, time.monotonic())
            elif error.is_silent:  # one that ends at once may be a launcher's look at the port
                self._refuse(stream.address, str(error))
        finally:
            if member in self.rounds.members:
                self.rounds.left(member, Gone("what it sent made no sense"), time.monotonic())
            stream.close()

    async def _greet(self, stream: SignedStream) -> Member | None:
        """A new member, once it has proven that it may be here."""
        with self._counted(stream.address):
            await stream.greet(self._secret, GREETING_S)
            member = as_member(await stream.receive(GREETING_S), stream)
        rounds = self.rounds
        reason = f"the launch has ended with status {rounds.status}"
        if rounds.members and member.processes != rounds.members[0].processes:
            reason = f"this machine was started with --processes {member.processes}, the others"
            reason = f"{reason} with {rounds.members[0].processes}"
        elif rounds.phase != ENDED:
            rounds.came(member, time.monotonic())
            return member
        stream.send({"type": "end", "status": 2, "reason": reason})
        with contextlib.suppress(Gone):
            await stream.receive(GREETING_S)
        return None

    @contextlib.contextmanager
    def _counted(self, address: str) -> Iterator[None]:
        """Count a greeting while it lasts. Raises Stranger if there are too many."""
        if address.split("%")[0] in own_addresses():
            yield
            return
        if self._greeting[address] >= GREETINGS or self._greeting.total() >= ALL_GREETINGS:
            raise Stranger("too many connections at once have not said who they are")
        self._greeting[address] += 1
        try:
            yield
        finally:
            self._greeting -= Counter([address])  # which drops a zero

    async def _listen(self, stream: SignedStream, member: Member) -> None:
        """Take what a member reports, until it is gone."""
        while True:
            message = await stream.receive(self._lost_after_s)
            kind, status, now = message.get("type"), message.get("status"), time.monotonic()
            port = message.get("port")
            if not isinstance(status, int | None) or not isinstance(port, int | None):
                raise Stranger("what it sent is no message of a launcher")
            if kind == "idle" and port:
                self.rounds.idle(member, port, status, now)
            elif kind == "leaving":
                self.rounds.leaves(member, now)

    def _refuse(self, address: str, reason: str) -> None:
        if address not in self._refused and len(self._refused) < LISTED:
            self._refused.add(address)
            self.rounds.say(f"refused a connection from {address}: {reason}")


def as_member(join: Message, stream: SignedStream) -> Member:
    """What a launcher says of its machine. Raises Stranger if it says nothing that can be."""
    said, processes = join.get("address"), join.get("processes")
    try:
        address = ipaddress.ip_address(said) if isinstance(said, str) else None
    except ValueError:
        address = None
    scope = getattr(address, "scope_id", None)  # Python takes any text as one
    if (
        address is None
        or type(processes) is not int
        or not (scope is None or SCOPE.fullmatch(scope))
    ):
        raise Stranger("it does not say which machine it is")
    if not 1 <= processes <= 1024:
        raise Stranger(f"it says that it has {processes} processes")
    return Member(str(address), processes, join.get("is_main") is True, stream.send)
