"""All that peers do together: the only caller of collectives, with channel.py for bulk data.

Numbers travel by `torch.distributed` collectives, facts and waiting by the launch's key-value store
as JSON. Waiting on the store has no collective timeout, so the main process may work for hours
(prepare a corpus, write a large checkpoint) while the others wait. Nothing is ever pickled.
"""

from __future__ import annotations

import contextlib
import datetime
import json
import platform
import re
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import CancelledError
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from types import NoneType
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from p2p_llm_forge.errors import ForgeError, Problem, in_one_line, plain
from p2p_llm_forge.files import parse_json
from p2p_llm_forge.peers.channel import Channel
from p2p_llm_forge.peers.file_exchange import FileExchange, Place, listen
from p2p_llm_forge.peers.findings import as_sent_by, problems_of_peer
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.liveness import FAILED, LEFT, Liveness
from p2p_llm_forge.peers.rank_failure import SEE_THE_OTHER, RankFailure, explain
from p2p_llm_forge.peers.routes import own_address
from p2p_llm_forge.peers.sealing import Sealing
from p2p_llm_forge.peers.store import StoreLost
from p2p_llm_forge.polling import pauses

Result = TypeVar("Result")

Group = dist.ProcessGroup | None

EXCHANGE_TIMEOUT = datetime.timedelta(days=1)  # a slow peer is waited for: see liveness.py
LONGEST_FACT = 4096  # characters of a text among facts: a path can have so many
LINE_BREAK = re.compile(r"[\n\t]")  # all that `plain` leaves of them
MESSAGE_BYTES = 2**24  # of tensors that the main process sends at once


