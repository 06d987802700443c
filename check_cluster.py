"""Check whether a launch will work, why not, what to change, and how fast it will be.

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
from p2p_llm_forge.peers import launch_files
from p2p_llm_forge.peers.addresses import brief_lookups
from p2p_llm_forge.peers.findings import WORKS, WORKS_WITH_WARNINGS, ClusterReport, fine, warning
from p2p_llm_forge.peers.launch import (
    DEFAULT_PORT,
    has_launcher,
    launcher_pid,
    local_rank,
    read_launch,
)
from p2p_llm_forge.peers.parent import end_with_parent

if TYPE_CHECKING:  # heavy libraries are imported where they are used: --help answers at once
    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.data.dataset import PreparedDataset
    from p2p_llm_forge.peers.cluster import Cluster
    from p2p_llm_forge.peers.links import Links
    from p2p_llm_forge.training.fetching import Trip


@brief_lookups()
def check(config: CheckConfig) -> ClusterReport:
    """Look at the launch that `config` and the environment describe, and change nothing.

    Alone with `--config-file`, finds what can be found without peers; started on all machines,
    meets the peers and measures. The report of rank 0 holds the findings of all ranks. Raises
    ForgeError for flags that make no sense.
    """
    config.problems().raise_any()
    files = [launch_files.read_launch_file(path) for path in config.config_file]
    report = ClusterReport(launch_files.judge_launch_files(files, config.cpu))
    report.is_of_one_machine = len(files) > 1
    if report.is_of_one_machine:
        return report  # one machine can find no more about the others
    from p2p_llm_forge.peers.preflight import judge_alone

    file = files[0] if files else None
    if config.meet and file is not None:
        config = launch_files.by_hand(config, file)
    with report.failures_as("launch"):
        launch = read_launch(config)
        report.rank = launch.rank
        report.findings += judge_alone(config, launch, file)
        is_alone = launch.world_size == 1
        report.is_of_one_machine = is_alone and file is not None and file.processes > 1
        if not report.is_of_one_machine:
            look_together(config, report)
    return report


def look_together(config: CheckConfig, report: ClusterReport) -> None:
    """Meet the peers and add what they find and measure together; rank 0 gets the findings of all.

    How fast the links are and an update is comes out the same on every rank.
    """
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.peers.links import Links, measure_links
    from p2p_llm_forge.peers.preflight import gather_findings, hosts_of, judge_peers
    from p2p_llm_forge.training.fetched_model import model_trips

    with report.failures_as("peers"), join(config) as cluster:
        report.peers = hosts_of(cluster)
        report.findings = gather_findings(cluster, report.findings, report.peers)
        report.findings += judge_peers(config, cluster, report.peers)
        # Before the links: what cannot be trained need not be fast.
        data, trips = look_at_data(config, cluster, report)
        trips += model_trips(config, cluster)
        if cluster.world_size > 1:
            links = measure_links(cluster)
            report.latency_s, report.bytes_per_s = links.latency_s, links.bytes_per_s
        if trips:
            measured = Links(report.latency_s, report.bytes_per_s)
            look_at_trips(config, trips, measured, report)
        if data is not None and not trips:
            time_an_update(config, cluster, data, report)


def look_at_data(
    config: CheckConfig, cluster: Cluster, report: ClusterReport
) -> tuple[PreparedDataset | None, list[Trip]]:
    """The prepared dataset, if all ranks have the same one; else what a run would fetch of it."""
    from p2p_llm_forge.training.fetched_data import (
        look_everywhere,
        refuse_to_fetch,
        trips_of,
        what_is_missing,
    )
    from p2p_llm_forge.training.job import find_data, open_found, settled
    from p2p_llm_forge.training.texts import refuse_different_texts, who_prepares

    add, path = report.findings.append, config.dataset_path
    if not path:
        add(fine("data", "no --dataset-path: data and the time of an update were not looked at"))
        return None, []
    with report.failures_as("data"):
        seen = look_everywhere(cluster, Path(path))
        maker = who_prepares(seen)
        if maker is not None:
            refuse_different_texts(config, cluster, seen, maker)
            fix = f"python prepare_data.py --dataset-path {path} --output-dir FOLDER, then check"
            add(warning("data", f"{path} is a text", f"{fix} with --dataset-path FOLDER"))
            return None, []
        # Whatever a run would do, nothing is written; and whether it resumes, rank 0 says.
        resume = cluster.main_only(lambda: config.resume)
        asked: TrainConfig = replace(config, dry_run=True, resume=resume)
        if resume:
            with contextlib.suppress(ForgeError):  # which is found again where the model is built
                asked = settled(asked, cluster)  # as the run has on record what it began with
        sought = find_data(asked, cluster)
        brought = what_is_missing(asked, cluster, sought)
        if brought is not None:
            if config.fetch == "never":
                refuse_to_fetch(cluster, sought.folder, brought)
            return None, trips_of(cluster, sought.folder, brought)
        data = open_found(asked, cluster, sought)
        name, blocks = data.manifest.fingerprint[:12], data.manifest.splits["train"].blocks
        add(fine("data", f"{name}, {blocks} blocks, the same on all ranks"))
        return data, []
    return None, []


def look_at_trips(
    config: CheckConfig, trips: list[Trip], links: Links, report: ClusterReport
) -> None:
    """Add what a run would fetch before it begins, and how long that takes."""
    from p2p_llm_forge.training.fetching import in_words, refuse_too_much

    with report.failures_as("data"):
        for line in in_words(trips, report.peers, links):
            what, text = line.split(maxsplit=1)
            later = "; the time of an update is seen when it is there"
            report.findings.append(fine(what, f"a run fetches {text}{later}"))
        if config.fetch != "yes":
            refuse_too_much(trips, report.peers, links)


def time_an_update(
    config: CheckConfig, cluster: Cluster, data: PreparedDataset, report: ClusterReport
) -> None:
    """Time the real model on each rank's own hardware; add the times and what follows of them."""
    from p2p_llm_forge.peers.links import Links
    from p2p_llm_forge.peers.machine import judge_checkpoints
    from p2p_llm_forge.sync.forecast import table
    from p2p_llm_forge.training.forecast import forecasts, update_s_by_rank
    from p2p_llm_forge.training.job import Job, make_plan, settled
    from p2p_llm_forge.training.learner import new_model

    with report.failures_as("model"):
        asked = settled(config, cluster)
        job = Job(asked, cluster, data, make_plan(asked, cluster, data))
        lm = cluster.together(lambda: new_model(job))
        trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        if cluster.is_main:
            report.findings.append(judge_checkpoints(config, trained))
        report.update_s = update_s_by_rank(job, lm)
        if cluster.world_size > 1:
            links = Links(report.latency_s, report.bytes_per_s)
            report.forecast = table(forecasts(job, lm, links, report.update_s))


def write_configs(config: CheckConfig) -> None:
    """Write the launch files, and print what to run where."""
    config.problems().raise_any()
    folder, port = Path(str(config.write_configs)), config.master_port or DEFAULT_PORT
    lines = launch_files.write_launch_files(
        folder, config.hosts, port, config.gpus_per_host, config.overwrite
    )
    check_first = "python check_cluster.py --meet --config-file THE_FILE ..."
    print(*lines, f"before that, on all machines:  {check_first}", sep="\n")


def main() -> int:
    """The command line."""
    config = parse(CheckConfig, sys.argv[1:], "check_cluster.py")
    if config.write_configs:
        write_configs(config)
        return WORKS
    with contextlib.redirect_stdout(sys.stderr):  # the report alone is for programs
        report = check(config)
    if config.json:
        print(json.dumps(report.as_dict(), indent=1) + "\n", end="", flush=True)  # in one piece
    elif shown := report.shown_by_its_rank():
        print(shown.text(), flush=True)
    status = report.status()
    # A launcher turns every status but 0 into 1 and a traceback of its own.
    return WORKS if has_launcher() and status == WORKS_WITH_WARNINGS else status


if __name__ == "__main__":
    end_with_parent(launcher_pid())
    run_script(main, local_rank())
