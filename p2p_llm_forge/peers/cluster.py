"""How a process finds its peers, and all that peers do together: the only caller of collectives.

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
import os
import platform
import socket
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import partial
from importlib.metadata import version
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from p2p_llm_forge import __version__
from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.addresses import address_of, judge_name, judge_public, resolve
from p2p_llm_forge.peers.findings import Refused, failure, refuse_failures
from p2p_llm_forge.peers.rendezvous import Place, meet
from p2p_llm_forge.peers.secret import read_secret

Begun = TypeVar("Begun")
Result = TypeVar("Result")

MPI_WORLD_SIZES = ("PMI_SIZE", "OMPI_COMM_WORLD_SIZE", "MV2_COMM_WORLD_SIZE")
# How gloo and NCCL say, in RuntimeErrors, that a peer is gone (torch 2.13).
LOST_PEER_WORDS = ("onnection closed", "onnection reset", "onnection refused", "imed out", "NCCL")
SAME_VERSIONS = ("torch", "transformers", "accelerate", "forge")
GOODBYE_S = 3.0
HEARTBEAT_S = 1.0
SHORTEST_PAUSE_S, LONGEST_PAUSE_S = 0.001, 0.2  # between looks at the store


@dataclass(frozen=True)
class Launch:
    """One process's place in the launch: what its launcher, or the user by hand, has promised."""

    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
    local_world_size: int = 1
    master_addr: str | None = None
    master_port: int | None = None
    is_elastic: bool = False  # torchrun starts it again, perhaps with other peers, when it fails

    def environ(self) -> dict[str, str]:
        """The launch as torch and Accelerate expect to find it; nothing for a process alone."""
        if self.world_size == 1:
            return {}
        return {
            "RANK": str(self.rank),
            "WORLD_SIZE": str(self.world_size),
            "LOCAL_RANK": str(self.local_rank),
            "LOCAL_WORLD_SIZE": str(self.local_world_size),
            "MASTER_ADDR": str(self.master_addr),
            "MASTER_PORT": str(self.master_port),
        }


def read_launch(config: TrainConfig, environ: Mapping[str, str]) -> Launch:
    """The launch as `accelerate launch`, torchrun, notebook_launcher or the four flags describe it.

    Raises ForgeError where flags and environment disagree, where they are incomplete, and for the
    launch that looks distributed but starts strangers: Accelerate (1.15) starts one plain process
    per machine for `distributed_type: MULTI_CPU` without MPI, with MASTER_ADDR but no RANK.
    """
    by_hand = {
        "--rank": config.rank,
        "--world-size": config.world_size,
        "--master-addr": config.master_addr,
        "--master-port": config.master_port,
    }
    given = {name: value for name, value in by_hand.items() if value is not None}
    if given:
        if config.world_size == 1:
            return Launch()
        missing = [name for name in by_hand if name not in given]
        if missing:
            raise ForgeError(
                f"a launch by hand needs all of {', '.join(by_hand)}; missing: {', '.join(missing)}"
            )
        if "RANK" in environ and environ.get("WORLD_SIZE") != str(config.world_size):
            raise ForgeError(
                f"--world-size {config.world_size} was given, but a launcher has started "
                f"{environ.get('WORLD_SIZE')} processes: use either the launcher or --rank, "
                "--world-size, --master-addr and --master-port"
            )
        assert config.rank is not None and config.world_size is not None
        if not 0 <= config.rank < config.world_size:
            raise ForgeError(
                f"--rank {config.rank} is not one of the {config.world_size} ranks of "
                f"--world-size: use 0 to {config.world_size - 1}"
            )
        return Launch(config.rank, config.world_size, 0, 1, config.master_addr, config.master_port)
    if "RANK" in environ:
        is_elastic = int(environ.get("TORCHELASTIC_MAX_RESTARTS", "0")) > 0
        if is_elastic and environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
            # Seen with torch 2.13: after a restart peers read the dead ones' addresses from it.
            raise ForgeError(
                "torchrun with --max-restarts keeps one store over all restarts, in which peers"
                " would find the addresses of those that are gone: start torchrun, on every"
                " machine, with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1 in its environment"
            )
        return Launch(
            rank=int(environ["RANK"]),
            world_size=int(environ.get("WORLD_SIZE", "1")),
            local_rank=int(environ.get("LOCAL_RANK", "0")),
            local_world_size=int(environ.get("LOCAL_WORLD_SIZE", "1")),
            master_addr=environ.get("MASTER_ADDR"),
            master_port=int(environ["MASTER_PORT"]) if environ.get("MASTER_PORT") else None,
            is_elastic=is_elastic,
        )
    if any(name in environ for name in MPI_WORLD_SIZES):
        raise ForgeError(
            "this launch comes from MPI, which is not supported: start it with torchrun, with "
            "`accelerate launch --multi_gpu`, or by hand with --rank and --world-size"
        )
    if environ.get("MASTER_ADDR"):
        raise ForgeError(
            f"MASTER_ADDR is set ({environ['MASTER_ADDR']}) but RANK is not: every process of this"
            " launch would train alone and overwrite the others.\n  `distributed_type: MULTI_CPU`"
            " in an Accelerate config does this. In the YAML, write\n      distributed_type:"
            " MULTI_GPU\n      use_cpu: true\n  (this starts real processes on CPUs too;"
            " accelerate_configs/cpu_2_processes.yaml is an example), or add --multi_gpu to"
            " `accelerate launch`.\n  To train alone on purpose: --world-size 1"
        )
    return Launch()