class Cluster:
    """All processes of a run, seen from one of them.

    peers: None for a process alone; the cluster ends it. control: gloo's group where gradients
    travel by NCCL.
    """

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        peers: Liveness | None,
        control: dist.ProcessGroup | None = None,
    ) -> None:
        self.accelerator: Any = None  # Accelerate's, once the precision is agreed on
        self.launch, self.device = launch, device
        self.rank, self.world_size, self.is_main = launch.rank, launch.world_size, launch.rank == 0
        self.is_on_gloo = control is None
        self._peers, self._control = peers, control
        self._store = peers.store if peers else None
        self._conversations = 0
        self._session = self._store.session if self._store else None
        self._channels: list[Channel] = []
        self._files: FileExchange | None = None
        self._numbers = self._channel((None, control or dist.group.WORLD))

    @property
    def sends_in_plain(self) -> bool:
        """Whether gradients travel by NCCL, which no secret of ours can encrypt."""
        return self._session is not None and not self.is_on_gloo

    # --- facts, as JSON ---------------------------------------------------------------------------

    def gather_facts(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's facts, by rank. Facts are plain JSON values; all ranks must call.

        Waits for as long as a slower rank needs, but not for one that shows no sign of life. Texts
        come back as all ranks see them: see `_facts_of`. Raises ForgeError for what no rank sends,
        also where this one's own facts are not what it has written.
        """
        if self._store is None:
            return [facts]
        name, own = self._next_conversation(), json.dumps(facts)
        self._set(f"{name}/{self.rank}", own)
        by_rank = []
        for rank in range(self.world_size):
            text, by = self._await(f"{name}/{rank}", rank), f"rank {rank}"
            with as_sent_by(by):
                if rank == self.rank and text != own:
                    raise ValueError("it is not what this rank has written")
            by_rank.append(_facts_of(by, text, facts))
        return by_rank

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
            self._set(name, json.dumps({"problems": _as_json(error)}))
            raise
        except BaseException as error:
            self._set(name, json.dumps({"failure": repr(error)}))
            raise
        self._set(name, json.dumps({"result": result}))
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
            name = f"rank {rank} ({in_one_line(fact['host'])})"
            with as_sent_by(name):
                of_rank = problems_of_peer("" if rank == self.rank else name, fact["problems"])
            for one in of_rank:
                named.append(replace(one, where=f"{name}: {one.where}" if one.where else name))
        raise ForgeError.of(named)

    def post(self, key: str, value: str = "") -> None:
        """Post a value that others read by `wait_for`. May be called from any thread."""
        if self._store is not None:
            self._set(f"forge/posted/{key}/{self.rank}", value)

    def wait_for(self, key: str, rank: int, is_over: Callable[[], bool] = lambda: False) -> str:
        """What `rank` posts under `key`, for any thread. Raises LostPeer if it is gone.

        is_over: whether to wait no more, and to raise CancelledError.
        """
        return self._await(f"forge/posted/{key}/{rank}", rank, is_over)

    # --- numbers and tensors ----------------------------------------------------------------------

    def gather_numbers(self, values: list[float]) -> list[list[float]]:
        """Every rank's `values` (as many on each), by rank, in float64. All ranks must call.

        They travel by gloo between the CPUs, also between GPUs: no device has to be waited for.
        """
        if self._store is None:
            return [values]
        return self._numbers.all_gather(torch.tensor(values, dtype=torch.float64))().tolist()

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

    def open_files(self) -> FileExchange:
        """What brings files from rank to rank, once for all callers. All ranks must call.

        Closed with the cluster, and at a loss: nothing is fetched for a run that ends.
        """
        if self._files is None:
            server, own = listen(own_address()) if self._peers else (None, {})
            facts = self.gather_facts({**own, "host": platform.node()}) if server else []
            places = [Place(**fact) for fact in facts]
            timeout_s = self._peers.timeout_s if self._peers else 0.0
            self._files = FileExchange(self.rank, places, server, self._session, timeout_s)
            self._files.stand_back(self.is_exchanging)
            if self._peers:
                self._peers.on_loss.append(self._files.close)
        return self._files

    def is_exchanging(self) -> bool:
        """Whether training exchanges bulk data right now. May be asked from any thread."""
        return any(channel.is_exchanging() for channel in list(self._channels))

    def _channel(self, groups: tuple[Group, Group], ranks: list[int] | None = None) -> Channel:
        """ranks: between these alone, which it numbers from 0; by default all."""
        members, sealing = ranks or list(range(self.world_size)), None
        place = members.index(self.rank)
        if self._session:
            # Numbered alike on all ranks, of which some may lack those of a machine; and never one
            # key for two machines.
            number = sum(one.world_size == self.world_size for one in self._channels)
            name = number if ranks is None else f"{number} of {ranks}"
            sealing = Sealing(self._session, place, name)
        self._channels.append(Channel(place, len(members), groups, sealing, self.exchange))
        return self._channels[-1]

    def open_local_gather(self) -> tuple[int, int, Callable[[torch.Tensor], torch.Tensor]]:
        """This rank's number among those of its machine, how many they are, and their all-gather.

        All ranks must call. The all-gather takes (n), anywhere, of any dtype, from each of them and
        gives (ranks of the machine, n). Which ranks share a machine, their launcher says; those
        started by hand are alone.
        """
        first = self.rank - self.launch.local_rank
        facts = self.gather_facts({"first": first})
        machines = sorted({str(fact["first"]) for fact in facts})
        own_ranks, group = [self.rank], None
        for machine in machines:
            ranks = [rank for rank, fact in enumerate(facts) if str(fact["first"]) == machine]
            if len(ranks) == 1:
                continue
            made = self._new_group(ranks, None if self.is_on_gloo else "nccl")
            if self.rank in ranks:
                own_ranks, group = ranks, made
        place, size = own_ranks.index(self.rank), len(own_ranks)
        if size == 1:
            return 0, 1, lambda row: row.unsqueeze(0)
        if not self.is_on_gloo:

            def gather_on_device(row: torch.Tensor) -> torch.Tensor:
                rows = row.new_empty((size, *row.shape))
                with self.exchange():
                    dist.all_gather_into_tensor(rows, row, group=group)
                return rows

            return place, size, gather_on_device
        channel = self._channel((None, group), own_ranks)

        def gather(row: torch.Tensor) -> torch.Tensor:
            rows = channel.all_gather(_as_bytes(row))()
            return rows.view(row.dtype).to(row.device)

        return place, size, gather

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
        with self.exchange():
            yield group
        dist.destroy_process_group(group)

    def exchange(self) -> AbstractContextManager[None]:
        """What fails inside is a lost peer, whatever it says: LostPeer names who is gone."""
        return self._peers.exchange() if self._peers else nullcontext()

    def _new_group(
        self, ranks: list[int] | None = None, backend: str | None = None
    ) -> dist.ProcessGroup:
        """A new group of all ranks or of some; all must call. backend: by default gloo."""
        self.barrier()  # who connects is waited for no longer than connecting takes
        assert self._peers is not None
        if ranks is None:
            return self._peers.open(new_gloo_group)
        timeout = None if backend else EXCHANGE_TIMEOUT
        return self._peers.open(
            lambda: dist.new_group(ranks, backend=backend or "gloo", timeout=timeout)
        )

    # --- signs of life ----------------------------------------------------------------------------

    def explain(self, error: BaseException) -> ForgeError | None:
        """An error of the machine, a library or a peer as a message; None if it is a bug.

        A loss explains what came after it, wherever that surfaced.
        """
        explained, peers = explain(error, self.rank), self._peers
        if explained or peers is None or not isinstance(error, Exception):
            return explained
        if peers.loss is None and isinstance(error, RuntimeError):
            silent = [rank for rank in peers.gone() if not peers.has_left(rank)]
            return peers.blame(error) if silent else peers.loss
        return peers.loss

    def announce_failure(self) -> None:
        """Let the others know that this rank has failed, so that none waits for a sign of life."""
        if self._peers is not None:
            self._peers.leave(FAILED)

    def close(self) -> None:
        """Show no more signs of life; no thread of ours must outlive the process group."""
        for channel in self._channels:
            channel.close()
        if self._files is not None:
            self._files.close()
        if self._peers is not None:
            self._peers.close()

    def leave(self) -> None:
        """Say goodbye: the main process, which may serve the store, waits a few seconds for all."""
        for channel in self._channels:
            channel.close()
        if self._peers is not None:
            self._peers.leave(LEFT)
        self.close()

    def _next_conversation(self) -> str:
        # Every rank makes the same calls in the same order, so a counter names the conversation.
        self._conversations += 1
        return f"forge/{self._conversations}"

    def _set(self, key: str, value: str) -> None:
        assert self._store is not None
        with self.exchange():
            self._store.set(key, value)

    def _await(self, key: str, rank: int, is_over: Callable[[], bool] = lambda: False) -> str:
        """The value that `rank` will set, as soon as it is there. Raises LostPeer."""
        peers = self._peers
        assert peers is not None
        for _ in pauses():
            if is_over():
                raise CancelledError
            # In this order: who sets the value and ends has set it.
            loss, has_left = peers.loss, peers.has_left(rank)
            try:
                if peers.store.check(key):
                    return peers.store.get(key, rank)
            except StoreLost as error:
                raise peers.lose_store(error) from error
            if loss is not None:
                raise loss
            if has_left:
                raise peers.blame(RuntimeError("it has ended"))
        raise AssertionError("pauses() never ends")


def new_gloo_group() -> dist.ProcessGroup:
    """A group of all ranks; all must call. Its waits end by heartbeats, not by a timeout."""
    group = dist.new_group(backend="gloo", timeout=EXCHANGE_TIMEOUT)
    assert isinstance(group, dist.ProcessGroup)
    return group


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


def _as_json(error: ForgeError) -> list[dict[str, str]]:
    """An error's problems, as other ranks are given them."""
    return [{"found": one.found, "fix": one.fix, "where": one.where} for one in error.problems]


def _facts_of(by: str, text: str, own: dict[str, Any]) -> dict[str, Any]:
    """What a rank has posted where this one posted `own`; its texts are on one line each.

    Spaces stay as they are, and there is room for a path: commands are made of some.
    """
    with as_sent_by(by):
        facts = parse_json(text)
        if not isinstance(facts, dict) or facts.keys() != own.keys():
            raise ValueError("other fields than ours")
        for key, value in facts.items():
            kinds = {_kind(value), _kind(own[key])}
            if len(kinds - {NoneType}) > 1:
                raise ValueError(f"{key} is another kind of value than ours")
        lines = {k: plain(v, LONGEST_FACT) for k, v in facts.items() if isinstance(v, str)}
        return facts | {k: LINE_BREAK.sub(" ", line) for k, line in lines.items()}


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
