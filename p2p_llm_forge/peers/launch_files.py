"""The files of `accelerate launch`: read, judged before anything starts, and written.

What Accelerate does with each key was seen with its version 1.15, by launching.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import CheckConfig
from p2p_llm_forge.errors import ForgeError, nearest
from p2p_llm_forge.files import write_file
from p2p_llm_forge.peers.addresses import is_literal, is_loopback
from p2p_llm_forge.peers.findings import FAILURE, Finding, failure, fine, warning
from p2p_llm_forge.peers.launch import DEFAULT_PORT

STARTS_PROCESSES = ("MULTI_GPU", "MULTI_XPU", "MULTI_NPU", "MULTI_MLU", "MULTI_HPU")
PRECISIONS = ("no", "bf16", "fp16")
# A name of a machine; its last part is no number, as that of a mistyped IP address is.
NAME = re.compile(r"([A-Za-z0-9_-]+\.)*[A-Za-z0-9_-]*[A-Za-z_-][A-Za-z0-9_-]*\.?")
AS_ON_ALL = ("num_machines", "num_processes", "main_process_ip", "main_process_port")
MULTI_GPU_FIX = "write `distributed_type: MULTI_GPU` (with `use_cpu: true` for CPUs)"


@dataclass(frozen=True)
class LaunchFile:
    """One machine's file, as YAML has read it."""

    path: str
    keys: dict[str, Any]

    def number(self, key: str, default: int) -> int:
        """The value of a key that holds a number; the default where it holds none."""
        value = self.keys.get(key)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    @property
    def machines(self) -> int:
        return self.number("num_machines", 1)

    @property
    def processes(self) -> int:
        """Over all machines."""
        return self.number("num_processes", -1)

    @property
    def rank(self) -> int:
        """This machine's number."""
        return self.number("machine_rank", 0)

    @property
    def address(self) -> str | None:
        address = self.keys.get("main_process_ip")
        return None if address is None else str(address)

    @property
    def port(self) -> int:
        return self.number("main_process_port", DEFAULT_PORT)

    @property
    def precision(self) -> Any:
        return self.keys.get("mixed_precision") or "no"

    @property
    def processes_here(self) -> int:
        """What Accelerate starts on this machine."""
        return self.processes // max(1, self.machines)


def read_launch_file(path: str) -> LaunchFile:
    """The file's keys. Raises ForgeError if it is not there or not of this kind."""
    import yaml

    try:
        keys = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise ForgeError(
            f"--config-file {path}: {error.strerror}",
            "name a launch file; --write-configs FOLDER --hosts ADDRESS ... makes some",
        ) from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ForgeError(
            f"--config-file {path} is not YAML: {error}",
            "write `key: value` lines as accelerate_configs/ shows them",
        ) from error
    if not isinstance(keys, dict):
        raise ForgeError(
            f"--config-file {path} holds a {type(keys).__name__}",
            "write `key: value` lines as accelerate_configs/ shows them",
        )
    return LaunchFile(path, {str(key): value for key, value in keys.items()})


def judge_launch_file(file: LaunchFile, gpus: int) -> list[Finding]:
    """Whether `accelerate launch` with this file starts the processes that it promises.

    gpus: how many this machine has.
    """
    found = [
        *_judge_keys(file),
        *_judge_type(file),
        *_judge_counts(file),
        *_judge_main(file),
        *_judge_devices(file, gpus),
        *_judge_precision(file),
        *_judge_ignored(file),
    ]
    if any(finding.level == FAILURE for finding in found):
        return found
    started = f"{file.processes_here} of {file.processes} processes"
    return [fine("file", f"{file.path}: machine {file.rank} of {file.machines}, {started}"), *found]


def judge_launch_files(files: Sequence[LaunchFile]) -> list[Finding]:
    """The files of one or of several machines, each on this machine, and together."""
    from p2p_llm_forge.peers.machine import accelerators

    gpus = accelerators() if files else 0
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
    )


