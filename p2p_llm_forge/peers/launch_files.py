"""The files of `accelerate launch`: read, judged before anything starts, and written.

What Accelerate does with each key was seen with its version 1.15, by launching.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from itertools import chain
from pathlib import Path
from types import NoneType
from typing import Any

from p2p_llm_forge.config import CheckConfig
from p2p_llm_forge.config.yaml_file import read_yaml
from p2p_llm_forge.errors import ForgeError, nearest
from p2p_llm_forge.files import write_file
from p2p_llm_forge.peers.addresses import is_literal, is_loopback
from p2p_llm_forge.peers.findings import FAILURE, Finding, failure, fine, warning
from p2p_llm_forge.peers.launch import DEFAULT_PORT

STARTS_PROCESSES = ("MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")
# A name of a machine; its last part is no number, as that of a mistyped IP address is.
NAME = re.compile(r"([A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]*[A-Za-z_-][A-Za-z0-9_-]*\.?")
NUMBERS = ("num_machines", "num_processes", "machine_rank", "main_process_port")
AS_ON_ALL = ("num_machines", "num_processes", "main_process_ip", "main_process_port")
MULTI_GPU_FIX = "write `distributed_type: MULTI_GPU` (with `use_cpu: true` for CPUs)"
MAIN_FIX = "write the address of machine 0 as the others reach it"

# What makes the finding, what was found, and the fix.
Judgements = Iterator[tuple[Callable[[str, str, str], Finding], str, str]]


class LaunchFile:
    """One machine's file, as YAML has read it. Where a key holds no number, its default counts."""

    def __init__(self, path: str, keys: dict[str, Any]) -> None:
        def number(key: str, default: int) -> int:
            return keys[key] if type(keys.get(key)) is int else default

        self.path, self.keys = path, keys
        self.machines = number("num_machines", 1)
        self.processes = number("num_processes", -1)  # over all machines
        self.rank = number("machine_rank", 0)  # this machine's number
        self.address = str(keys.get("main_process_ip") or "") or None
        self.port = number("main_process_port", DEFAULT_PORT)
        self.precision = keys.get("mixed_precision") or "no"
        self.processes_here = self.processes // max(1, self.machines)  # that Accelerate starts


def read_launch_file(path: str) -> LaunchFile:
    """The file's keys. Raises ForgeError if it is not there or not of this kind."""
    fix = "name a launch file; --write-configs FOLDER --hosts ADDRESS ... makes some"
    keys = read_yaml("--config-file", path, fix)
    return LaunchFile(path, {str(key): value for key, value in keys.items()})


def judge_launch_files(files: Sequence[LaunchFile], on_cpu: bool = False) -> list[Finding]:
    """The files of one or of several machines, each on this machine, and together.

    on_cpu: whatever the files say.
    """
    from p2p_llm_forge.peers.machine import accelerators

    gpus = accelerators() if files and not on_cpu else None
    found = [finding for file in files for finding in judge_launch_file(file, gpus)]
    return found + judge_together(files)


def by_hand(config: CheckConfig, file: LaunchFile) -> CheckConfig:
    """The launch of the file with one process on each machine, which needs no launcher.

    `accelerate launch` (1.15) waits 15 minutes for a missing machine before any script begins, and
    prints nothing meanwhile.
    """
    return replace(
        config,
        rank=file.rank,
        world_size=file.machines,
        master_addr=file.address or "127.0.0.1",
        master_port=file.port,
        cpu=config.cpu or bool(file.keys.get("use_cpu")),
    )


def judge_together(files: Sequence[LaunchFile]) -> list[Finding]:
    """Whether several machines' files belong to one launch; nothing for a single one."""
    if len(files) < 2:
        return []
    first, found = files[0], []
    by_rank: dict[int, list[str]] = defaultdict(list)
    for file in files:
        by_rank[file.rank].append(file.path)
        values = [(key, file.keys.get(key), first.keys.get(key)) for key in AS_ON_ALL]
        values.append(("mixed_precision", file.precision, first.precision))
        for key, own, expected in values:
            if own != expected:
                both = f"{file.path} has {key} {own}, {first.path} has {expected}"
                fix = f"write the same {key} into the files of all machines"
                found.append(failure("files", both, fix))
    for rank, paths in by_rank.items():
        if len(paths) > 1:
            fix = f"give every machine a number of its own, 0 to {first.machines - 1}"
            both = f"{' and '.join(paths)} both have machine_rank {rank}"
            found.append(failure("files", both, fix))
    if absent := [str(rank) for rank in range(first.machines) if rank not in by_rank]:
        missing = f"no file was given for machine {', '.join(absent)} of {first.machines}"
        fix = "name the files of all machines, or set num_machines to as many as there are"
        found.append(warning("files", missing, fix))
    return found or [fine("files", f"{len(files)} files of one launch")]


