"""Files between the ranks: what one offers, others fetch, at any time and from any thread.

Not a collective: every rank has a listening socket for it, and connects where it wants to fetch.
A shared folder needs none of this.
"""

from __future__ import annotations

import contextlib
import secrets
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

from p2p_llm_forge.errors import in_one_line
from p2p_llm_forge.peers import sockets
from p2p_llm_forge.peers.file_fetch import Fetch, Fetched, GivenUp, Source
from p2p_llm_forge.peers.file_requests import Offers, answer_all
from p2p_llm_forge.peers.file_stream import (
    FileStream,
    Known,
    greet,
    hang_up,
    welcome,
)
from p2p_llm_forge.peers.file_watch import Watch
from p2p_llm_forge.peers.partial_files import FileFacts
from p2p_llm_forge.peers.secret import Session
from p2p_llm_forge.peers.signed_stream import Gone, Stranger

__all__ = ["FileExchange", "FileFacts", "Fetched", "Files", "GivenUp", "Watch"]

Files = Mapping[str, FileFacts]  # by name inside a folder, "a/b.arrow"

CONNECT_S = 5.0
LONGEST_SILENCE_S = 60.0  # of a rank that lives and neither asks nor reads; it may come back
MOST_GREETINGS = 64  # at once; who comes then takes the place of one of the busiest address
MOST_CONNECTIONS = 256  # of ranks that have proven themselves
BACKLOG = 128
# Between looks whether training exchanges; the longest wait for 5 ms of the link: 1 % is left.
GAP_S, LONGEST_GAP_S = 0.002, 0.5


@dataclass(frozen=True)
class Place:
    """Where a rank serves its files. token: what proves there, without a secret, who reads the
    store."""

    address: str
    port: int
    token: str
    host: str


class Greeting(NamedTuple):
    """Who has connected and not proven yet that it is a rank."""

    address: str
    thread: threading.Thread


def listen(address: str) -> tuple[socket.socket, dict[str, Any]]:
    """A socket for the files of this rank, and what the others must know of it."""
    family = socket.AF_INET6 if ":" in address else socket.AF_INET
    server = socket.create_server((address, 0), family=family, backlog=BACKLOG)
    facts = {"address": address, "port": server.getsockname()[1]}
    return server, {**facts, "token": secrets.token_hex(32)}


