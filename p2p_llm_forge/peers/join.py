"""Joining a run: find the peers, agree on what must be alike, train, and leave."""

from __future__ import annotations

import contextlib
import datetime
import platform
from collections.abc import Callable, Iterator
from concurrent import futures
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedDataParallelKwargs, PartialState
from accelerate.state import AcceleratorState, GradientState
from accelerate.utils import patch_environment

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.peers.addresses import brief_lookups
from p2p_llm_forge.peers.cluster import EXCHANGE_TIMEOUT, Cluster, new_gloo_group
from p2p_llm_forge.peers.findings import Finding, failure, refuse_failures
from p2p_llm_forge.peers.launch import NEUTRAL, Launch, choose_threads, read_launch
from p2p_llm_forge.peers.launcher import as_asked, refuse_gpu_file
from p2p_llm_forge.peers.liveness import FAILED, GOODBYE_S, Liveness
from p2p_llm_forge.peers.machine import bf16_pays, versions
from p2p_llm_forge.peers.rank_failure import NOT_MET, LostPeer
from p2p_llm_forge.peers.rendezvous import choose_endpoint, rendezvous
from p2p_llm_forge.peers.routes import choose_interface
from p2p_llm_forge.polling import in_thread

NCCL_TIMEOUT = datetime.timedelta(minutes=10)  # torch's own; ends what _abort_collectives does not

SAME = {
    "precision": "give the same --mixed-precision on all machines",
    "backend": "give --backend gloo on all machines: a GPU then works with a CPU",
    "forge": "take the same version of this program on all machines (git pull)",
}


@contextlib.contextmanager
def join(
    config: TrainConfig, begin: Callable[[Cluster], str | None] = lambda cluster: None
) -> Iterator[Cluster]:
    """Join the peers of this launch, and leave them at the end: a notebook can train again.

    begin: called on all ranks once they have met and are alike; returns what the run that resumes
    was computed in, as far as it is known, the same on all of them.
    Raises ForgeError where the peers cannot come together, and for what fails while it is entered:
    errors of libraries and of the machine that are no bugs are raised as RankFailure.
    """
    with brief_lookups(), _joined(config, begin) as cluster:
        yield cluster


@contextlib.contextmanager
def _joined(config: TrainConfig, begin: Callable[[Cluster], str | None]) -> Iterator[Cluster]:
    launch, file = as_asked(read_launch(config))
    if not _has_usable_accelerator(launch):
        refuse_gpu_file(config, launch, file)
    interface = choose_interface(launch)
    endpoint = choose_endpoint(config, launch, interface)
    threads = choose_threads(config, launch)
    # Accelerate and torch read these; whatever they were before is put back at the end.
    environ = {**launch.environ(), **NEUTRAL, **interface, "OMP_NUM_THREADS": str(threads)}
    with patch_environment(**environ), _own_accelerator_state():
        if launch.rank == 0:
            for line in launch.ignored:
                print(f"note      {line}", flush=True)
        if interface and launch.local_rank == 0:
            name = interface["GLOO_SOCKET_IFNAME"]
            print(f"rank {launch.rank}: reaching the peers by interface {name}", flush=True)
        peers = None
        if endpoint:
            with _meeting(launch):
                store = rendezvous(endpoint)
            peers = Liveness(store, launch.rank, launch.world_size, config.peer_timeout).start()
        cluster, backend = _form_cluster(config, launch, threads, peers)
        try:
            wanted, has_bf16 = _require_alike(config, cluster, backend)
            precision = _precision(cluster, wanted, has_bf16, begin(cluster))
            cluster.accelerator = _accelerator(config, cluster, precision)
            yield cluster
        except BaseException as error:
            explained = cluster.explain(error)
            if explained is not None and not explained.is_of_this_rank:
                cluster.leave()  # the others raise it too, and may still wait for an answer
            else:
                cluster.announce_failure()
            if explained is None or explained is error:
                raise
            raise explained from error
        else:
            cluster.leave()
        finally:
            cluster.close()


@contextlib.contextmanager
def _meeting(launch: Launch) -> Iterator[None]:
    """Say to an elastic launcher that what fails inside may go well the next time."""
    try:
        yield
    except ForgeError as error:
        if launch.is_elastic and not launch.by_torchrun and error.status == ForgeError.status:
            error.status = NOT_MET
        raise


def _form_cluster(
    config: TrainConfig, launch: Launch, threads: int, peers: Liveness | None
) -> tuple[Cluster, str | None]:
    """The ranks, connected, and the backend that carries gradients."""
    use_cpu = config.cpu or not _has_usable_accelerator(launch)
    if config.backend == "nccl" and use_cpu:
        found = "--backend nccl needs an NVIDIA GPU and none was found"
        raise ForgeError(found, "use --backend gloo")
    options: dict[str, Any] = {"cpu": use_cpu}
    if peers is not None:
        options |= {"rank": launch.rank, "world_size": launch.world_size}
        options |= {"timeout": EXCHANGE_TIMEOUT if use_cpu else NCCL_TIMEOUT}
        options |= {} if config.backend == "auto" else {"backend": config.backend}
    if use_cpu:
        torch.set_num_threads(threads)
    control = None
    try:
        state = _start_process_group(launch, options, peers)
        if peers is not None and state.backend != "gloo":
            control = peers.open(new_gloo_group)
            peers.on_loss.append(_abort_collectives)
    except BaseException:
        if peers is not None:
            peers.leave(FAILED)
            peers.close()
        raise
    return Cluster(launch, state.device, peers, control), state.backend


