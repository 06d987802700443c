"""Tell whether a launch will work, why not, what to change, and how fast it will be.

python check_cluster.py --config-file my_node.yaml
python check_cluster.py --config-file my_node.yaml --meet --dataset-path data/prepared/x ...
accelerate launch --config_file my_node.yaml check_cluster.py --dataset-path data/prepared/x ...
"""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from p2p_llm_forge.config import CheckConfig, parse
from p2p_llm_forge.errors import ForgeError, run_script
from p2p_llm_forge.peers.findings import (
    FAILURE,
    WORKS,
    WORKS_WITH_WARNINGS,
    ClusterReport,
    Finding,
    Refused,
    failure,
    failures,
    fine,
    warning,
)
from p2p_llm_forge.peers.launch import DEFAULT_PORT, Launch, has_launcher, local_rank, read_launch
from p2p_llm_forge.peers.launch_files import (
    LaunchFile,
    judge_launch_file,
    judge_together,
    read_launch_file,
    write_launch_files,
)

if TYPE_CHECKING:  # heavy libraries are imported where they are used: --help answers at once
    from p2p_llm_forge.data.dataset import PreparedDataset
    from p2p_llm_forge.peers.cluster import Cluster
    from p2p_llm_forge.peers.links import Links

LINKS_S = 30.0  # what measuring all links may take, about
LINK_S, SHORTEST_LINK_S = 0.5, 0.15  # for one link in one direction


def check(config: CheckConfig) -> ClusterReport:
    """Look at the launch that `config` and the environment describe, and change nothing.

    Alone with `--config-file`, says what can be said without peers; started on all machines, meets
    the peers and measures. The report of rank 0 holds the findings of all ranks. Raises ForgeError
    for flags that make no sense.
    """
    config.problems().raise_any()
    report = ClusterReport()
    files = [read_launch_file(path) for path in config.config_file]
    report.findings += look_at_files(files)
    if len(files) > 1:  # and one machine cannot say more about the others
        report.is_of_one_machine = True
        return report
    file = files[0] if files else None
    if config.meet and file is not None:
        config = by_hand(config, file)
    launch = read_or_refuse(config, report)
    if launch is None:
        return report
    report.rank = launch.rank
    report.findings += look_at_promise(launch, file, config)
    report.findings += look_before(config, launch, file)
    if launch.world_size == 1 and file is not None and file.processes > 1:
        report.is_of_one_machine = True
        return report
    look_together(config, report)
    return report


def look_at_files(files: list[LaunchFile]) -> list[Finding]:
    """The launch files, each and together."""
    if not files:
        return []
    import torch

    gpus = torch.accelerator.device_count() if torch.accelerator.is_available() else 0
    found = [finding for file in files for finding in judge_launch_file(file, gpus)]
    return found + judge_together(files)


def by_hand(config: CheckConfig, file: LaunchFile) -> CheckConfig:
    """The launch of the file with one process on each machine, which needs no launcher.

    `accelerate launch` (1.15) waits 15 minutes for a missing machine before any script begins, and
    does not say so.
    """
    return replace(
        config,
        rank=file.rank,
        world_size=file.machines,
        master_addr=file.address or "127.0.0.1",
        master_port=file.port,
    )


def read_or_refuse(config: CheckConfig, report: ClusterReport) -> Launch | None:
    """This process's place in the launch; None, with a finding, if there is none."""
    try:
        return read_launch(config)
    except ForgeError as error:
        report.findings += failures("launch", error)
        return None


def look_at_promise(launch: Launch, file: LaunchFile | None, config: CheckConfig) -> list[Finding]:
    """Whether a launcher has started as many processes as the file promises."""
    if file is None or config.meet or launch.world_size in (1, file.processes):
        return []
    return [
        failure(
            "launch",
            f"{launch.world_size} processes were started, {file.path} promises {file.processes}",
            "start all machines with files of the same launch",
        )
    ]


def look_before(config: CheckConfig, launch: Launch, file: LaunchFile | None) -> list[Finding]:
    """What one machine can say: what it has, and its way to the main address."""
    from p2p_llm_forge.peers.machine import judge_machine
    from p2p_llm_forge.peers.routes import Main, judge_route

    if launch.local_rank:
        return []  # one process speaks for its machine
    found = judge_machine(config, launch)
    machines = launch.world_size // launch.local_world_size
    host, port, rank = launch.master_addr, launch.master_port, launch.rank
    if file is not None and launch.world_size == 1:
        machines, host, port, rank = file.machines, file.address, file.port, file.rank
    if machines > 1 and host is not None:
        is_here = rank < launch.local_world_size
        main = Main(host, port or DEFAULT_PORT, machines, is_here, launch.world_size > 1)
        found += judge_route(main, launch, config.allow_public_address)
    return found


def look_together(config: CheckConfig, report: ClusterReport) -> None:
    """Meet the peers and add what they say together; rank 0 gets the findings of all."""
    from p2p_llm_forge.peers.join import join

    try:
        with join(config) as cluster:
            share_findings(cluster, report)
            measure(config, cluster, report)
    except Refused as refusal:
        known = {finding.found for finding in report.findings}  # what one rank sees by itself
        report.findings += [found for found in refusal.findings if found.found not in known]
    except ForgeError as error:
        report.findings += failures("peers", error)