def judge_together(files: Sequence[LaunchFile]) -> list[Finding]:
    """Whether several machines' files belong to one launch; nothing for a single one."""
    if len(files) < 2:
        return []
    found = [*_judge_equality(files), *_judge_ranks(files)]
    return found or [fine("files", f"{len(files)} files of one launch")]


def _judge_equality(files: Sequence[LaunchFile]) -> Iterator[Finding]:
    first = files[0]
    for file in files[1:]:
        for key in AS_ON_ALL:
            if file.keys.get(key) != first.keys.get(key):
                yield failure(
                    "files",
                    f"{file.path} has {key} {file.keys.get(key)}, {first.path} has"
                    f" {first.keys.get(key)}",
                    f"write the same {key} into the files of all machines",
                )
        if file.precision != first.precision:
            yield failure(
                "files",
                f"{file.path} has mixed_precision {file.precision}, {first.path} has"
                f" {first.precision}",
                "write the same into all files, or give --mixed-precision on all machines",
            )


def _judge_ranks(files: Sequence[LaunchFile]) -> Iterator[Finding]:
    machines = files[0].machines
    by_rank: dict[int, list[str]] = {}
    for file in files:
        by_rank.setdefault(file.rank, []).append(file.path)
    for rank, paths in by_rank.items():
        if len(paths) > 1:
            yield failure(
                "files",
                f"{' and '.join(paths)} both have machine_rank {rank}",
                f"give every machine a number of its own, 0 to {machines - 1}",
            )
    if absent := [str(rank) for rank in range(machines) if rank not in by_rank]:
        yield warning(
            "files",
            f"no file was given for machine {', '.join(absent)} of {machines}",
            "name the files of all machines, or set num_machines to as many as there are",
        )


def _wrong(file: LaunchFile, found: str, fix: str) -> Finding:
    return failure("file", f"{file.path}: {found}", fix)


def _doubtful(file: LaunchFile, found: str, fix: str) -> Finding:
    return warning("file", f"{file.path}: {found}", fix)


def _judge_keys(file: LaunchFile) -> Iterator[Finding]:
    from accelerate.commands.config.config_args import ClusterConfig

    known = set(ClusterConfig.__dataclass_fields__) | {"dynamo_backend", "fp16"}
    for key in sorted(set(file.keys) - known):
        alike = nearest(key, known)
        fix = f"{alike} Otherwise take it out" if "mean" in alike else "take it out"
        yield _wrong(file, f"unknown key '{key}', with which Accelerate does not start", fix)
    for key in ("num_machines", "num_processes", "machine_rank", "main_process_port"):
        value = file.keys.get(key)
        if value is not None and (not isinstance(value, int) or isinstance(value, bool)):
            yield _wrong(file, f"{key} is {value!r}", "write a whole number")
    environment = file.keys.get("compute_environment", "LOCAL_MACHINE")
    if environment != "LOCAL_MACHINE":
        fix = "write LOCAL_MACHINE: managed services are not supported"
        yield _wrong(file, f"compute_environment is {environment}", fix)


def _judge_type(file: LaunchFile) -> Iterator[Finding]:
    kind, wants_many = file.keys.get("distributed_type"), file.processes > 1 or file.machines > 1
    if kind is False:
        found = "distributed_type: NO without quotes, which YAML reads as false"
        yield _wrong(file, found, "write 'NO' in quotes")
    elif kind in ("MULTI_CPU", "NO") and wants_many:
        needs = ", which needs MPI," if kind == "MULTI_CPU" else ""
        yield _wrong(
            file,
            f"distributed_type {kind}{needs} starts one process on each machine that knows nothing"
            f" of the others, whatever num_processes is ({file.keys.get('num_processes')})",
            MULTI_GPU_FIX,
        )
    elif kind is None:
        yield _wrong(file, "no distributed_type", MULTI_GPU_FIX)
    elif kind not in (*STARTS_PROCESSES, "MULTI_CPU", "NO"):
        yield _wrong(file, f"distributed_type {kind} is not supported", MULTI_GPU_FIX)


