"""Bulk data between the ranks: exchanges of all with all."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from typing import Any, TypeVar

import torch
import torch.distributed as dist

Begun = TypeVar("Begun")
Result = TypeVar("Result")


class Channel:
    """Exchanges of flat tensors between all ranks, by gloo between the CPUs, and their meter.

    It has two process groups and two threads of its own, so exchanges run while the main thread
    computes or talks otherwise, and one begins while the one before is being finished. Each kind of
    call belongs to one of the groups: the order of its own calls must be the same on every rank,
    how they mix with those of the other need not. groups: none for a rank alone.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        groups: tuple[dist.ProcessGroup | None, dist.ProcessGroup | None] = (None, None),
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self.bytes_sent, self._count_lock = 0, threading.Lock()  # payload that has left this rank
        self._first_group, self._second_group = groups
        self._beginning = ThreadPoolExecutor(1, "beginning exchanges")
        self._finishing = ThreadPoolExecutor(1, "finishing exchanges")

    def count(self, sent: int) -> None:
        """Add bytes that leave this rank. May be called from any thread."""
        with self._count_lock:
            self.bytes_sent += sent

    def all_to_all(self, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to send row r to rank r. Returns what waits for the rows that all ranks send here.

        rows: (ranks, n), any dtype, contiguous, on the CPU; the same shape comes back, by rank.
        """
        if self._first_group is None:
            return lambda: rows
        received = torch.empty_like(rows)
        work = dist.all_to_all_single(received, rows, group=self._first_group, async_op=True)
        self.count((self.world_size - 1) * rows[0].nbytes)
        return partial(_arrived, work, received, rows)

    def all_gather(self, row: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to send `row` to all. Returns what waits for the rows of all ranks, (ranks, n).

        row: (n), any dtype, contiguous, on the CPU.
        """
        if self._second_group is None:
            return lambda: row.unsqueeze(0)
        rows = row.new_empty((self.world_size, *row.shape))
        work = dist.all_gather(list(rows), row, group=self._second_group, async_op=True)
        self.count((self.world_size - 1) * row.nbytes)
        return partial(_arrived, work, rows, row)

    def all_reduce_(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place (a ring: 2 (ranks - 1) / ranks of its size are sent)."""
        if self._second_group is not None:
            dist.all_reduce(values, group=self._second_group)
            self.count(2 * (self.world_size - 1) * values.nbytes // self.world_size)
        return values

    def in_background(
        self, begin: Callable[[], Begun], finish: Callable[[Begun], Result]
    ) -> Future[Result]:
        """Run `begin` in the first thread and then `finish`, on what it returned, in the second.

        Each after those that were given before. `begin` may call all_to_all, `finish` all_gather
        and all_reduce_.
        """
        begun = self._beginning.submit(begin)
        return self._finishing.submit(lambda: finish(begun.result()))

    def close(self) -> None:
        """Drop what has not begun; returns when what has begun is over."""
        for thread in (self._beginning, self._finishing):
            thread.shutdown(wait=True, cancel_futures=True)


def _arrived(work: Any, received: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
    """What an exchange has brought, when it is over; `sent` has to stay in memory until then."""
    work.wait()
    return received