def judge_launch_file(file: LaunchFile, gpus: int | None) -> list[Finding]:
    """Whether the file starts what it promises on this machine.

    gpus: so many it has; None: none is wanted.
    """
    judged = chain(
        _judge_keys(file),
        _judge_type(file),
        _judge_counts(file),
        _judge_main(file),
        _judge_devices(file, gpus),
        _judge_precision(file),
        _judge_ignored(file),
    )
    found = [make("file", f"{file.path}: {text}", fix) for make, text, fix in judged]
    if any(finding.level == FAILURE for finding in found):
        return found
    started = f"{file.processes_here} of {file.processes} processes"
    return [fine("file", f"{file.path}: machine {file.rank} of {file.machines}, {started}"), *found]


def _judge_keys(file: LaunchFile) -> Judgements:
    from accelerate.commands.config.config_args import ClusterConfig

    known = set(ClusterConfig.__dataclass_fields__) | {"dynamo_backend", "fp16"}
    for key in sorted(set(file.keys) - known):
        alike = nearest(key, known)
        fix = f"{alike} Otherwise take it out" if "mean" in alike else "take it out"
        yield failure, f"unknown key '{key}', with which Accelerate does not start", fix
    for key in NUMBERS:
        if type(file.keys.get(key)) not in (int, NoneType):
            yield failure, f"{key} is {file.keys[key]!r}", "write a whole number"
    environment = file.keys.get("compute_environment", "LOCAL_MACHINE")
    if environment != "LOCAL_MACHINE":
        fix = "write LOCAL_MACHINE: managed services are not supported"
        yield failure, f"compute_environment is {environment}", fix


def _judge_type(file: LaunchFile) -> Judgements:
    kind, number = file.keys.get("distributed_type"), file.keys.get("num_processes")
    # What is no number is refused by itself, and must not hide what it would start.
    wants_many = file.processes != 1 if kind == "MULTI_CPU" else file.processes > 1
    wants_many = wants_many or file.machines > 1
    if kind is False:
        found = "distributed_type: NO without quotes, which YAML reads as false"
        yield failure, found, "write 'NO' in quotes"
    elif kind in ("MULTI_CPU", "NO") and wants_many:
        needs = ", which needs MPI," if kind == "MULTI_CPU" else ""
        found = f"distributed_type {kind}{needs} starts one process on each machine that knows"
        whatever = f"whatever num_processes is ({number})"
        yield failure, f"{found} nothing of the others, {whatever}", MULTI_GPU_FIX
    elif kind is None:
        yield failure, "no distributed_type", MULTI_GPU_FIX
    elif kind not in (*STARTS_PROCESSES, "MULTI_CPU", "NO"):
        yield failure, f"distributed_type {kind} is not supported", MULTI_GPU_FIX