class FileExchange:
    """The files that this rank offers, and what it fetches from others.

    Made by `Cluster.open_files`. Methods may be called from any thread.
    """

    def __init__(
        self,
        rank: int,
        places: Sequence[Place],
        server: socket.socket | None,
        session: Session | None,
        timeout_s: float,
    ) -> None:
        """places: by rank. server: from `listen`; None for a rank alone."""
        self.rank, self.places = rank, places
        self._session, self._timeout_s = session, timeout_s
        self._offers = Offers()
        self._is_exchanging: Callable[[], bool] = lambda: False
        self._is_closed = threading.Event()
        self._lock = threading.Lock()
        self._greeting: dict[socket.socket, Greeting] = {}  # the longest first
        self._serving: set[socket.socket] = set()
        self._watches: set[Watch] = set()
        self._server = server
        if server is not None:
            threading.Thread(target=self._accept, daemon=True, name="files").start()

    # --- what callers use -------------------------------------------------------------------------

    def offer(self, key: str, folder: Path, names: Iterable[str]) -> None:
        """Let others fetch these files of a folder by `key`, until `withdraw`."""
        self._offers.add(key, Path(folder), names)

    def withdraw(self, key: str) -> None:
        """Offer them no longer. What is on its way from here ends."""
        self._offers.remove(key)

    def stand_back(self, is_exchanging: Callable[[], bool]) -> None:
        """Let what is fetched behind training, from here or to here, wait while this is true."""
        self._is_exchanging = is_exchanging

    def fetch(
        self,
        files: Files,
        sources: Mapping[int, str],
        into: Path,
        watch: Watch | None = None,
        is_behind: bool = False,
    ) -> Fetched:
        """Fetch files into a folder, verified and durable; what is whole there already stays.

        files: come in this order. sources: by rank the key under which it offers them; several are
        asked at once. is_behind: wait for the training's own exchanges. What came before a kill is
        not sent again. Raises ForgeError when a file cannot come from anybody (naming each source
        and what is wrong with it), when there is no room (before the first byte) or no more;
        GivenUp by `watch.give_up()` and when the exchange is closed.
        """
        watch = watch or Watch()
        asked = [
            Source(rank, self.name(rank), key, partial(self._connect, rank))
            for rank, key in sources.items()
            if rank != self.rank
        ]
        with self._lock:
            self._watches.add(watch)
            if self._is_closed.is_set():
                watch.give_up()
        try:
            wait = self._wait_for_gap if is_behind else None
            return Fetch(files, asked, Path(into), watch, wait).run()
        finally:
            with self._lock:
                self._watches.discard(watch)

    def name(self, rank: int) -> str:
        """A rank for messages, with its host."""
        return f"rank {rank} ({in_one_line(self.places[rank].host)})"

    def close(self) -> None:
        """End all fetches, and serve nothing any more."""
        self._is_closed.set()
        if self._server is not None:
            hang_up(self._server)
        with self._lock:
            open_now = [*self._greeting, *self._serving]
            for watch in self._watches:
                watch.give_up()
        for connection in open_now:
            hang_up(connection)

    # --- connections ------------------------------------------------------------------------------

    def _connect(self, rank: int) -> FileStream:
        place = self.places[rank]
        try:
            connection = socket.create_connection((place.address, place.port), CONNECT_S)
        except OSError as error:
            raise Gone(f"no connection to it ({error.strerror or error})") from error
        try:
            self._tune(connection)
            stream = greet(connection, self.rank, rank, Known(self._session, place.token))
            stream.set_timeout(self._timeout_s)
            return stream
        except BaseException:
            hang_up(connection)
            raise

    def _tune(self, connection: socket.socket) -> None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        sockets.keep_alive(connection, self._timeout_s)

    def _wait_for_gap(self) -> bool:
        """Wait while training exchanges, but not for ever. Whether it had to."""
        if not self._is_exchanging():
            return False
        until = time.monotonic() + LONGEST_GAP_S
        while self._is_exchanging() and time.monotonic() < until and not self._is_closed.is_set():
            time.sleep(GAP_S)
        return True

    # --- serving ----------------------------------------------------------------------------------

    def _accept(self) -> None:
        assert self._server is not None
        while not self._is_closed.is_set():
            try:
                connection, (address, *_) = self._server.accept()
            except OSError:
                if self._is_closed.wait(0.05):  # too many open files, or one that went again
                    return
                continue
            self._make_room()
            thread = threading.Thread(
                target=self._serve, args=(connection,), daemon=True, name="serving files"
            )
            with self._lock:
                self._greeting[connection] = Greeting(address, thread)
            thread.start()

    def _make_room(self) -> None:
        """Hang up on one of the busiest address where too many greet.

        Its thread has ended before the next one begins: as many as come, no more threads than
        MOST_GREETINGS wait for a proof.
        """
        with self._lock:
            if len(self._greeting) < MOST_GREETINGS:
                return
            replaced = self._busiest()
            thread = self._greeting.pop(replaced).thread
        hang_up(replaced)
        thread.join()

    def _busiest(self) -> socket.socket:
        """The one that greets for longest, of the address that greets most."""
        ((busiest, _),) = Counter(one.address for one in self._greeting.values()).most_common(1)
        return next(one for one, its in self._greeting.items() if its.address == busiest)

    def _serve(self, connection: socket.socket) -> None:
        """Answer one rank, once it has proven that it is one."""
        known = Known(self._session, self.places[self.rank].token)
        with contextlib.suppress(Gone, Stranger, OSError):
            stream = welcome(connection, self.rank, range(len(self.places)), known)
            with self._lock:
                self._greeting.pop(connection, None)  # it may have been replaced just now
                if len(self._serving) >= MOST_CONNECTIONS or self._is_closed.is_set():
                    raise Gone("too many connections")
                self._serving.add(connection)
            self._tune(connection)
            stream.set_timeout(LONGEST_SILENCE_S)
            answer_all(stream, self._offers, self._wait_for_gap)
        with self._lock:
            self._greeting.pop(connection, None)
            self._serving.discard(connection)
        hang_up(connection)