@dataclass(frozen=True)
class Route:
    """The way from this machine to the main process: own address and network interface."""

    address: str
    interface: str


def route_to(host: str) -> Route | None:
    """The interface that packets to `host` leave by; None when the host is this machine's loopback.

    Raises ForgeError when the name does not resolve or no route leads there.
    """
    import psutil

    try:
        family, _, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, socket.SOCK_DGRAM) as probe:
            probe.connect(target)  # UDP: chooses the route, sends nothing
            own = probe.getsockname()[0]
    except OSError as error:
        raise ForgeError(
            f"no way to the main process at {host} ({error}): check the address "
            "(main_process_ip, --master-addr) and that this machine is on its network"
        ) from error
    for interface, addresses in psutil.net_if_addrs().items():
        if any(entry.address.split("%")[0] == own for entry in addresses):
            return None if own.startswith("127.") or own == "::1" else Route(own, interface)
    return None


def choose_interface(launch: Launch, environ: Mapping[str, str]) -> dict[str, str]:
    """GLOO_SOCKET_IFNAME and NCCL_SOCKET_IFNAME for the route to the main process.

    Gloo (torch 2.13) otherwise binds the address that the hostname resolves to, which on many
    machines is 127.0.0.1, where no peer can reach it. What the user has set is kept; empty where
    there is nothing to choose.
    """
    if launch.world_size == 1 or launch.local_world_size == launch.world_size:
        return {}
    route = route_to(launch.master_addr or "127.0.0.1")
    names = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
    return {name: environ.get(name, route.interface) for name in names} if route else {}


def choose_place(config: TrainConfig, launch: Launch, interface: Mapping[str, str]) -> Place | None:
    """Where this process takes part in the meeting; None for a process alone.

    Raises ForgeError for addresses that cannot bring machines together, and for public ones.
    """
    if launch.world_size == 1:
        return None
    host, port = launch.master_addr or "127.0.0.1", launch.master_port or 29500
    machines, own = launch.world_size // launch.local_world_size, None
    if machines > 1:
        name = interface.get("GLOO_SOCKET_IFNAME") or os.environ.get("GLOO_SOCKET_IFNAME")
        own = address_of(name.split(",")[0]) if name else None
        listening = [*resolve(host), *([own] if own else [])]
        refuse_failures(
            [*judge_name(host, machines), *judge_public(listening, config.allow_public_address)]
        )
    return Place(
        launch.rank,
        launch.world_size,
        launch.local_world_size,
        host,
        port,
        own,
        config.peer_timeout,
        read_secret(config.cluster_secret_file),
    )