def _judge_counts(file: LaunchFile) -> Judgements:
    machines, processes = file.machines, file.processes
    if machines < 1:
        yield failure, f"num_machines is {machines}", "write 1 or more"
        return
    if processes < machines or processes % machines:
        each, number = max(1, -(-processes // machines)), file.keys.get("num_processes", "missing")
        found = f"num_processes is {number} for {machines} machine(s); it counts those of all"
        fix = f"write {machines * each} for {each} on each machine, the same in all files"
        yield failure, found, fix
    if not 0 <= file.rank < machines:
        found = f"machine_rank is {file.rank}, and num_machines is {machines}"
        yield failure, found, f"number the machines from 0 to {machines - 1}"


def _judge_main(file: LaunchFile) -> Judgements:
    """The main address and port."""
    address, port = file.address, file.keys.get("main_process_port")
    if file.machines <= 1:
        return
    if not address:
        fix = f"{MAIN_FIX}, in all files"
        yield failure, f"no main_process_ip for {file.machines} machines", fix
    elif is_literal(address) and is_loopback(address):
        fix = f"{MAIN_FIX}; this is right only if all run on one machine"
        yield warning, f"main_process_ip {address} is each machine's own", fix
    if port is None or not 0 < file.port < 65536:
        found = f"main_process_port is {'missing' if port is None else port}"
        fix = f"write a port that is free on machine 0, such as {DEFAULT_PORT}, in all files"
        yield failure, f"{found} for {file.machines} machines", fix


def _judge_devices(file: LaunchFile, gpus: int | None) -> Judgements:
    here, ids = file.processes_here, file.keys.get("gpu_ids")
    listed = None if ids in (None, "all") else len(str(ids).split(","))
    is_for_cpus = file.keys.get("use_cpu") or gpus is None
    if file.keys.get("distributed_type") not in STARTS_PROCESSES or is_for_cpus:
        return
    if listed is not None and listed < here:
        found = f"gpu_ids {ids} names {listed} GPU(s) for {here} processes on this machine"
        yield failure, found, "write `gpu_ids: all`, or name one for each process"
    elif not gpus:
        found = "is for GPUs, and this machine has none that torch can use: train.py refuses that"
        fix = "write `use_cpu: true`, add --cpu, or install the driver and torch's build for a GPU"
        yield warning, found, fix
    elif here != gpus and listed is None:
        found = f"starts {here} process(es) here, and this machine has {gpus} GPU(s)"
        fix = f"write num_processes: {gpus * file.machines}"
        others = f" in all files if the others have {gpus} too" if file.machines > 1 else ""
        yield warning, found, fix + others


def _judge_precision(file: LaunchFile) -> Judgements:
    value, on_cpus = file.keys.get("mixed_precision"), bool(file.keys.get("use_cpu"))
    if value is False:
        found = "mixed_precision: no without quotes, which YAML reads as false:"
        yield failure, f"{found} Accelerate ends with an AttributeError", "write 'no' in quotes"
    elif value not in (None, "no", "bf16", "fp16") or (value == "fp16" and on_cpus):
        found = f"mixed_precision is {value}" + (" on CPUs" if on_cpus else "")
        yield failure, found, "write 'no' or bf16 (fp16 on GPUs)"


def _judge_ignored(file: LaunchFile) -> Judgements:
    """Keys that look as if they did something."""
    backend = file.keys.get("rdzv_backend", "static")
    if backend != "static":
        fix = "take it out; for peers that come and go see docs/elastic.md"
        yield warning, f"rdzv_backend {backend} is not read from the file", fix
    if file.keys.get("dynamo_config") or file.keys.get("dynamo_backend"):
        found = "dynamo settings are taken as --compile is, on the machines of this file only"
        yield warning, found, "take them out and train with --compile on all machines"
    if file.keys.get("debug"):
        yield warning, "debug: true checks every exchange", "write false"
    if file.keys.get("mpirun_config"):
        found = "mpirun_config starts the processes by MPI, which is not supported"
        yield failure, found, f"take it out, and {MULTI_GPU_FIX}"


def write_launch_files(
    folder: Path, hosts: list[str], port: int, gpus_per_host: int | None, overwrite: bool
) -> list[str]:
    """Write one file for each host, the first of which is the main one; returns the lines to run.

    gpus_per_host: None for one process on the CPU of each. Raises ForgeError.
    """
    wrong = [repr(host) for host in hosts if not (is_literal(host) or NAME.fullmatch(host))]
    if wrong:
        raise ForgeError(
            f"--hosts names {', '.join(wrong)}, which is no address",
            "write IP addresses or names of machines with spaces between them, without user or port"
            " (--master-port sets it)",
        )
    if twice := sorted({host for host in hosts if hosts.count(host) > 1}):
        raise ForgeError(f"--hosts names {', '.join(twice)} twice", "give each machine once")
    own = [host for host in hosts if host == "localhost" or is_literal(host) and is_loopback(host)]
    if own and len(hosts) > 1:
        raise ForgeError(
            f"--hosts names {own[0]}, which is each machine's own: the others cannot reach it",
            "write the address of that machine as the others reach it (`ip -brief address` there)",
        )
    files = [folder / f"node{rank}.yaml" for rank in range(len(hosts))]
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        found = f"--write-configs would overwrite {', '.join(there)}"
        raise ForgeError(found, "choose another folder, or add --overwrite")
    commands = [f"accelerate launch --config_file {file} train.py ..." for file in files]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, (file, command) in enumerate(zip(files, commands, strict=True)):
            write_file(file, _launch_file_text(rank, hosts, port, gpus_per_host, command))
    except OSError as error:
        found = f"--write-configs {folder} cannot be written ({error.strerror})"
        raise ForgeError(found, "choose another folder") from error
    return [f"on {host}:  {command}" for host, command in zip(hosts, commands, strict=True)]


def _launch_file_text(
    rank: int, hosts: list[str], port: int, gpus_per_host: int | None, command: str
) -> str:
    machines, each = len(hosts), gpus_per_host or 1
    kind = "one process for each GPU; they talk by NCCL" if gpus_per_host else "one CPU process"
    start = ["distributed_type: 'NO'  # one process, nobody to talk to"]
    if machines * each > 1:
        start = [
            "# MULTI_GPU is the value that makes Accelerate start real processes, on CPUs too;",
            "# MULTI_CPU, which sounds right, starts strangers.",
            "distributed_type: MULTI_GPU",
        ]
    main = ["main_process_port: 0  # 0: any free port of this machine"]
    if machines > 1:
        main = [
            f"main_process_ip: {hosts[0]}  # address of machine 0, as the others reach it",
            f"main_process_port: {port}  # a free port of machine 0 that its firewall lets through",
        ]
    device = "use_cpu: true  # processes on the CPU"
    if gpus_per_host:
        device = "gpu_ids: all  # which GPUs of this machine, such as 0,1"
    lines = [
        f"# Machine {rank} of {machines} ({hosts[rank]}), {kind}. On this machine:",
        f"#   {command}",
        "compute_environment: LOCAL_MACHINE  # not a managed cloud service",
        *start,
        device,
        f"num_machines: {machines}  # machines in all",
        f"num_processes: {machines * each}  # processes in all, over all machines: {each} on each",
        f"machine_rank: {rank}  # this machine's number; machine 0 is the main one",
        *main,
        "mixed_precision: 'no'  # or bf16, the same on all; the quotes are needed",
        "main_training_function: main  # only used on TPUs; Accelerate expects the key",
    ]
    return "\n".join(lines) + "\n"
