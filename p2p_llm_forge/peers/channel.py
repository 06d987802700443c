"""Bulk data between the ranks: exchanges of all with all."""

from __future__ import annotations

import itertools
import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from p2p_llm_forge.peers.sealing import TAG_BYTES, Exchange, Sealing

Begun = TypeVar("Begun")
Result = TypeVar("Result")
Waiting = Callable[[], Tensor]  # gives what arrives, once it has


class Channel:
    """Exchanges of flat tensors between all ranks, by gloo between the CPUs, and their meter.

    It has two process groups and two threads of its own, so exchanges run while the main thread
    computes or talks otherwise, and one begins while the one before is being finished. Each kind of
    call belongs to one of the groups: the order of its own calls must be the same on every rank,
    how they mix with those of the other need not. groups: none for a rank alone.

    sealing: encrypts what leaves this rank, where there is a secret. Labels name what is sent; they
    are signed along with it and must be the same on all ranks. Waiting for what does not open with
    the secret raises RankFailure naming its sender. guard: what every call of gloo is inside of,
    to say what its failure means.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None),
        sealing: Sealing | None = None,
        guard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.bytes_sent, self._count_lock = 0, threading.Lock()  # payload that has left this rank
        self._first_group, self._second_group = groups
        self._sealing, self._guard = sealing, guard
        self._under_way = 0  # exchanges that have begun here and are waited for
        self._numbers: dict[str, itertools.count[int]] = defaultdict(itertools.count)
        self._beginning = ThreadPoolExecutor(1, "beginning exchanges")
        self._finishing = ThreadPoolExecutor(1, "finishing exchanges")

    def count(self, sent: int) -> None:
        """Add bytes that leave this rank. May be called from any thread."""
        with self._count_lock:
            self.bytes_sent += sent

    def is_exchanging(self) -> bool:
        """Whether an exchange that has begun here is not over. May be asked from any thread."""
        return self._under_way > 0

    def all_to_all(self, rows: Tensor, label: str = "") -> Waiting:
        """Begin to send row r to rank r. Returns what waits for the rows that all ranks send here.

        rows: (ranks, n), any dtype, contiguous, on the CPU; the same shape comes back, by rank.
        """
        if self.world_size == 1:
            return lambda: rows
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        self.count(len(others) * rows[0].nbytes)
        sealing, exchange = self._sealing, self._exchange("all_to_all", label)
        if sealing is None:
            return self._swap(rows)
        wire = _wire_of(rows)
        for other in others:
            sealing.seal(rows[other], wire[other], exchange, receiver=other)
        swapped = self._swap(wire)

        def opened() -> Tensor:
            received, arrived = torch.empty_like(rows), swapped()
            received[self.rank].copy_(rows[self.rank])
            for other in others:
                sealing.open(arrived[other], received[other], exchange, other, self.rank)
            return received

        return opened

    def all_gather(self, row: Tensor, label: str = "", into: Tensor | None = None) -> Waiting:
        """Begin to send `row` to all. Returns what waits for the rows of all ranks, (ranks, n).

        row: (n), any dtype, contiguous, on the CPU. into: memory for what comes back, of which
        `row` may be this rank's part.
        """
        if self.world_size == 1:
            return lambda: row.unsqueeze(0)
        others = [rank for rank in range(self.world_size) if rank != self.rank]
        self.count(len(others) * row.nbytes)
        rows = row.new_empty((self.world_size, *row.shape)) if into is None else into
        sealing, exchange = self._sealing, self._exchange("all_gather", label)
        if sealing is None:
            return self._collect(row, rows)
        wire = _wire_of(row)
        sealing.seal(row, wire, exchange)
        collected = self._collect(wire, wire.new_empty((self.world_size, len(wire))))

        def opened() -> Tensor:
            arrived = collected()
            rows[self.rank].copy_(row)
            for other in others:
                sealing.open(arrived[other], rows[other], exchange, other)
            return rows

        return opened

    def send_from_main_(self, values: Tensor, label: str = "") -> Tensor:
        """Give `values` of rank 0 to all, in place. (n), any dtype, contiguous, on the CPU."""
        if self.world_size == 1:
            return values
        is_main = self.rank == 0
        self.count((self.world_size - 1) * values.nbytes if is_main else 0)
        sealing, exchange = self._sealing, self._exchange("from_main", label)
        if sealing is None:
            return self._spread_(values)
        wire = _wire_of(values)
        if is_main:
            sealing.seal(values, wire, exchange)
        self._spread_(wire)
        if not is_main:
            sealing.open(wire, values, exchange, sender=0)
        return values

    def in_background(
        self, begin: Callable[[], Begun], finish: Callable[[Begun], Result]
    ) -> Future[Result]:
        """Run `begin` in the first thread and then `finish`, on what it returned, in the second.

        Each after those that were given before. `begin` may call all_to_all, `finish` the others.
        """
        begun = self._beginning.submit(begin)
        return self._finishing.submit(lambda: finish(begun.result()))

    def close(self) -> None:
        """Drop what has not begun; returns when what has begun is over."""
        for thread in (self._beginning, self._finishing):
            thread.shutdown(wait=True, cancel_futures=True)

    def _exchange(self, kind: str, label: str) -> Exchange:
        """The next exchange of its kind."""
        return Exchange(kind, next(self._numbers[kind]), label)

    # --- what goes over the wire ------------------------------------------------------------------

    def _swap(self, rows: Tensor) -> Waiting:
        """Send row r to rank r."""
        received = torch.empty_like(rows)
        with self._guard():
            work = dist.all_to_all_single(received, rows, group=self._first_group, async_op=True)
        return self._begun(work, received, rows)

    def _collect(self, row: Tensor, rows: Tensor) -> Waiting:
        """Send `row` to all; those of all arrive in `rows`."""
        with self._guard():
            work = dist.all_gather(list(rows), row, group=self._second_group, async_op=True)
        return self._begun(work, rows, row)

    def _spread_(self, values: Tensor) -> Tensor:
        """Send `values` of rank 0 to all, in place."""
        with self._guard():
            dist.broadcast(values, src=0, group=self._second_group)
        return values

    def _begun(self, work: Any, received: Tensor, sent: Tensor) -> Waiting:
        with self._count_lock:
            self._under_way += 1
        return partial(self._arrived, work, received, sent)

    def _arrived(self, work: Any, received: Tensor, sent: Tensor) -> Tensor:
        """What an exchange has brought, when it is over; `sent` must stay in memory until then."""
        try:
            with self._guard():
                work.wait()
        finally:
            with self._count_lock:
                self._under_way -= 1
        return received


def _wire_of(rows: Tensor) -> Tensor:
    """Memory for rows (..., n) on the wire: uint8 (..., bytes of a row and its signature)."""
    *leading, count = rows.shape
    return torch.empty((*leading, count * rows.itemsize + TAG_BYTES), dtype=torch.uint8)