def choose_threads(config: TrainConfig, launch: Launch, environ: Mapping[str, str]) -> int:
    """CPU threads for this process: its share of the machine's cores unless the user chose.

    Launchers export OMP_NUM_THREADS=1 for their own caution, so a 1 is taken as theirs; whoever
    wants one thread says `--cpu-threads 1`.
    """
    if config.cpu_threads:
        return config.cpu_threads
    if (
        environ.get("OMP_NUM_THREADS", "1").isdigit()
        and int(environ.get("OMP_NUM_THREADS", "1")) > 1
    ):
        return int(environ["OMP_NUM_THREADS"])
    cores = (
        len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    )
    return max(1, cores // launch.local_world_size)


class Wire:
    """Tensors (on the CPU) from one rank to another, in a process group of their own.

    What one sends, the other must receive, in the same order and size; both return at once and
    `.wait()` says when it is done. Raises RuntimeError there after --peer-timeout.
    """

    def __init__(self, group: dist.ProcessGroup) -> None:
        self._group = group

    def send(self, tensor: torch.Tensor, to: int) -> dist.Work:
        """Hand the tensor to rank `to`; it must not change until this is done."""
        work = dist.isend(tensor, to, group=self._group)
        assert work is not None
        return work

    def receive(self, tensor: torch.Tensor, source: int) -> dist.Work:
        """Fill the tensor with what rank `source` sends."""
        work = dist.irecv(tensor, source, group=self._group)
        assert work is not None
        return work


class Cluster:
    """All processes of a run, seen from one of them."""

    def __init__(
        self,
        launch: Launch,
        device: torch.device,
        store: dist.Store | None,
        control: dist.ProcessGroup | None = None,
        peer_timeout_s: float = 30.0,
    ) -> None:
        self.launch = launch
        self.accelerator: Any = None  # Accelerate's, once the precision is agreed on
        self.rank = launch.rank
        self.world_size = launch.world_size
        self.is_main = launch.rank == 0
        self.device = device
        self._store = store
        self._control = control
        self.is_on_gloo = control is None  # or gradients travel by another way, as NCCL
        self._peer_timeout_s = peer_timeout_s
        self._talks = 0
        self._channels: list[Channel] = []
        self._left = threading.Event()
        self._heart = threading.Thread(target=self._beat, daemon=True, name="heartbeat")
        if store is not None:
            self._heart.start()

    def gather_facts(self, facts: dict[str, Any]) -> list[dict[str, Any]]:
        """Every rank's facts, by rank. Facts are plain JSON values; all ranks must call.

        Waits for as long as a slower rank needs, but not for one that shows no sign of life.
        """
        if self._store is None:
            return [facts]
        talk = self._next_talk()
        self._store.set(f"{talk}/{self.rank}", json.dumps(facts))
        return [json.loads(self._await(f"{talk}/{rank}", rank)) for rank in range(self.world_size)]

    def main_only(self, act: Callable[[], Result]) -> Result:
        """Run `act` on the main process and return its (JSON) result on every rank.

        The others wait without a collective timeout. A ForgeError in `act` is raised on all ranks.
        """
        if self._store is None:
            return act()
        talk = self._next_talk()
        if not self.is_main:
            answer = json.loads(self._await(talk, 0))
            if "error" in answer:
                raise ForgeError(answer["error"])
            return answer["result"]
        try:
            result = act()
        except BaseException as error:
            told = (
                str(error)
                if isinstance(error, ForgeError)
                else f"the main process failed: {error!r}"
            )
            self._store.set(talk, json.dumps({"error": told}))
            raise
        self._store.set(talk, json.dumps({"result": result}))
        return result

    def together(self, act: Callable[[], Result]) -> Result:
        """Run `act` on every rank; if it fails with a ForgeError anywhere, it fails everywhere.

        What all ranks say alike is said once; what only some say names them.
        """
        result, failure = None, None
        try:
            result = act()
        except ForgeError as error:
            failure = str(error)
        if self._store is None and failure is not None:
            raise ForgeError(failure)
        told = self.gather_facts({"failure": failure, "host": platform.node()})
        failures = [(rank, fact) for rank, fact in enumerate(told) if fact["failure"] is not None]
        if not failures:
            return result  # type: ignore[return-value]
        if len(failures) == self.world_size and len({fact["failure"] for _, fact in failures}) == 1:
            raise ForgeError(failures[0][1]["failure"])
        raise ForgeError(
            "\n".join(f"rank {rank} ({fact['host']}): {fact['failure']}" for rank, fact in failures)
        )

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
        """A way of its own for bulk data. All ranks must call; it is closed when the run ends."""
        groups = None
        if self._store is not None:
            timeout = datetime.timedelta(seconds=self._peer_timeout_s)
            groups = tuple(dist.new_group(backend="gloo", timeout=timeout) for _ in range(2))
        self._channels.append(Channel(self.rank, self.world_size, groups))
        return self._channels[-1]

    def leave_word(self, key: str, word: str = "") -> None:
        """Leave a word for `read_word` on other ranks. May be called from any thread."""
        if self._store is not None:
            self._store.set(f"forge/word/{key}/{self.rank}", word)

    def read_word(self, key: str, rank: int) -> str:
        """What `rank` leaves under `key`, as soon as it does. May be called from any thread.

        Raises ForgeError when the rank shows no sign of life meanwhile.
        """
        return self._await(f"forge/word/{key}/{rank}", rank)

    @contextlib.contextmanager
    def wire(self) -> Iterator[Wire]:
        """Bytes between any two ranks, for measuring the network. All ranks must call."""
        timeout = datetime.timedelta(seconds=self._peer_timeout_s)
        group = dist.new_group(backend="gloo", timeout=timeout)
        yield Wire(group)
        dist.destroy_process_group(group)

    def _next_talk(self) -> str:
        # Every rank makes the same calls in the same order, so a counter names the conversation.
        self._talks += 1
        return f"forge/{self._talks}"

    def _await(self, key: str, rank: int) -> str:
        """The value that `rank` will set, as soon as it is there."""
        assert self._store is not None
        pause, pulse, seen_at = SHORTEST_PAUSE_S, b"", time.monotonic()
        try:
            while not self._store.check([key]):
                time.sleep(pause)
                pause = min(2 * pause, LONGEST_PAUSE_S)
                if self._store.check([f"forge/gone/{rank}"]):
                    raise _lost(f"lost a peer: rank {rank} has failed. Its own output says why")
                alive = f"forge/alive/{rank}"
                beat = self._store.get(alive) if self._store.check([alive]) else b""
                if beat != pulse:
                    pulse, seen_at = beat, time.monotonic()
                elif time.monotonic() - seen_at > max(self._peer_timeout_s, 3 * HEARTBEAT_S):
                    raise _lost(
                        f"lost a peer: rank {rank} has shown no sign of life for "
                        f"{time.monotonic() - seen_at:.0f} s. Its own output says why"
                    )
            return self._store.get(key).decode()
        except (dist.DistError, RuntimeError) as error:
            raise _lost(
                "lost the main process: its store does not answer any more "
                f"({str(error).splitlines()[0]}). Its own output says why it ended"
            ) from error

    def _beat(self) -> None:
        """Show the others, from a thread of its own, that this process lives while it works."""
        assert self._store is not None
        with contextlib.suppress(RuntimeError):  # the store has ended, and so will the run
            for count in itertools.count():
                self._store.set(f"forge/alive/{self.rank}", str(count))
                if self._left.wait(HEARTBEAT_S):
                    return

    def say_gone(self) -> None:
        """Tell the others that this rank has failed, so that none waits for a sign of life."""
        if self._store is not None:
            with contextlib.suppress(RuntimeError):  # the store may be what has failed
                self._store.set(f"forge/gone/{self.rank}", "")

    def fall_silent(self) -> None:
        """Show no more signs of life; no thread of ours must outlive the process group."""
        self._left.set()
        for channel in self._channels:
            channel.close()
        if self._heart.is_alive():
            self._heart.join(timeout=GOODBYE_S)

    def leave(self) -> None:
        """Say goodbye: the main process, which may serve the store, goes last.

        A peer that has died says nothing, so the main process waits for a few seconds only.
        """
        self.fall_silent()
        if self._store is None:
            return
        deadline = time.monotonic() + GOODBYE_S
        with contextlib.suppress(RuntimeError):  # the main process, or the store, is gone already
            if not self.is_main:
                self._store.set(f"forge/left/{self.rank}", "")
                return
            left = [f"forge/left/{rank}" for rank in range(1, self.world_size)]
            while not self._store.check(left) and time.monotonic() < deadline:
                time.sleep(SHORTEST_PAUSE_S)

    def failure(self, error: BaseException) -> ForgeError | None:
        """An error of a library or the machine as this rank's message; None if it is a bug.

        Every rank prints its own: the one that has failed says why, the others whom they lost.
        """
        where, text = f"rank {self.rank} ({platform.node()})", str(error).strip()
        first_line = text.splitlines()[0] if text else type(error).__name__
        if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
            told = (
                f"{where} is out of memory: lower --micro-batch-size (the batch stays the same), or"
                f" add --gradient-checkpointing ({first_line})"
            )
        elif isinstance(error, dist.DistError) or any(word in text for word in LOST_PEER_WORDS):
            told = (
                f"{where} lost a peer: no exchange came about within --peer-timeout, or the peer"
                f" ended; what it printed says why. Go on with --resume auto ({first_line})"
            )
        elif isinstance(error, OSError):
            told = f"{where} could not read or write: {error}. Mend it, then --resume auto"
        else:
            return None
        failure = ForgeError(told)
        failure.status, failure.is_of_this_rank = 1, True
        return failure


def _arrived(work: Any, received: torch.Tensor, sent: torch.Tensor) -> torch.Tensor:
    """What an exchange has brought, when it is over; `sent` has to stay in memory until then."""
    work.wait()
    return received


def _lost(told: str) -> ForgeError:
    """The end of a rank that others have left: status 1, as when an exchange breaks."""
    error = ForgeError(told)
    error.status, error.is_of_this_rank = 1, True
    return error


class Channel:
    """Exchanges of flat tensors between all ranks, by gloo between the CPUs, and their meter.

    It has two process groups and two threads of its own, so exchanges run while the main thread
    computes or talks otherwise, and one begins while the one before is being finished. Each kind of
    call belongs to one of the groups: the order of its own calls must be the same on every rank,
    how they mix with those of the other need not.
    """

    def __init__(
        self,
        rank: int,
        world_size: int,
        groups: tuple[dist.ProcessGroup, dist.ProcessGroup] | None,
    ) -> None:
        self.rank, self.world_size = rank, world_size
        self._dealing = groups[0] if groups else None
        self._sharing = groups[1] if groups else None
        self._beginning, self._finishing = (
            ThreadPoolExecutor(max_workers=1, thread_name_prefix=f"{what} exchanges")
            for what in ("beginning", "finishing")
        )
        self._bytes_sent, self._count_lock = 0, threading.Lock()

    @property
    def bytes_sent(self) -> int:
        """Payload that has left this rank."""
        return self._bytes_sent

    def count(self, sent: int) -> None:
        """Add bytes that leave this rank. May be called from any thread."""
        with self._count_lock:
            self._bytes_sent += sent

    def deal(self, rows: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to send row r to rank r. Returns what waits for the rows that all ranks send here.

        rows: (ranks, n), any dtype, contiguous, on the CPU; the same shape comes back, by rank.
        """
        if self._dealing is None:
            return lambda: rows
        received = torch.empty_like(rows)
        work = dist.all_to_all_single(received, rows, group=self._dealing, async_op=True)
        self.count((self.world_size - 1) * rows[0].nbytes)
        return partial(_arrived, work, received, rows)

    def share(self, row: torch.Tensor) -> Callable[[], torch.Tensor]:
        """Begin to send `row` to all. Returns what waits for the rows of all ranks, (ranks, n).

        row: (n), any dtype, contiguous, on the CPU.
        """
        if self._sharing is None:
            return lambda: row.unsqueeze(0)
        rows = row.new_empty((self.world_size, *row.shape))
        work = dist.all_gather(list(rows), row, group=self._sharing, async_op=True)
        self.count((self.world_size - 1) * row.nbytes)
        return partial(_arrived, work, rows, row)

    def sum_(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks, in place (a ring: 2 (ranks - 1) / ranks of its size are sent)."""
        if self._sharing is not None:
            dist.all_reduce(values, group=self._sharing)
            self.count(2 * (self.world_size - 1) * values.nbytes // self.world_size)
        return values

    def in_background(
        self, begin: Callable[[], Begun], finish: Callable[[Begun], Result]
    ) -> Future[Result]:
        """Run `begin` in the first thread and then `finish`, on what it returned, in the second.

        Each after those that were given before. `begin` may deal, `finish` may share and sum.
        """
        begun = self._beginning.submit(begin)
        return self._finishing.submit(lambda: finish(begun.result()))

    def close(self) -> None:
        """Drop what has not begun; returns when what has begun is over."""
        for thread in (self._beginning, self._finishing):
            thread.shutdown(wait=True, cancel_futures=True)


@contextlib.contextmanager
def join(config: TrainConfig) -> Iterator[Cluster]:
    """Meet the peers of this launch; leave them at the end, so that a notebook can train again."""
    from accelerate.utils import patch_environment

    launch = read_launch(config, os.environ)
    interface = choose_interface(launch, os.environ)
    place = choose_place(config, launch, interface)
    threads = choose_threads(config, launch, os.environ)
    # Accelerate and torch read these; whatever they were before is put back at the end.
    environ = {**launch.environ(), **interface, "OMP_NUM_THREADS": str(threads)}
    with patch_environment(**environ), _own_accelerator_state():
        if interface and launch.local_rank == 0:
            name = interface["GLOO_SOCKET_IFNAME"]
            print(f"rank {launch.rank}: reaching the peers by interface {name}", flush=True)
        store = meet(place, os.environ) if place else None
        cluster = _meet(config, launch, threads, store)
        try:
            yield cluster
        except BaseException as error:
            if isinstance(error, ForgeError) and not error.is_of_this_rank:
                cluster.leave()  # what all ranks know, all have to hear
            else:
                cluster.say_gone()
            raise
        finally:
            cluster.fall_silent()
        cluster.leave()


def _meet(config: TrainConfig, launch: Launch, threads: int, store: dist.Store | None) -> Cluster:
    from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState

    use_cpu = config.cpu or not _has_usable_accelerator(launch)
    backend = None if config.backend == "auto" else config.backend
    if backend == "nccl" and use_cpu:
        raise ForgeError(
            "--backend nccl needs an NVIDIA GPU and none was found: use --backend gloo"
        )
    try:
        options: dict[str, Any] = {}
        if store is not None:
            options = {"store": store, "rank": launch.rank, "world_size": launch.world_size}
            options["timeout"] = datetime.timedelta(seconds=config.peer_timeout)
            options |= {"backend": backend} if backend else {}
        state = PartialState(cpu=use_cpu, **options)
    except (dist.DistError, RuntimeError, ValueError) as error:
        raise ForgeError(
            f"rank {launch.rank} could not meet the {launch.world_size} processes at "
            f"{launch.master_addr}:{launch.master_port}: {str(error).splitlines()[0]}\n"
            "  Check that every machine was started, with the same --world-size and address, and "
            "that a firewall lets the port through"
        ) from error
    if state.num_processes != launch.world_size:
        raise ForgeError(
            f"the launch promises {launch.world_size} processes, Accelerate found "
            f"{state.num_processes}: training would run as strangers. Start it with torchrun or "
            "with `accelerate launch --multi_gpu`"
        )
    if use_cpu:
        torch.set_num_threads(threads)
    control = None
    if store is not None and state.backend != "gloo":
        control = dist.new_group(backend="gloo", timeout=options["timeout"])
    cluster = Cluster(launch, state.device, store, control, config.peer_timeout)
    try:
        precision = _agree_on_precision(config, cluster, state.backend)
    except ForgeError:
        cluster.leave()
        raise
    cluster.accelerator = Accelerator(
        cpu=use_cpu,
        mixed_precision=precision,
        project_dir=config.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )
    return cluster


def _has_usable_accelerator(launch: Launch) -> bool:
    """Whether to train on a GPU (or another accelerator) and not on the CPU."""
    if os.environ.get("ACCELERATE_USE_CPU", "false").lower() in ("1", "true", "yes"):
        return False
    if not torch.accelerator.is_available():
        return False
    if launch.world_size == 1:
        return True
    # Accelerate (1.15) starts strangers for several processes on Apple's GPUs, which have no
    # collectives, and gives one GPU to two processes, which NCCL refuses: then it is the CPU.
    device = torch.accelerator.current_accelerator()
    has_collectives = device is not None and device.type != "mps"
    return has_collectives and torch.accelerator.device_count() >= launch.local_world_size


def has_bf16(device: torch.device) -> bool:
    """Whether the device multiplies bfloat16 matrices in hardware."""
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    return torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()


def _agree_on_precision(config: TrainConfig, cluster: Cluster, backend: str | None) -> str:
    """The precision all ranks compute in; refuses peers that differ in what must be equal.

    `auto` follows the launcher's config; without a launcher it is bf16 where every rank has it.
    """
    wanted: str = config.mixed_precision
    if wanted == "auto":
        wanted = os.environ.get("ACCELERATE_MIXED_PRECISION", "auto")
    facts = {
        "precision": wanted,
        "backend": backend,
        "bf16": has_bf16(cluster.device),
        "recipe": config.shared_settings(),
        **versions(),
        "host": platform.node(),
    }
    told = cluster.gather_facts(facts)
    _refuse_different(told)
    if wanted == "auto":
        return "bf16" if all(fact["bf16"] for fact in told) else "no"
    if wanted not in ("no", "bf16", "fp16"):
        raise ForgeError(
            f"mixed precision {wanted} comes from the launcher's config; use no, bf16 or fp16"
        )
    if wanted == "fp16" and cluster.device.type == "cpu":
        raise ForgeError(
            "fp16 needs a GPU, and this run is on the CPU: use --mixed-precision bf16 or no"
        )
    return wanted


def versions() -> dict[str, str]:
    """The versions that decide what is computed, without importing anything for it."""
    libraries = {name: version(name).split("+")[0] for name in ("transformers", "accelerate")}
    torch_version = torch.__version__.split("+")[0]
    return {"torch": torch_version, **libraries, "forge": __version__}


def _refuse_different(told: list[dict[str, Any]]) -> None:
    """Raise ForgeError naming each rank whose settings or versions differ from rank 0's."""
    problems = []
    for rank, fact in enumerate(told):
        where = f"rank {rank} ({fact['host']})"
        for key in ("precision", "backend", *SAME_VERSIONS):
            if fact[key] != told[0][key]:
                problems.append(f"{where} has {key} {fact[key]}, rank 0 has {told[0][key]}")
        for key, value in fact["recipe"].items():
            if value != told[0]["recipe"].get(key):
                name = key.replace("_", "-")
                problems.append(
                    f"{where} was started with --{name} {value}, rank 0 with"
                    f" {told[0]['recipe'].get(key)}"
                )
    if problems:
        raise Refused(
            failure(
                "alike",
                "the peers of a run must be started alike:\n  " + "\n  ".join(problems),
                "make them equal (a machine with a GPU joins one without by --backend gloo on all)",
            )
        )


@contextlib.contextmanager
def _own_accelerator_state() -> Iterator[None]:
    """Leave Accelerate's process-wide state as it was found."""
    from accelerate.state import AcceleratorState, GradientState, PartialState

    if PartialState._shared_state:
        raise ForgeError(
            "an Accelerator exists in this process already: restart the notebook's kernel, and do "
            "not make one before train()"
        )
    try:
        yield
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
