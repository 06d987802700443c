"""What a machine has to offer a run, and which way leads from it to the others."""

from __future__ import annotations

import os
import platform
import shutil
import socket
from collections.abc import Mapping
from pathlib import Path

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import addresses
from p2p_llm_forge.peers.cluster import Launch, choose_threads, route_to, versions
from p2p_llm_forge.peers.findings import Finding, failure, fine, warning

LITTLE_DISK, LITTLE_MEMORY = 2e9, 1e9  # bytes below which even a small run is in danger


def judge_machine(config: TrainConfig, launch: Launch, environ: Mapping[str, str]) -> list[Finding]:
    """Free disk and memory, threads and versions of this machine."""
    import psutil

    found = [_judge_disk(config)]
    free = psutil.virtual_memory().available
    found.append(
        fine("memory", f"{free / 1e9:.1f} GB free")
        if free > LITTLE_MEMORY
        else warning("memory", f"only {free / 1e9:.2f} GB of memory are free", "end other programs")
    )
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    threads = choose_threads(config, launch, environ)
    told = f"{launch.local_world_size} process(es) of {threads} thread(s) on {cores} core(s)"
    found.append(
        fine("threads", told)
        if threads * launch.local_world_size <= (cores or 1)
        else warning(
            "threads",
            f"{told}: they will wait for each other",
            f"unset OMP_NUM_THREADS, or --cpu-threads {(cores or 1) // launch.local_world_size}",
        )
    )
    known = {"Python": platform.python_version(), **versions()}
    found.append(fine("versions", ", ".join(f"{name} {number}" for name, number in known.items())))
    return found


def _judge_disk(config: TrainConfig) -> Finding:
    folder = Path(config.output_dir or ".").absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free, told = shutil.disk_usage(there).free, f"at {config.output_dir or 'this folder'}"
    if free > LITTLE_DISK:
        return fine("disk", f"{free / 1e9:.0f} GB free {told}")
    return warning(
        "disk", f"only {free / 1e9:.2f} GB are free {told}", "make room, or another --output-dir"
    )


def judge_way(
    config: TrainConfig,
    host: str,
    port: int,
    machines: int,
    is_main: bool,
    will_meet: bool,
    environ: Mapping[str, str],
) -> list[Finding]:
    """The way from this machine to the main address, and whether it can bring peers together.

    will_meet: the peers meet right after this, with more patience than a single try has.
    """
    try:
        found = addresses.judge_name(host, machines)
        route = route_to(host)
    except ForgeError as error:
        told, _, mend = str(error).rpartition(": ")
        return [failure("address", told, mend)]
    own = route.address if route else "127.0.0.1"
    listening = [*addresses.resolve(host), own]
    found += addresses.judge_public(listening, config.allow_public_address)
    if route:
        found.append(fine("route", f"{route.address} by {route.interface}"))
        found += _judge_interface(route.interface, environ)
    found += _judge_ownership(host, is_main, machines)
    if is_main and environ.get("TORCHELASTIC_USE_AGENT_STORE") != "True":
        found.append(addresses.judge_own_port(port))
    elif not is_main and not will_meet:
        found.append(addresses.judge_reach(addresses.probe(host, port), host, port, own))
    return found + _judge_hostname(machines)


def _judge_interface(leads_there: str, environ: Mapping[str, str]) -> list[Finding]:
    """Whether what the user has set is the interface of the route."""
    chosen = environ.get("GLOO_SOCKET_IFNAME")
    if chosen in (None, leads_there):
        return []
    try:
        address = addresses.address_of(str(chosen).split(",")[0])
    except ForgeError as error:
        return [failure("interface", str(error), "unset GLOO_SOCKET_IFNAME")]
    return [
        warning(
            "interface",
            f"GLOO_SOCKET_IFNAME is {chosen} ({address}), the main machine is reached by"
            f" {leads_there}",
            "unset it, unless the peers reach each other there too",
        )
    ]


def _judge_ownership(host: str, is_main: bool, machines: int) -> list[Finding]:
    import psutil

    own = {
        entry.address.split("%")[0]
        for entries in psutil.net_if_addrs().values()
        for entry in entries
        if entry.family in (socket.AF_INET, socket.AF_INET6)
    }
    is_own = bool(own.intersection(addresses.resolve(host)))
    if machines == 1 or is_own == is_main:
        return []
    if is_main:
        outward = sorted(address for address in own if not addresses.is_loopback(address))
        return [
            warning(
                "address",
                f"this is machine 0, and {host} is not one of its addresses"
                f" ({', '.join(outward) or 'it has none'})",
                "write the one that the others reach (main_process_ip, --master-addr), unless a"
                " router forwards the port to here",
            )
        ]
    return [
        warning(
            "address",
            f"{host} is this machine's own address, and this is not machine 0",
            "write the address of machine 0, or correct machine_rank; this is right only if all"
            " run on one machine",
        )
    ]


def _judge_hostname(machines: int) -> list[Finding]:
    """Where gloo would listen if nobody chose the interface for it."""
    name = platform.node()
    try:
        found = addresses.resolve(name)
    except ForgeError:
        return []
    if machines == 1 or not addresses.is_loopback(found[0]):
        return []
    return [
        fine(
            "hostname", f"{name} means {found[0]} here; the interface of the route is used instead"
        )
    ]


def judge_checkpoints(config: TrainConfig, parameters: int) -> Finding:
    """Whether the checkpoints of a model of so many parameters fit on this machine's disk."""
    # float32 weights and two moments, for those that are kept, the one that is being written, and
    # the final model.
    one = 12 * parameters
    needed = one * (config.keep_checkpoints + config.keep_best + 1) + 4 * parameters
    folder = Path(config.output_dir or ".").absolute()
    there = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    free = shutil.disk_usage(there).free
    told = f"checkpoints need {needed / 1e9:.2f} GB, {free / 1e9:.1f} GB are free"
    if free > needed:
        return fine("disk", told)
    mend = "make room, lower --keep-checkpoints, or choose another --output-dir"
    return failure("disk", told, mend) if free < one else warning("disk", told, mend)
