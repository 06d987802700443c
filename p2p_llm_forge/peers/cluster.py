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
from collections.abc import Callable, Iterator
from dataclasses import replace
from types import NoneType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from p2p_llm_forge.errors import ForgeError, Problem, in_one_line
from p2p_llm_forge.files import parse_json
from p2p_llm_forge.peers.channel import Channel
from p2p_llm_forge.peers.findings import as_sent_by, problems_of_peer
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.rank_failure import SEE_THE_OTHER, RankFailure
from p2p_llm_forge.polling import pauses, wait_for

Result = TypeVar("Result")

GOODBYE_S = 3.0
HEARTBEAT_S = 1.0


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
        self._channels: list[Channel] = []
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
        answers = (self._await(f"{name}/{rank}", rank) for rank in range(self.world_size))
        return [_facts_of(f"rank {rank}", text, facts) for rank, text in enumerate(answers)]

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
            return _result_of_main(self._await(name, 0))
        try:
            result = act()
        except ForgeError as error:
            self._store.set(name, json.dumps({"problems": _as_json(error)}))
            raise
        except BaseException as error:
            self._store.set(name, json.dumps({"failure": repr(error)}))
            raise
        self._store.set(name, json.dumps({"result": result}))
        return result

    def together(self, act: Callable[[], Result]) -> Result:
        """Run `act` on every rank; if it fails with a ForgeError anywhere, it fails everywhere.

        Problems that all ranks have alike are raised once; those of some name their rank.
        """
        if self._store is None:
            return act()
        result, problems, error = None, [], None
        try:
            result = act()
        except ForgeError as caught:
            error, problems = caught, _as_json(caught)
        facts = self.gather_facts({"problems": problems, "host": platform.node()})
        by_rank = [fact["problems"] for fact in facts]
        if not any(by_rank):
            return result  # type: ignore[return-value]
        if all(problems == by_rank[0] for problems in by_rank):
            assert error is not None
            raise error
        named: list[Problem] = []
        for rank, fact in enumerate(facts):
            name = f"rank {rank} ({fact['host']})"
            with as_sent_by(name):
                of_rank = problems_of_peer("" if rank == self.rank else name, fact["problems"])
            for one in of_rank:
                named.append(replace(one, where=f"{name}: {one.where}" if one.where else name))
        raise ForgeError.of(named)

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
        own = torch.tensor(values, dtype=torch.float64)
        gathered = [torch.empty_like(own) for _ in range(self.world_size)]
        dist.all_gather(gathered, own, group=self._control)
        return [tensor.tolist() for tensor in gathered]

    def sum_across(self, values: list[float]) -> list[float]:
        """The sums over all ranks of each of `values`. All ranks must call."""
        return [math.fsum(column) for column in zip(*self.gather_numbers(values), strict=True)]

    def open_channel(self) -> Channel:
        """A new channel for bulk data. All ranks must call; it is closed when the run ends."""
        groups = (self._new_group(), self._new_group()) if self.world_size > 1 else (None, None)
        self._channels.append(Channel(self.rank, self.world_size, groups))
        return self._channels[-1]

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


def _as_json(error: ForgeError) -> list[dict[str, str]]:
    """An error's problems, as other ranks are given them."""
    return [{"found": one.found, "fix": one.fix, "where": one.where} for one in error.problems]


def _facts_of(by: str, text: str, own: dict[str, Any]) -> dict[str, Any]:
    """What a rank has posted where this one posted `own`; its texts are on one line each."""
    with as_sent_by(by):
        facts = parse_json(text)
        if not isinstance(facts, dict) or facts.keys() != own.keys():
            raise ValueError("other fields than ours")
        for key, value in facts.items():
            kinds = {_kind(value), _kind(own[key])}
            if len(kinds - {NoneType}) > 1:
                raise ValueError(f"{key} is another kind of value than ours")
        return {k: in_one_line(v, 800) if isinstance(v, str) else v for k, v in facts.items()}


def _kind(value: Any) -> type:
    return float if type(value) is int else type(value)


def _result_of_main(text: str) -> Any:
    """What the main process has made for all. Raises what it has raised, as its message."""
    with as_sent_by("rank 0"):
        answer = parse_json(text)
        if not isinstance(answer, dict) or not answer.keys() & {"failure", "problems", "result"}:
            raise ValueError("neither a result nor an error")
        if "failure" in answer:
            found = f"the main process failed: {in_one_line(answer['failure'], 800)}"
            raise RankFailure(found, SEE_THE_OTHER)
        if "problems" in answer:
            raise ForgeError.of(problems_of_peer("rank 0", answer["problems"]))
        return answer["result"]
