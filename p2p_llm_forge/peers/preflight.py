"""What makes a launch work: what a machine finds alone, and what the peers find together."""

from __future__ import annotations

import contextlib
import platform
import secrets
import statistics
import time
from pathlib import Path

from p2p_llm_forge.config import CheckConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.findings import Finding, failure, failures, fine, warning
from p2p_llm_forge.peers.launch import DEFAULT_PORT, Launch
from p2p_llm_forge.peers.launch_files import LaunchFile
from p2p_llm_forge.peers.machine import judge_machine
from p2p_llm_forge.peers.routes import Main, judge_route
from p2p_llm_forge.polling import wait_for

CLOCK_TRIES = 5
LARGEST_CLOCK_OFFSET_S = 1.0
FOLDER_LAG_S = 3.0  # a network share may show a new file late


def judge_alone(config: CheckConfig, launch: Launch, file: LaunchFile | None) -> list[Finding]:
    """What one machine can find: what it has, and its route to the main address."""
    found = []
    if file is not None and not config.meet and launch.world_size not in (1, file.processes):
        started = f"{launch.world_size} processes were started, {file.path} promises"
        fix = "start all machines with files of the same launch"
        found.append(failure("launch", f"{started} {file.processes}", fix))
    if launch.local_rank:
        return found  # one process speaks for its machine
    main = _main_of(launch, file)
    found += judge_machine(config, launch)
    return found + (judge_route(main, launch, config.allow_public_address) if main else [])


def _main_of(launch: Launch, file: LaunchFile | None) -> Main | None:
    """Where the machines are to meet; None for a launch on one of them."""
    machines, host, port = launch.machines, launch.master_addr, launch.master_port
    is_here = launch.rank < launch.local_world_size
    if file is not None and launch.world_size == 1:
        machines, host, port, is_here = file.machines, file.address, file.port, file.rank == 0
    if machines == 1 or host is None:
        return None
    return Main(host, port or DEFAULT_PORT, machines, is_here, launch.world_size > 1)


def gather_findings(cluster: Cluster, own: list[Finding]) -> list[Finding]:
    """Every rank's findings, each with the name of its rank. All ranks must call."""
    facts = cluster.gather_facts(
        {"findings": [vars(finding) for finding in own], "host": platform.node()}
    )
    return [
        Finding(**{**finding, "where": f"rank {rank} ({fact['host']})"})
        for rank, fact in enumerate(facts)
        for finding in fact["findings"]
    ]


def judge_peers(config: CheckConfig, cluster: Cluster, hosts: list[str]) -> list[Finding]:
    """What the peers find together; the same on every rank. All ranks must call."""
    found = []
    if cluster.world_size > 1:
        found.append(fine("rendezvous", f"all {cluster.world_size} processes are here"))
        found += judge_pythons(cluster, hosts)
        found += judge_clocks(cluster, hosts)
    if config.output_dir:
        is_needed = bool(config.resume) or config.keeps_own_state()
        found += judge_shared_folder(cluster, Path(config.output_dir), is_needed, hosts)
    return found


def hosts_of(cluster: Cluster) -> list[str]:
    """Every rank's host name, by rank."""
    return [fact["host"] for fact in cluster.gather_facts({"host": platform.node()})]


def judge_clocks(cluster: Cluster, hosts: list[str]) -> list[Finding]:
    """How far the clocks are from that of rank 0: all ranks leave an exchange at about once."""
    offsets: list[list[float]] = []
    for _ in range(CLOCK_TRIES):
        cluster.gather_numbers([0.0])
        clocks = [clock for (clock,) in cluster.gather_numbers([time.time()])]
        offsets.append([clock - clocks[0] for clock in clocks])
    by_rank = [statistics.median(column) for column in zip(*offsets, strict=True)]
    found = [
        warning(
            "clock",
            f"the clock of rank {rank} ({hosts[rank]}) is {abs(offset):.1f} s"
            f" {'ahead of' if offset > 0 else 'behind'} that of rank 0",
            "on that machine: sudo timedatectl set-ntp true (times in logs and of files will not"
            " agree)",
        )
        for rank, offset in enumerate(by_rank)
        if abs(offset) > LARGEST_CLOCK_OFFSET_S
    ]
    largest = max(map(abs, by_rank))
    return found or [fine("clock", f"at most {largest:.3f} s apart")]


def judge_pythons(cluster: Cluster, hosts: list[str]) -> list[Finding]:
    """Whether all ranks run the same minor version of Python; libraries are compared before."""
    own = ".".join(platform.python_version_tuple()[:2])
    pythons = [fact["python"] for fact in cluster.gather_facts({"python": own})]
    found = [
        warning(
            "versions",
            f"rank {rank} ({hosts[rank]}) has Python {version}, rank 0 has {pythons[0]}",
            "use the same minor version everywhere: libraries may behave otherwise",
        )
        for rank, version in enumerate(pythons)
        if version != pythons[0]
    ]
    return found or [fine("versions", f"all ranks have the same libraries and Python {pythons[0]}")]


def judge_shared_folder(
    cluster: Cluster, folder: Path, is_needed: bool, hosts: list[str]
) -> list[Finding]:
    """Whether what rank 0 writes into the folder is read by all. Leaves nothing behind."""
    note, nonce = folder / f".check-{secrets.token_hex(8)}", secrets.token_hex(16)

    def write() -> list[str]:
        made = [parent for parent in (folder, *folder.parents) if not parent.exists()]
        try:
            folder.mkdir(parents=True, exist_ok=True)
            note.write_text(nonce)
        except OSError as error:
            raise ForgeError(
                f"--output-dir {folder} cannot be written by rank 0: {error.strerror}",
                "choose another --output-dir, or make this one writable",
            ) from error
        return [note.name, nonce, *map(str, made)]

    def remove() -> None:
        with contextlib.suppress(OSError):
            note.unlink()
            for parent in made:
                Path(parent).rmdir()

    try:
        name, wanted, *made = cluster.main_only(write)
    except ForgeError as error:
        return failures("folder", error)
    facts = cluster.gather_facts({"seen": _reads(folder / name, wanted)})
    cluster.main_only(remove)
    blind = [f"rank {rank} ({hosts[rank]})" for rank, fact in enumerate(facts) if not fact["seen"]]
    if not blind:
        return [fine("folder", f"{folder} is seen by all ranks")]
    found = f"{', '.join(blind)} cannot see what rank 0 writes into {folder}"
    fix = "put --output-dir on a network share at the same path on all machines"
    if is_needed:
        return [failure("folder", f"{found}, where every rank reads or writes checkpoints", fix)]
    return [warning("folder", found, f"{fix}, to be able to --resume without copying")]


def _reads(file: Path, wanted: str) -> bool:
    def look() -> bool:
        try:
            return file.read_text() == wanted
        except OSError:
            return False

    return wait_for(look, FOLDER_LAG_S)