def _judge_counts(file: LaunchFile) -> Iterator[Finding]:
    machines, processes = file.machines, file.processes
    if machines < 1:
        yield _wrong(file, f"num_machines is {machines}", "write 1 or more")
        return
    if processes < machines or processes % machines:
        each = max(1, -(-processes // machines))
        yield _wrong(
            file,
            f"num_processes is {file.keys.get('num_processes', 'missing')} for {machines}"
            " machine(s); it counts the processes of all machines together",
            f"write {machines * each} for {each} on each machine, the same in all files",
        )
    if not 0 <= file.rank < machines:
        yield _wrong(
            file,
            f"machine_rank is {file.rank}, and num_machines is {machines}",
            f"number the machines from 0 to {machines - 1}",
        )


def _judge_main(file: LaunchFile) -> Iterator[Finding]:
    """The main address and port."""
    if file.machines <= 1:
        return
    address, port = file.address, file.keys.get("main_process_port")
    if not address:
        yield _wrong(
            file,
            f"no main_process_ip for {file.machines} machines",
            "write the address of machine 0 as the others reach it, in all files",
        )
    elif is_literal(address) and is_loopback(address):
        yield _doubtful(
            file,
            f"main_process_ip {address} is each machine's own",
            "write the address of machine 0 as the others reach it; this is right only if all run"
            " on one machine",
        )
    if port is None or not 0 < file.port < 65536:
        yield _wrong(
            file,
            f"main_process_port is {'missing' if port is None else port} for {file.machines}"
            " machines",
            f"write a port that is free on machine 0, such as {DEFAULT_PORT}, in all files",
        )


def _judge_devices(file: LaunchFile, gpus: int) -> Iterator[Finding]:
    here, ids = file.processes_here, file.keys.get("gpu_ids")
    listed = None if ids in (None, "all") else len(str(ids).split(","))
    if file.keys.get("distributed_type") not in STARTS_PROCESSES:
        return
    if file.keys.get("use_cpu"):
        if gpus:
            yield _doubtful(
                file,
                f"use_cpu is true, this machine has {gpus} GPU(s), and Accelerate does not hand the"
                " key on to several processes",
                "set ACCELERATE_USE_CPU=true in the environment, or train with --cpu",
            )
    elif listed is not None and listed < here:
        yield _wrong(
            file,
            f"gpu_ids {ids} names {listed} GPU(s) for {here} processes on this machine",
            "write `gpu_ids: all`, or name one for each process",
        )
    elif not gpus:
        yield _doubtful(
            file,
            "is for GPUs, and this machine has none that torch can use: its processes will train on"
            " the CPU",
            "write `use_cpu: true`, or install the driver and torch's build for this GPU",
        )
    elif here != gpus and listed is None:
        total = gpus * file.machines
        more = f"write num_processes: {total} in all files if the others have {gpus} too"
        yield _doubtful(
            file,
            f"starts {here} process(es) here, and this machine has {gpus} GPU(s)",
            more if here < gpus else "lower num_processes to the GPUs there are",
        )


def _judge_precision(file: LaunchFile) -> Iterator[Finding]:
    value, on_cpus = file.keys.get("mixed_precision"), bool(file.keys.get("use_cpu"))
    if value is False:
        yield _wrong(
            file,
            "mixed_precision: no without quotes, which YAML reads as false: Accelerate ends with an"
            " AttributeError",
            "write 'no' in quotes",
        )
    elif value not in (None, *PRECISIONS) or (value == "fp16" and on_cpus):
        where = " on CPUs" if on_cpus else ""
        fix = "write 'no' or bf16 (fp16 on GPUs)"
        yield _wrong(file, f"mixed_precision is {value}{where}", fix)


def _judge_ignored(file: LaunchFile) -> Iterator[Finding]:
    """Keys that look as if they did something."""
    backend = file.keys.get("rdzv_backend", "static")
    if backend != "static":
        yield _doubtful(
            file,
            f"rdzv_backend {backend} is not read from the file",
            'take it out; for peers that come and go use torchrun (README, "When peers come and'
            ' go")',
        )
    if file.keys.get("dynamo_config") or file.keys.get("dynamo_backend"):
        found = "dynamo settings compile the whole wrapped model, loss and all"
        yield _doubtful(file, found, "take them out and train with --compile")
    if file.keys.get("debug"):
        yield _doubtful(file, "debug: true checks every exchange", "write false")
    if file.keys.get("mpirun_config"):
        found = "mpirun_config starts the processes by MPI, which is not supported"
        yield _wrong(file, found, f"take it out, and {MULTI_GPU_FIX}")


def write_launch_files(
    folder: Path, hosts: list[str], port: int, gpus_per_host: int | None, overwrite: bool
) -> list[str]:
    """Write one file for each host, the first of which is the main one; returns the lines to run.

    gpus_per_host: None for one process on the CPU of each. Raises ForgeError.
    """
    wrong = [host for host in hosts if not (is_literal(host) or NAME.fullmatch(host))]
    if wrong:
        raise ForgeError(
            f"--hosts names {', '.join(map(repr, wrong))}, which is no address",
            "write IP addresses or names of machines with spaces between them, without user or port"
            " (--master-port sets it)",
        )
    twice = sorted({host for host in hosts if hosts.count(host) > 1})
    if twice:
        raise ForgeError(f"--hosts names {', '.join(twice)} twice", "give each machine once")
    files = [folder / f"node{rank}.yaml" for rank in range(len(hosts))]
    there = [str(file) for file in files if file.exists()]
    if there and not overwrite:
        raise ForgeError(
            f"--write-configs would overwrite {', '.join(there)}",
            "choose another folder, or add --overwrite",
        )
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for rank, file in enumerate(files):
            write_file(file, launch_file_text(rank, hosts, port, gpus_per_host, file))
    except OSError as error:
        raise ForgeError(
            f"--write-configs {folder} cannot be written ({error.strerror})",
            "choose another folder",
        ) from error
    return [
        f"on {host}:  accelerate launch --config_file {file} train.py ..."
        for host, file in zip(hosts, files, strict=True)
    ]


def launch_file_text(
    rank: int, hosts: list[str], port: int, gpus_per_host: int | None, file: Path
) -> str:
    """The file of machine `rank`, commented."""
    machines, each = len(hosts), gpus_per_host or 1
    kind = "one process for each GPU; they talk by NCCL" if gpus_per_host else "one CPU process"
    lines = [
        f"# Machine {rank} of {machines} ({hosts[rank]}), {kind}. On this machine:",
        f"#   accelerate launch --config_file {file} train.py ...",
        "compute_environment: LOCAL_MACHINE  # not a managed cloud service",
    ]
    if machines * each == 1:
        lines += ["distributed_type: 'NO'  # one process, nobody to talk to"]
    else:
        lines += [
            "# MULTI_GPU is the value that makes Accelerate start real processes, on CPUs too;",
            "# MULTI_CPU, which sounds right, starts strangers.",
            "distributed_type: MULTI_GPU",
        ]
    lines += [] if gpus_per_host else ["use_cpu: true  # processes on the CPU"]
    lines += [
        f"num_machines: {machines}  # machines in all",
        f"num_processes: {machines * each}  # processes in all, over all machines: {each} on each",
        f"machine_rank: {rank}  # this machine's number; machine 0 is the main one",
    ]
    if machines > 1:
        lines += [
            f"main_process_ip: {hosts[0]}  # address of machine 0, as the others reach it",
            f"main_process_port: {port}  # a free port of machine 0 that its firewall lets through",
        ]
    else:
        lines += ["main_process_port: 0  # 0: any free port of this machine"]
    lines += ["gpu_ids: all  # which GPUs of this machine, such as 0,1"] if gpus_per_host else []
    lines += [
        "mixed_precision: 'no'  # or bf16, the same on all; the quotes are needed",
        "main_training_function: main  # only used on TPUs; Accelerate expects the key",
    ]
    return "\n".join(lines) + "\n"
