"""The launch's key-value store, in which no call outlasts its deadline.

torch's TCPStore (2.13) does not come back from `get`, `set` or `check` while its server answers
nothing: a machine that vanished, a process that is stopped. So a thread of our own calls it, which
is abandoned together with the store when a call takes too long.
"""

from __future__ import annotations

import datetime
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotInTime
from queue import SimpleQueue
from typing import Any, TypeVar

import torch.distributed as dist

from p2p_llm_forge.peers.secret import Session
from p2p_llm_forge.peers.sockets import give_up_early

Result = TypeVar("Result")

GROUPS_TIMEOUT = datetime.timedelta(days=1)  # they are abandoned earlier: see liveness.py


class StoreLost(Exception):
    """The store does not answer any more; it is not asked again."""


class Store:
    """Text by key, seen by all ranks. Its methods may be called from any thread.

    Every call returns within `timeout_s` or raises StoreLost, and from then on all do at once.
    client: a connection that nothing else uses, for a wait of another user would block it.
    """

    def __init__(self, client: dist.Store, rank: int, timeout_s: float) -> None:
        self._client, self._rank, self._timeout_s = client, rank, timeout_s
        self.session: Session | None = None  # once the ranks have proven that they know a secret
        self._lost: str | None = None
        if isinstance(client, dist.TCPStore):
            give_up_early(client.host, client.port, timeout_s)
        self._calls: SimpleQueue[tuple[Callable[[], Any], Future[Any]] | None] = SimpleQueue()
        threading.Thread(target=self._work, daemon=True, name="store").start()

    def set(self, key: str, value: str) -> None:
        """Write a value as this rank. Returns before the server has it: others see it soon."""
        self._call(lambda: self._client.set(key, self._written(key, value)))

    def set_once(self, key: str, value: str, instead_of: str = "") -> str:
        """Write where nothing stands but `instead_of`; returns what stands there afterwards."""
        raw = self._call(lambda: self._client.compare_set(key, instead_of, value))
        return raw.decode(errors="replace")

    def get(self, key: str, writer: int) -> str:
        """The value that rank `writer` has set; it must be there.

        Raises RankFailure where there is a session and that rank has not signed it.
        """
        return self._read(key, writer, self._call(lambda: self._client.get(key)))

    def get_all(self, keys: Sequence[str], writers: Sequence[int]) -> list[str]:
        """Several values at the cost of one; all must be there. writers: the rank of each."""
        raw = self._call(lambda: self._client.multi_get(list(keys)))
        return [self._read(*value) for value in zip(keys, writers, raw, strict=True)]

    def check(self, *keys: str) -> bool:
        """Whether all of the keys are there."""
        return self._call(lambda: self._client.check(list(keys)))

    def for_groups(self) -> dist.Store:
        """A connection of its own for torch's process groups, which wait in it for long."""

        def clone() -> dist.Store:
            client = self._client.clone()  # type: ignore[attr-defined]
            client.set_timeout(GROUPS_TIMEOUT)
            give_up_early(client.host, client.port, self._timeout_s)
            return client

        return self._call(clone)

    def close(self) -> None:
        """End the thread once it has done what it was given."""
        self._lost = self._lost or "it was closed"
        self._calls.put(None)

    def _written(self, key: str, value: str) -> str:
        """A value as it lies in the store."""
        return self.session.sign(key, self._rank, value) if self.session else value

    def _read(self, key: str, writer: int, raw: bytes) -> str:
        """What `_written` was given; anyone who reaches the port can write there."""
        if self.session is None:
            return raw.decode(errors="replace")
        return self.session.verified(key, writer, raw)

    def _call(self, act: Callable[[], Result]) -> Result:
        if self._lost is not None:
            raise StoreLost(self._lost)
        answer: Future[Result] = Future()
        self._calls.put((act, answer))
        try:
            return answer.result(self._timeout_s)
        except (NotInTime, RuntimeError) as error:
            text = str(error) or f"no answer for {self._timeout_s:.0f} s"
            self._lost = self._lost or text.splitlines()[0]
            raise StoreLost(self._lost) from error

    def _work(self) -> None:
        while call := self._calls.get():
            act, answer = call
            try:
                answer.set_result(act())
            except BaseException as error:
                answer.set_exception(error)