def _start_process_group(
    launch: Launch, options: dict[str, Any], peers: Liveness | None
) -> PartialState:
    """Accelerate's state, with all ranks in its process group."""

    def start() -> PartialState:
        store = {} if peers is None else {"store": peers.store.for_groups()}
        return PartialState(**options, **store)

    try:
        state = start() if peers is None else peers.open(start)
    except (LostPeer, dist.DistError, RuntimeError, ValueError) as error:
        if isinstance(error, LostPeer) and error.ranks:
            raise
        reason = error.problems[0].found if isinstance(error, LostPeer) else str(error)
        raise ForgeError(
            f"rank {launch.rank} could not meet the {launch.world_size} processes at"
            f" {launch.master_addr}:{launch.master_port}: {reason.splitlines()[0]}",
            "check that every machine was started, with the same --world-size and address, and that"
            " firewalls let the peers talk (python check_cluster.py names who cannot reach whom)",
        ) from error
    if state.device.type == "cuda":
        torch.cuda.set_device(state.device)  # it was chosen for the thread that opened the group
    if state.num_processes != launch.world_size:
        raise ForgeError(
            f"the launch promises {launch.world_size} processes, Accelerate found"
            f" {state.num_processes}: each would train alone",
            "start it with torchrun or with `accelerate launch --multi_gpu`",
        )
    return state


def _abort_collectives() -> None:
    """End what waits for NCCL; on gloo this does nothing (torch 2.13)."""
    with contextlib.suppress(RuntimeError, AttributeError):
        dist.distributed_c10d._abort_process_group()


def _has_usable_accelerator(launch: Launch) -> bool:
    """Whether to train on a GPU (or another accelerator) and not on the CPU."""
    if launch.wants_cpu or not torch.accelerator.is_available():
        return False
    # Accelerate (1.15) starts strangers for several processes on Apple's GPUs, which have no
    # collectives, and gives one GPU to two processes, which NCCL refuses: then it is the CPU.
    device, devices = torch.accelerator.current_accelerator(), torch.accelerator.device_count()
    has_collectives = device is not None and device.type != "mps"
    return launch.world_size == 1 or (has_collectives and devices >= launch.local_world_size)


def _accelerator(config: TrainConfig, cluster: Cluster, precision: str) -> Accelerator:
    return Accelerator(
        cpu=cluster.device.type == "cpu",
        mixed_precision=precision,
        project_dir=config.output_dir,
        step_scheduler_with_optimizer=False,
        kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True)],
    )


def _require_alike(config: TrainConfig, cluster: Cluster, backend: str | None) -> tuple[str, bool]:
    """The precision that was asked for, and whether bf16 is faster on every rank.

    Raises ForgeError for peers that differ in what must be equal.
    """
    wanted: str = config.mixed_precision
    if wanted == "auto":
        wanted = cluster.launch.precision
    own: dict[str, Any] = {"precision": wanted, "backend": backend}
    own |= {"settings": config.shared_settings()}
    own |= {"bf16": wanted == "auto" and bf16_pays(cluster.device)}
    own |= {**versions(), "host": platform.node()}
    facts = cluster.gather_facts(own)
    refuse_failures(differences(facts))
    return wanted, all(fact["bf16"] is True for fact in facts)


def _precision(cluster: Cluster, wanted: str, has_bf16: bool, begun: str | None) -> str:
    """The precision all ranks compute in.

    `auto` follows the launcher's config; without a launcher it is that of the run that resumes, and
    else bf16 where it is faster on every rank.
    """
    if wanted == "auto" and begun in ("no", "bf16"):
        return begun
    if wanted == "auto":
        return "bf16" if has_bf16 else "no"
    if wanted == "fp16" and cluster.device.type == "cpu":
        found = "fp16 needs a GPU, and this run is on the CPU"
        raise ForgeError(found, "use --mixed-precision bf16 or no")
    return wanted


def differences(facts: list[dict[str, Any]]) -> list[Finding]:
    """What of each rank is not as rank 0's: settings, versions, precision, backend."""
    first, found = facts[0], []
    for rank, fact in enumerate(facts):
        where = f"rank {rank} ({fact['host']})"
        for key in ("precision", "backend", *versions()):
            if fact[key] != first[key]:
                fix = f"install {key} {first[key]} there, or the same on all machines"
                both = f"{where} has {key} {fact[key]}, rank 0 has {first[key]}"
                found.append(failure("alike", both, SAME.get(key, fix)))
        settings, of_first = fact["settings"], first["settings"]
        for key in sorted({*settings, *of_first}):
            if settings.get(key) != of_first.get(key):
                flag = "--" + key.replace("_", "-")
                here, there = (in_one_line(one.get(key)) for one in (settings, of_first))
                both = f"{flag} {here}, rank 0 with {there}"
                fix = f"start all machines with the same {flag}"
                found.append(failure("alike", f"{where} was started with {both}", fix))
    return found


@contextlib.contextmanager
def _own_accelerator_state() -> Iterator[None]:
    """Leave Accelerate's process-wide state as it was found."""
    if PartialState._shared_state:
        fix = "restart the notebook's kernel, and do not make one before train()"
        raise ForgeError("an Accelerator exists in this process already", fix)
    is_lost = False
    try:
        yield
    except LostPeer:
        is_lost = True
        raise
    finally:
        if dist.is_initialized():
            destroyed = in_thread(dist.destroy_process_group)
            futures.wait([destroyed], GOODBYE_S if is_lost else None)
        AcceleratorState._reset_state(reset_partial_state=True)
        GradientState._reset_state()
