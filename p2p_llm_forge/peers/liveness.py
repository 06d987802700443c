"""Who lives: every rank shows a heartbeat in the store and watches those of the others.

A slow peer beats and is waited for, however long it takes; one whose heartbeat stands still is
lost. Then whatever waits for it is ended: the connections of the process groups are hung up, which
makes gloo's waits fail (torch 2.13 has no other way: abort() and shutdown() do nothing there).
What fails inside an exchange is a lost peer, whatever the library says; the heartbeats name it.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import platform
import threading
import time
from collections.abc import Callable, Iterator
from concurrent import futures
from dataclasses import dataclass, field
from typing import Any, TypeVar

from p2p_llm_forge.errors import in_one_line
from p2p_llm_forge.files import parse_json
from p2p_llm_forge.peers import sockets
from p2p_llm_forge.peers.rank_failure import LostPeer, RankFailure, is_out_of_memory
from p2p_llm_forge.peers.store import Store, StoreLost
from p2p_llm_forge.polling import in_thread, pauses, wait_for

Result = TypeVar("Result")

HEARTBEAT_S = 1.0
SHORTEST_TIMEOUT_S = 3.0
NAMING_S = 3.0  # how long a failed exchange waits for heartbeats that say who is gone
GOODBYE_S = 3.0  # how long the main process, and what ends with a run, is waited for
OPENING_S = 120.0  # for connections between ranks that live, and are all about to connect
HANGING_UP_S = 1.0  # for a wait that was hung up to say so
LONGEST_LIST = 64  # ranks that one may say to have lost
FAILED, LEFT = "failed", "left"


@dataclass
class Peer:
    """What another rank has shown last, and since when it stands still."""

    beat: dict[str, Any] = field(default_factory=dict)
    silent_s: float = 0.0

    @property
    def end(self) -> str:
        """How it has ended, as it said itself; empty while it runs."""
        return str(self.beat.get("end", ""))

    @property
    def lost(self) -> list[int]:
        """The ranks whose loss has ended it."""
        lost = self.beat.get("lost")
        ranks = lost[:LONGEST_LIST] if isinstance(lost, list) else []
        return [rank for rank in ranks if isinstance(rank, int)]


class Liveness:
    """The heartbeats of all ranks, and what must not wait for one that is gone.

    loss: the first thing that was lost; it ends the run. Methods may be called from any thread.
    """

    def __init__(
        self, store: Store, rank: int, world_size: int, timeout_s: float, phase: str = "run"
    ) -> None:
        """phase: `rendezvous`, in which only those are watched who have come, or `run`."""
        self.store, self.rank, self.world_size = store, rank, world_size
        self.timeout_s = max(timeout_s, SHORTEST_TIMEOUT_S)
        self.loss: RankFailure | None = None
        self.on_loss: list[Callable[[], object]] = []
        self._keys = {number: f"forge/{phase}/alive/{number}" for number in range(world_size)}
        self._is_rendezvous, self._all_came = phase == "rendezvous", False
        self._peers = {number: Peer() for number in range(world_size) if number != rank}
        self._end: dict[str, Any] = {"end": "", "lost": []}
        self._connections: set[int] = set()
        self._beats = itertools.count()
        self._writing, self._looking, self._losing, self._blaming = (
            threading.Lock() for _ in range(4)
        )
        self._is_closed = threading.Event()
        self._heart = threading.Thread(target=self._live, daemon=True, name="heartbeat")

    def start(self) -> Liveness:
        """Begin to beat and to watch."""
        self._heart.start()
        return self

    def stop(self) -> None:
        """Beat and watch no more."""
        self._is_closed.set()
        if self._heart.is_alive():
            self._heart.join(GOODBYE_S)

    def close(self) -> None:
        """Beat no more, and close the store."""
        self.stop()
        self.store.close()

    # --- what waits -------------------------------------------------------------------------------

    def check(self) -> None:
        """Raise what was lost, if anything was."""
        if self.loss is not None:
            raise self.loss

    @contextlib.contextmanager
    def exchange(self) -> Iterator[None]:
        """What fails inside is a lost peer, whatever it says: LostPeer names who is gone."""
        self.check()
        try:
            yield
        except StoreLost as error:
            raise self.lose_store(error) from error
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            raise self.blame(error) from error

    def open(self, act: Callable[[], Result]) -> Result:
        """Run `act`, in which all ranks connect; what it connects is hung up at a loss.

        It runs in a thread that is abandoned when a peer is lost. Raises LostPeer.
        """
        self.check()
        before, deadline = sockets.connected(), time.monotonic() + OPENING_S + self.timeout_s
        answer = in_thread(act)
        for _ in pauses(longest_s=0.05):
            is_late = time.monotonic() > deadline
            if answer.done() or self.loss is not None or is_late:
                break
        self._connections |= sockets.connected() - before
        if self.loss is not None or is_late:
            self.hang_up()
            futures.wait([answer], HANGING_UP_S)  # what torch prints of it comes before our message
            raise self._loss(f"the ranks could not connect to each other within {OPENING_S:.0f} s")
        with self.exchange():
            return answer.result()

    def hang_up(self) -> None:
        """End whatever waits for an exchange, here and on the other side."""
        sockets.hang_up(self._connections)
        for act in self.on_loss:
            act()

    def blame(self, error: BaseException) -> RankFailure:
        """The loss that an exchange failed of; takes the seconds until heartbeats show it."""
        self.hang_up()  # other waits of this rank, and the others', end too
        with self._blaming:
            gone = self.gone()
            lines = str(error).strip().splitlines() or [type(error).__name__]
            who = self._names(gone) if gone else "all ranks show signs of life, but an exchange"
            return self._loss(f"lost a peer: {who} broke off ({lines[0]})", gone)

    def gone(self) -> list[int]:
        """The ranks that have ended, or do not beat any more; takes a few seconds if some do not.

        Returns as soon as anything else shows what was lost.
        """
        try:
            self._look(0.0)  # a beat from before now says nothing about now
        except StoreLost as error:
            self.lose_store(error)
        self._judge()
        before = {rank: peer.beat for rank, peer in self._peers.items()}
        deadline = time.monotonic() + NAMING_S
        for _ in pauses(longest_s=0.1):
            gone = [r for r, peer in self._peers.items() if peer.end or peer.beat == before[r]]
            if not gone or self.loss is not None or time.monotonic() > deadline:
                return gone
        raise AssertionError("pauses() never ends")

    def silent(self) -> list[int]:
        """The ranks that nobody needs to wait for in a farewell."""
        return [r for r, peer in self._peers.items() if peer.silent_s > self.timeout_s / 2]

    def has_left(self, rank: int) -> bool:
        """Whether a rank has ended and said so."""
        return rank != self.rank and bool(self._peers[rank].end)

    def leave(self, end: str) -> None:
        """Say how this rank ends, LEFT or FAILED, which ends the others' waits for it.

        The main process, which may serve the store, waits a few seconds for all.
        """
        lost = getattr(self.loss, "ranks", [])
        self._end = {"end": end, "lost": lost}
        if end == FAILED:
            self.hang_up()
        with contextlib.suppress(StoreLost):  # the main process, or the store, is gone already
            self._beat()
            self.store.set(f"forge/left/{self.rank}", "")
            if self.rank == 0:
                others = sorted(set(self._peers) - set(lost))
                wait_for(lambda: self._have_left(others), GOODBYE_S)

    def _have_left(self, ranks: list[int]) -> bool:
        keys = [f"forge/left/{rank}" for rank in ranks]
        if keys and not self.store.check(*keys):
            return False
        with contextlib.suppress(RankFailure):  # what a stranger wrote does not count
            return bool(self.store.get_all(keys, ranks)) or not keys
        return False

    # --- heartbeats -------------------------------------------------------------------------------

    def _live(self) -> None:
        try:
            looked_at = time.monotonic()
            while True:
                self._beat()
                now = time.monotonic()
                # What this rank itself slept does not count, nor what all slept together.
                self._look(min(now - looked_at, 2 * HEARTBEAT_S))
                looked_at = now
                self._judge()
                if self._is_closed.wait(HEARTBEAT_S):
                    return
        except StoreLost as error:
            if not self._is_closed.is_set():
                self.lose_store(error)
        except RankFailure as error:  # a heartbeat that a stranger wrote
            with self._losing:
                self.loss = self.loss or error
            self.hang_up()

    def _beat(self) -> None:
        with self._writing:
            beat = {"count": next(self._beats), "host": platform.node(), **self._end}
            self.store.set(self._keys[self.rank], json.dumps(beat))

    def _look(self, passed_s: float) -> None:
        """Read all heartbeats; `passed_s` is what those that stand still add to their silence."""
        with self._looking:
            self._take(self._read_beats(), passed_s)

    def _read_beats(self) -> dict[int, dict[str, Any]]:
        ranks = list(self._peers)
        self._all_came = self._all_came or self.store.check(*(self._keys[r] for r in ranks))
        if not self._all_came:
            ranks = [rank for rank in ranks if self.store.check(self._keys[rank])]
        texts = self.store.get_all([self._keys[rank] for rank in ranks], ranks) if ranks else []
        return dict(zip(ranks, map(_facts, texts), strict=True))

    def _take(self, beats: dict[int, dict[str, Any]], passed_s: float) -> None:
        for rank, peer in self._peers.items():
            if rank in beats and self._is_newer(beats[rank], peer.beat):
                peer.beat, peer.silent_s = beats[rank], 0.0
            elif rank in beats or not self._is_rendezvous:
                peer.silent_s += passed_s

    def _is_newer(self, beat: dict[str, Any], last: dict[str, Any]) -> bool:
        """Whether it is another heartbeat; where they are signed, not an old one, put back."""
        if self.store.session is None:
            return beat != last
        return _count(beat) > _count(last)

    def _judge(self) -> None:
        """Note a loss when a rank has failed or stands still."""
        failed = [rank for rank, peer in self._peers.items() if peer.end == FAILED]
        silent = [
            rank
            for rank, peer in self._peers.items()
            if peer.silent_s > self.timeout_s and not peer.end
        ]
        if failed:
            self._lose_with(failed)
        elif silent:
            seconds = min(self._peers[rank].silent_s for rank in silent)
            has = "have" if silent[1:] else "has"
            found = f"{has} shown no sign of life for {seconds:.0f} s"
            self._loss(f"lost a peer: {self._names(silent)} {found}", silent)
        if self.loss is not None:
            self.hang_up()

    def _lose_with(self, failed: list[int]) -> None:
        """Note the loss that other ranks have failed of, or their own failure."""
        lost = sorted({rank for number in failed for rank in self._peers[number].lost})
        if self.rank in lost:
            found = f"lost a peer: {self._names(failed)} ended for want of this rank's heartbeat"
        elif lost:
            found = f"lost a peer: {self._names(lost)}, as {self._names(failed)} found"
        else:
            found = f"lost a peer: {self._names(failed)} {'have' if failed[1:] else 'has'} failed"
        self._loss(found, lost or failed)

    def lose_store(self, error: StoreLost) -> RankFailure:
        """The loss of the store, or what others said that they lost before it ended."""
        failed = [rank for rank, peer in self._peers.items() if peer.end == FAILED]
        if failed:
            self._lose_with(failed)
        else:
            store = f"the store of {self._names([0])} does not answer any more ({error})"
            self._loss(f"lost the main process: {store}", [0])
        self.hang_up()
        return self._loss()

    def _loss(self, found: str = "", ranks: list[int] | None = None) -> RankFailure:
        """The first loss: this one, if there was none before."""
        with self._losing:
            if self.loss is None:
                self.loss = LostPeer(self.rank, found, ranks or [])
            return self.loss

    def _names(self, ranks: list[int]) -> str:
        return " and ".join(self._name(rank) for rank in ranks)

    def _name(self, rank: int) -> str:
        host = self._peers[rank].beat.get("host") if rank in self._peers else platform.node()
        return f"rank {rank}" + (f" ({in_one_line(host)})" if host else "")


def _count(beat: dict[str, Any]) -> int:
    count = beat.get("count")
    return count if isinstance(count, int) else -1


def _facts(text: str) -> dict[str, Any]:
    """What a rank has put into the store; anyone who reaches the port can write there."""
    with contextlib.suppress(ValueError):
        value = parse_json(text)
        if isinstance(value, dict):
            return value
    return {}
