"""What makes a launch work: what a machine finds alone, and what the peers find together."""

from __future__ import annotations

import platform
import statistics
import time
from dataclasses import replace
from pathlib import Path

from p2p_llm_forge.config import CheckConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.findings import (
    Finding,
    as_sent_by,
    failure,
    failures,
    findings_of_peer,
    fine,
    warning,
)
from p2p_llm_forge.peers.keepers import keep
from p2p_llm_forge.peers.launch import DEFAULT_PORT, Launch
from p2p_llm_forge.peers.launch_files import LaunchFile
from p2p_llm_forge.peers.machine import judge_machine
from p2p_llm_forge.peers.routes import Main, judge_route

CLOCK_TRIES = 5
LARGEST_CLOCK_OFFSET_S = 1.0
FOLDER_LAG_S = 3.0  # a network share may show a new file late
CHECKED = ".check.lock"  # of nobody else: a run may be using the folder meanwhile


def judge_alone(config: CheckConfig, launch: Launch, file: LaunchFile | None) -> list[Finding]:
    """What one machine can find: what it has, and its route to the main address."""
    found = []
    if file is not None and not config.meet and launch.world_size not in (1, file.processes):
        started = f"{launch.world_size} processes were started, {file.path} promises"
        fix = "start all machines with files of the same launch"
        found.append(failure("launch", f"{started} {file.processes}", fix))
    if launch.local_rank:
        return found  # one process speaks for its machine
    found += judge_machine(config, launch)
    machines, host, port = launch.machines, launch.master_addr, launch.master_port
    is_main = launch.rank < launch.local_world_size
    if file is not None and launch.world_size == 1:
        machines, host, port, is_main = file.machines, file.address, file.port, file.rank == 0
    if machines > 1 and host is not None:
        main = Main(host, port or DEFAULT_PORT, machines, is_main, launch.world_size > 1)
        found += judge_route(main, launch, config.allow_public_address)
    return found


def gather_findings(cluster: Cluster, own: list[Finding], hosts: list[str]) -> list[Finding]:
    """Every rank's findings, each with the name of its rank. All ranks must call."""
    facts = cluster.gather_facts({"findings": [vars(finding) for finding in own]})
    found = []
    for rank, (fact, host) in enumerate(zip(facts, hosts, strict=True)):
        name = f"rank {rank} ({host})"
        with as_sent_by(name):
            of_rank = own if rank == cluster.rank else findings_of_peer(name, fact["findings"])
        found += [replace(finding, where=name) for finding in of_rank]
    return found


def judge_peers(config: CheckConfig, cluster: Cluster, hosts: list[str]) -> list[Finding]:
    """What the peers find together; the same on every rank. All ranks must call."""
    found = []
    if cluster.world_size > 1:
        found.append(fine("rendezvous", f"all {cluster.world_size} processes are here"))
        found += judge_pythons(cluster, hosts)
        found += judge_clocks(cluster, hosts)
    if config.output_dir:
        folder, keeps_own_state = Path(config.output_dir), config.keeps_own_state()
        found += judge_folders(cluster, folder, keeps_own_state, hosts)
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
    found = []
    for rank, offset in enumerate(by_rank):
        if abs(offset) > LARGEST_CLOCK_OFFSET_S:
            apart = f"{abs(offset):.1f} s {'ahead of' if offset > 0 else 'behind'} that of rank 0"
            fix = "on that machine: sudo timedatectl set-ntp true (else times in logs differ)"
            clock = f"the clock of rank {rank} ({hosts[rank]}) is {apart}"
            found.append(warning("clock", clock, fix))
    return found or [fine("clock", f"at most {max(map(abs, by_rank)):.3f} s apart")]


def judge_pythons(cluster: Cluster, hosts: list[str]) -> list[Finding]:
    """Whether all ranks run the same minor version of Python; libraries are compared before."""
    own = ".".join(platform.python_version_tuple()[:2])
    pythons = [fact["python"] for fact in cluster.gather_facts({"python": own})]
    first = pythons[0]
    fix = f"use Python {first} there too: libraries may behave otherwise"
    found = []
    for rank, python in enumerate(pythons):
        if python != first:
            differs = f"rank {rank} ({hosts[rank]}) has Python {python}, rank 0 has {first}"
            found.append(warning("versions", differs, fix))
    return found or [fine("versions", f"all ranks have the same libraries and Python {first}")]


def judge_folders(
    cluster: Cluster, folder: Path, keeps_own_state: bool, hosts: list[str]
) -> list[Finding]:
    """Which machines have an --output-dir of their own, and what travels then. All ranks must call.

    folder: of this rank. Leaves nothing behind.
    """
    try:
        with keep(cluster, folder / CHECKED, f"--output-dir {folder}") as (keepers, _):
            others = [rank for rank, keeper in enumerate(keepers.of) if keeper]
    except ForgeError as error:
        return failures("folder", error)
    if not others:
        return [fine("folder", f"{folder} is seen by all ranks")]
    own = ", ".join(f"rank {rank} ({hosts[rank]})" for rank in others)
    have = "has" if len(others) == 1 else "have"
    found = f"{own} {have} another --output-dir than rank 0: checkpoints travel there to resume"
    if keeps_own_state:
        found += ", and to rank 0 what only other ranks have of one"
    return [fine("folder", found)]
