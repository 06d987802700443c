"""All that peers do together: the only caller of collectives, with channel.py for bulk data.

Numbers travel by `torch.distributed` collectives, facts and waiting by the launch's key-value store
as JSON. Waiting on the store has no collective timeout, so the main process may work for hours
(prepare a corpus, write a large checkpoint) while the others wait. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import itertools
import json
import math
import platform
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from p2p_llm_forge.errors import ForgeError, Problem
from p2p_llm_forge.peers.channel import Channel
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.rank_failure import SEE_THE_OTHER, RankFailure
from p2p_llm_forge.peers.sealing import Sealing
from p2p_llm_forge.peers.store import Store
from p2p_llm_forge.polling import pauses, wait_for

Result = TypeVar("Result")

Group = dist.ProcessGroup | None

GOODBYE_S = 3.0
HEARTBEAT_S = 1.0
MESSAGE_BYTES = 2**24  # of tensors that the main process sends at once


class Cluster:
    """All processes of a run, seen from one of them.

    store: None for a process alone. control: gloo's group where gradients travel by NCCL.
    """

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        store: dist.Store | None,
        control: dist.ProcessGroup | None = None,
        peer_timeout_s: float = 30.0,
    ) -> None:
        self.accelerator: Any = None  # Accelerate's, once the precision is agreed on
        self.launch, self.device = launch, device
        self.rank, self.world_size, self.is_main = launch.rank, launch.world_size, launch.rank == 0
        self.is_on_gloo = control is None
        self._store, self._control, self._peer_timeout_s = store, control, peer_timeout_s
        self._conversations = 0
        self._session = store.session if isinstance(store, Store) else None
        self._channels: list[Channel] = []
        self._numbers = self._channel((None, control or dist.group.WORLD))
        self._is_closed = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        if store is not None:
            self._heart.start()

    # --- facts, as JSON ---------------------------------------------------------------------------

    def gather_facts(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's facts, by rank. Facts are plain JSON values; all ranks must call.

        Waits for as long as a slower rank needs, but not for one that shows no sign of life.
        """
        if self._store is None:
            return [facts]
        name = self._next_conversation()
        self._store.set(f"{name}/{self.rank}", json.dumps(facts))
        return [json.loads(self._await(f"{name}/{rank}", rank)) for rank in range(self.world_size)]

    def barrier(self) -> None:
        """Wait until all ranks are here, for as long as a slow one needs. All ranks must call."""
        self.gather_facts({})

    def main_only(self, act: Callable[[], Result]) -> Result:
        """Run `act` on the main process and return its (JSON) result on every rank.

        The others wait without a collective timeout. A ForgeError in `act` is raised on all ranks.
        """
        if self._store is None:
            return act()
        name = self._next_conversation()
        if not self.is_main:
            answer = json.loads(self._await(name, 0))
            if "failure" in answer:
                raise RankFailure(answer["failure"], SEE_THE_OTHER)
            if "problems" in answer:
                raise ForgeError.of(Problem(*fields) for fields in answer["problems"])
            return answer["result"]
        try:
            result = act()
        except ForgeError as error:
            self._store.set(name, json.dumps({"problems": _as_json(error)}))
            raise
        except BaseException as error:
            self._store.set(name, json.dumps({"failure": f"the main process failed: {error!r}"}))
            raise
        self._store.set(name, json.dumps({"result": result}))
        return result

    def together(self, act: Callable[[], Result]) -> Result:
        """Run `act` on every rank; if it fails with a ForgeError anywhere, it fails everywhere.

        Problems that all ranks have alike are raised once; those of some name their rank.
        """
        if self._store is None:
            return act()
        result, problems = None, []
        try:
            result = act()
        except ForgeError as error:
            problems = _as_json(error)
        facts = self.gather_facts({"problems": problems, "host": platform.node()})
        by_rank = [fact["problems"] for fact in facts]
        if not any(by_rank):
            return result  # type: ignore[return-value]
        if all(problems == by_rank[0] for problems in by_rank):
            raise ForgeError.of(Problem(*fields) for fields in by_rank[0])
        raise ForgeError.of(
            Problem(found, fix, f"rank {rank} ({fact['host']})" + (where and f": {where}"))
            for rank, fact in enumerate(facts)
            for found, fix, where in fact["problems"]
        )

    def post(self, key: str, value: str = "") -> None:
        """Post a value that others read by `wait_for`. May be called from any thread."""
        if self._store is not None:
            self._store.set(f"forge/posted/{key}/{self.rank}", value)

    def wait_for(self, key: str, rank: int) -> str:
        """What `rank` posts under `key`, for any thread. Raises RankFailure if it is gone."""
        return self._await(f"forge/posted/{key}/{rank}", rank)

    # --- numbers and tensors ----------------------------------------------------------------------

    def gather_numbers(self, values: list[float]) -> list[list[float]]:
        """Every rank's `values` (as many on each), by rank, in float64. All ranks must call.

        They travel by gloo between the CPUs, also between GPUs: no device has to be waited for.
        """
        if self._store is None:
            return [values]
        return self._numbers.all_gather(torch.tensor(values, dtype=torch.float64))().tolist()

    def sum_across(self, values: list[float]) -> list[float]:
        """The sums over all ranks of each of `values`. All ranks must call."""
        return [math.fsum(column) for column in zip(*self.gather_numbers(values), strict=True)]

    def send_from_main_(self, named: Mapping[str, torch.Tensor]) -> None:
        """Give the main process's tensors to all, in place; anywhere, of any dtype. All must call.

        named: the same names and shapes on all ranks.
        """
        if self._store is None:
            return
        for names in _in_batches(named):
            flat = torch.cat([_as_bytes(named[name]) for name in names])
            for piece in flat.split(MESSAGE_BYTES):
                self._numbers.send_from_main_(piece, names[0])
            sizes = [named[name].nbytes for name in names]
            for name, part in zip(names, flat.split(sizes), strict=True):
                if not self.is_main:
                    tensor = named[name]
                    tensor.data.copy_(part.clone().view(tensor.dtype).view(tensor.shape))

    def open_channel(self) -> Channel:
        """A new channel for bulk data. All ranks must call; it is closed when the run ends."""
        groups = (self._new_group(), self._new_group()) if self.world_size > 1 else (None, None)
        return self._channel(groups)

    def _channel(self, groups: tuple[Group, Group]) -> Channel:
        number = len(self._channels)
        sealing = Sealing(self._session, self.rank, number) if self._session else None
        self._channels.append(Channel(self.rank, self.world_size, groups, sealing))
        return self._channels[-1]

    def own_group(self) -> dist.ProcessGroup:
        """A new group of this rank alone. Needs no other rank."""
        group = dist.new_group([self.rank], backend="gloo", use_local_synchronization=True)
        assert isinstance(group, dist.ProcessGroup)
        return group

    @contextlib.contextmanager
    def wire(self) -> Iterator[dist.ProcessGroup]:
        """A group for `send` and `recv` between two ranks, to measure links. All ranks must call.

        What one sends, the other must receive, in the same order and size.
        """
        group = self._new_group()
        yield group
        dist.destroy_process_group(group)

    def _new_group(self) -> dist.ProcessGroup:
        timeout = datetime.timedelta(seconds=self._peer_timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)
        assert isinstance(group, dist.ProcessGroup)
        return group

    # --- signs of life ----------------------------------------------------------------------------

    def announce_failure(self) -> None:
        """Let the others know that this rank has failed, so that none waits for a sign of life."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store may be what has failed
                self._store.set(f"forge/failed/{self.rank}", "")

    def close(self) -> None:
        """Show no more signs of life; no thread of ours must outlive the process group."""
        self._is_closed.set()
        for channel in self._channels:
            channel.close()
        if self._heart.is_alive():
            self._heart.join(timeout=GOODBYE_S)

    def leave(self) -> None:
        """Say goodbye: the main process, which may serve the store, waits a few seconds for all."""
        self.close()
        store = self._store
        if store is None:
            return
        with contextlib.suppress(RuntimeError):  # the main process, or the store, is gone already
            if not self.is_main:
                return store.set(f"forge/left/{self.rank}", "")
            others = [f"forge/left/{rank}" for rank in range(1, self.world_size)]
            wait_for(lambda: store.check(others), GOODBYE_S)

    def _next_conversation(self) -> str:
        # Every rank makes the same calls in the same order, so a counter names the conversation.
        self._conversations += 1
        return f"forge/{self._conversations}"

    def _await(self, key: str, rank: int) -> str:
        """The value that `rank` will set, as soon as it is there."""
        store, alive, beat, seen_at = self._store, f"forge/alive/{rank}", b"", time.monotonic()
        assert store is not None
        try:
            for _ in pauses():
                if store.check([key]):
                    break
                if store.check([f"forge/failed/{rank}"]):
                    raise RankFailure(f"lost a peer: rank {rank} has failed", SEE_THE_OTHER)
                last = store.get(alive) if store.check([alive]) else b""
                silent_s = time.monotonic() - seen_at
                if last != beat:
                    beat, seen_at = last, time.monotonic()
                elif silent_s > max(self._peer_timeout_s, 3 * HEARTBEAT_S):
                    found = f"rank {rank} has shown no sign of life for {silent_s:.0f} s"
                    raise RankFailure(f"lost a peer: {found}", SEE_THE_OTHER)
            return store.get(key).decode()
        except (dist.DistError, RuntimeError) as error:
            found = "lost the main process: its store does not answer any more"
            found = f"{found} ({str(error).splitlines()[0]})"
            raise RankFailure(found, SEE_THE_OTHER) from error

    def _beat(self) -> None:
        """Show the others, from a thread of its own, that this process lives while it works."""
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # the store has ended, and so will the run
            for count in itertools.count():
                self._store.set(f"forge/alive/{self.rank}", str(count))
                if self._is_closed.wait(HEARTBEAT_S):
                    return


def _in_batches(named: Mapping[str, torch.Tensor]) -> Iterator[list[str]]:
    """Names of tensors that travel in one message, or one after the other if one is larger."""
    names, size = list[str](), 0
    for name, tensor in named.items():
        if names and size + tensor.nbytes > MESSAGE_BYTES:
            yield names
            names, size = [], 0
        names.append(name)
        size += tensor.nbytes
    if names:
        yield names


def _as_bytes(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().cpu().contiguous().view(-1).view(torch.uint8)


def _as_json(error: ForgeError) -> list[list[str]]:
    """An error's problems, as other ranks are given them."""
    return [[problem.found, problem.fix, problem.where] for problem in error.problems]