def share_findings(cluster: Cluster, report: ClusterReport) -> None:
    """Bring every rank's findings together, each with its name."""
    from p2p_llm_forge.peers.preflight import hosts_of

    report.peers = hosts_of(cluster)
    told = cluster.gather_facts({"findings": [vars(finding) for finding in report.findings]})
    report.findings = [
        Finding(**{**finding, "where": f"rank {rank} ({report.peers[rank]})"})
        for rank, fact in enumerate(told)
        for finding in fact["findings"]
    ]


def measure(config: CheckConfig, cluster: Cluster, report: ClusterReport) -> None:
    """What the peers find out together: the same report on every rank."""
    from p2p_llm_forge.peers import preflight
    from p2p_llm_forge.peers.links import measure_links

    add, hosts = report.findings.extend, report.peers
    if cluster.world_size > 1:
        add([fine("rendezvous", f"all {cluster.world_size} processes are here")])
        add(preflight.judge_pythons(cluster, hosts))
        add(preflight.judge_clocks(cluster, hosts))
    if config.output_dir:
        folder = Path(config.output_dir)
        is_needed = bool(config.resume) or config.keeps_own_state()
        add(preflight.judge_shared_folder(cluster, folder, is_needed, hosts))
    # Before the links: what cannot be trained need not be fast.
    data = look_at_data(config, cluster, report)
    ways = cluster.world_size * (cluster.world_size - 1)
    links = measure_links(cluster, max(SHORTEST_LINK_S, min(LINK_S, LINKS_S / max(1, ways))))
    if cluster.world_size > 1:
        report.latency_s, report.bytes_per_s = links.latency_s, links.bytes_per_s
    if data is not None:
        time_an_update(config, cluster, data, links, report)


def look_at_data(
    config: CheckConfig, cluster: Cluster, report: ClusterReport
) -> PreparedDataset | None:
    """The prepared dataset, if all ranks have the same one."""
    from p2p_llm_forge.training.setup import open_data

    if not config.dataset_path:
        told = "no --dataset-path: data and the time of an update were not looked at"
        report.findings.append(fine("data", told))
        return None
    if cluster.main_only(lambda: Path(config.dataset_path).is_file()):
        fix = "prepare it with prepare_data.py first, to have it checked"
        report.findings.append(warning("data", f"{config.dataset_path} is a text", fix))
        return None
    try:
        data = open_data(config, cluster)
    except ForgeError as error:
        report.findings += failures("data", error)
        return None
    blocks = data.manifest.splits["train"].blocks
    report.findings.append(
        fine("data", f"{data.manifest.fingerprint[:12]}, {blocks} blocks, the same on all ranks")
    )
    return data


def time_an_update(
    config: CheckConfig,
    cluster: Cluster,
    data: PreparedDataset,
    links: Links,
    report: ClusterReport,
) -> None:
    """Time the real model on each rank's own hardware; add the times and what follows of them."""
    from p2p_llm_forge.model.load import without_progress_bars
    from p2p_llm_forge.peers.machine import judge_checkpoints
    from p2p_llm_forge.sync.forecast import table
    from p2p_llm_forge.training.forecast import forecasts, update_s_by_rank
    from p2p_llm_forge.training.new_model import new_model
    from p2p_llm_forge.training.setup import make_plan

    without_progress_bars()
    try:
        plan = make_plan(config, cluster, data)
        lm = cluster.together(lambda: new_model(config, cluster, data))
    except ForgeError as error:
        report.findings += failures("model", error)
        return
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
    if cluster.is_main:
        report.findings.append(judge_checkpoints(config, trained))
    report.update_s = update_s_by_rank(config, cluster, data, plan, lm)
    if cluster.world_size > 1:
        ways = forecasts(config, cluster, plan, lm, links, report.update_s)
        report.forecast = table(ways)


def show(report: ClusterReport, config: CheckConfig) -> None:
    """Print the report: all of it on the main process, a peer's own failures elsewhere."""
    if report.rank:
        own = f"rank {report.rank} (" if report.peers else ""
        report = ClusterReport(
            [f for f in report.findings if f.level == FAILURE and f.where.startswith(own)],
            rank=report.rank,
        )
        if not report.findings:
            return
    print(json.dumps(report.as_dict(), indent=1) if config.json else report.text(), flush=True)


def write_configs(config: CheckConfig) -> None:
    """Write the launch files, and say what to run where."""
    config.problems().raise_any()
    folder, port = Path(str(config.write_configs)), config.master_port or DEFAULT_PORT
    lines = write_launch_files(folder, config.hosts, port, config.gpus_per_host, config.overwrite)
    print("\n".join(lines))
    print(
        "before that, on all machines:  python check_cluster.py --meet --config-file THE_FILE ..."
    )


def main() -> int:
    """The command line."""
    config = parse(CheckConfig, sys.argv[1:], "check_cluster.py")
    if config.write_configs:
        write_configs(config)
        return 0
    with contextlib.redirect_stdout(sys.stderr):  # the report alone is for programs
        report = check(config)
    show(report, config)
    status = report.status()
    # A launcher turns every status but 0 into 1 and a traceback of its own.
    return WORKS if has_launcher() and status == WORKS_WITH_WARNINGS else status


if __name__ == "__main__":
    run_script(main, local_rank())
