"""Ranks as threads of one process: what they exchange stays in memory, and takes milliseconds.

channels(4)     -> a MemoryChannel for each rank, the interface of peers.channel.Channel
clusters(4)     -> a MemoryCluster for each rank, the interface of peers.cluster.Cluster
run_ranks(all_of_them, act)  -> what act(one) returned on each, by rank
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from p2p_llm_forge.peers.channel import Channel
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.liveness import Liveness
from p2p_llm_forge.peers.sealing import Sealing
from p2p_llm_forge.peers.secret import Session
from p2p_llm_forge.peers.store import Store

Rank = TypeVar("Rank")
Result = TypeVar("Result")

DEADLINE_S = 60.0  # after which a rank that waits in vain fails, and with it the test


class Exchanges:
    """What the ranks of one world have sent each other, by kind of call and its number."""

    def __init__(self, world_size: int) -> None:
        self.world_size = world_size
        self._sent: dict[tuple[str, int, int], Any] = {}
        self._came = threading.Condition()

    def send(self, kind: str, number: int, rank: int, value: Any) -> None:
        with self._came:
            self._sent[kind, number, rank] = value
            self._came.notify_all()

    def receive(self, kind: str, number: int) -> list[Any]:
        """What every rank has sent in its call of this number, by rank, once all have."""
        keys = [(kind, number, rank) for rank in range(self.world_size)]
        with self._came:
            have_come = self._came.wait_for(
                lambda: all(key in self._sent for key in keys), DEADLINE_S
            )
            missing = [key for key in keys if key not in self._sent]
            assert have_come, f"timed out: never sent: {missing}"
            return [self._sent[key] for key in keys]


class Tampered(Exchanges):
    """The wire, with somebody on it who changes what rank 1 sends (or 0, what it sends to all)."""

    def __init__(self, world_size: int, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        super().__init__(world_size)
        self._change = change

    def send(self, kind: str, number: int, rank: int, value: Any) -> None:
        forger = 0 if kind == "spread" else 1
        super().send(kind, number, rank, self._change(value) if rank == forger else value)


def flipped(bit: int) -> Callable[[torch.Tensor], torch.Tensor]:
    """What flips a bit of the bytes that are sent."""

    def change(value: torch.Tensor) -> torch.Tensor:
        changed = value.clone()
        changed.view(-1)[bit // 8 % changed.numel()] ^= 1 << bit % 8
        return changed

    return change


class MemoryChannel(Channel):
    """A Channel between threads. As with gloo, calls of one kind pair up in their order."""

    def __init__(self, rank: int, exchanges: Exchanges, sealing: Sealing | None = None) -> None:
        super().__init__(rank, exchanges.world_size, sealing=sealing)
        self._exchanges = exchanges
        self._calls = {"swap": 0, "collect": 0, "spread": 0}

    def _begin(self, kind: str, tensor: torch.Tensor) -> Callable[[], list[torch.Tensor]]:
        number = self._calls[kind]
        self._calls[kind] += 1
        self._exchanges.send(kind, number, self.rank, tensor.clone())
        return lambda: self._exchanges.receive(kind, number)

    def _swap(self, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
        assert rows.is_contiguous() and len(rows) == self.world_size
        arrived = self._begin("swap", rows)
        return lambda: torch.stack([sent[self.rank] for sent in arrived()])

    def _collect(self, row: torch.Tensor, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
        assert row.is_contiguous()
        arrived = self._begin("collect", row)
        return lambda: rows.copy_(torch.stack(arrived()))

    def _spread_(self, values: torch.Tensor) -> torch.Tensor:
        return values.copy_(self._begin("spread", values)()[0])


class MemoryCluster(Cluster):
    """A Cluster of threads: its store, numbers and channels are in memory."""

    def __init__(
        self,
        launch: Launch,
        store: dist.Store,
        worlds: Callable[[int], Exchanges],
        session: Session | None = None,
    ) -> None:
        self._worlds, peers = worlds, None
        if launch.world_size > 1:
            shared = Store(store, launch.rank, DEADLINE_S)
            shared.session = session
            peers = Liveness(shared, launch.rank, launch.world_size, DEADLINE_S).start()
        super().__init__(launch, torch.device("cpu"), peers)

    def _new_group(self, ranks: Any = None, backend: Any = None) -> None:
        return None

    def _channel(self, groups: Any, ranks: list[int] | None = None) -> Channel:
        number = len(self._channels)
        assert ranks is None or len(ranks) == self.world_size, "a part of them needs processes"
        sealing = Sealing(self._session, self.rank, number) if self._session else None
        self._channels.append(MemoryChannel(self.rank, self._worlds(number), sealing))
        return self._channels[-1]


def channels(
    world_size: int,
    secret: bytes | None = None,
    exchanges: Exchanges | None = None,
    nonce: int = 0,
) -> list[MemoryChannel]:
    """A channel for each rank of a world; exchanges: what carries them, if not the usual."""
    exchanges = exchanges or Exchanges(world_size)
    session = Session(secret, [{"nonce": nonce}]) if secret else None
    return [
        MemoryChannel(rank, exchanges, Sealing(session, rank, 0) if session else None)
        for rank in range(world_size)
    ]


@contextlib.contextmanager
def clusters(
    world_size: int, store: dist.Store | None = None, secret: bytes | None = None, **launch: Any
) -> Iterator[list[MemoryCluster]]:
    """A cluster for each rank of a world. launch: further fields of peers.launch.Launch."""
    shared, opened, lock = store or dist.HashStore(), {}, threading.Lock()
    session = Session(secret, []) if secret else None

    def world_of(number: int) -> Exchanges:
        with lock:
            return opened.setdefault(number, Exchanges(world_size))

    made = [
        MemoryCluster(Launch(rank=rank, world_size=world_size, **launch), shared, world_of, session)
        for rank in range(world_size)
    ]
    try:
        yield made
    finally:
        for cluster in made:
            cluster.close()


def run_ranks(ranks: Sequence[Rank], act: Callable[[Rank], Result]) -> list[Result]:
    """What `act` returns for each rank, all at once, each in a thread; raises the first error."""
    with ThreadPoolExecutor(max_workers=len(ranks)) as threads:
        futures = [threads.submit(act, rank) for rank in ranks]
        return [future.result(DEADLINE_S) for future in futures]
