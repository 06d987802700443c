"""check_cluster.py on one machine: its flags, its report and its exit status."""

from __future__ import annotations

import json
import shutil
import socket
import sys
from dataclasses import replace

import pytest

from check_cluster import check, look_at_data, look_at_trips, main
from p2p_llm_forge.config import CheckConfig, TrainConfig
from p2p_llm_forge.data.fetched import look
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.findings import FINE, ClusterReport
from p2p_llm_forge.peers.links import Links
from p2p_llm_forge.training.job import identity_without_data
from p2p_llm_forge.training.run_record import RunRecord
from p2p_llm_forge.training.settle import settle
from tests import ROOT
from tests.folders import tree
from tests.memory_channel import clusters, run_ranks
from tests.runs import TINY
from tests.training.machines import other_data

TWO_MACHINES = [
    str(ROOT / "accelerate_configs" / "two_machines" / f"node{node}.yaml") for node in (0, 1)
]


def run_main(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["check_cluster.py", *map(str, argv)])
    status = main()
    return status, capsys.readouterr().out


def test_files_of_several_machines_are_compared(monkeypatch, capsys):
    status, printed = run_main(monkeypatch, capsys, "--config-file", *TWO_MACHINES)
    assert status == 0 and "2 files of one launch" in printed
    status, printed = run_main(
        monkeypatch, capsys, "--config_file", TWO_MACHINES[0], TWO_MACHINES[0]
    )
    assert status == 1 and "both have machine_rank 0" in printed


def test_files_are_written_with_the_lines_to_run(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "out"
    hosts = ("--hosts", "10.0.0.1", "10.0.0.2", "--cpu")
    status, printed = run_main(monkeypatch, capsys, "--write-configs", folder, *hosts)
    assert status == 0
    assert f"on 10.0.0.2:  accelerate launch --config_file {folder}/node1.yaml train.py" in printed
    status, printed = run_main(
        monkeypatch, capsys, "--json", "--config-file", folder / "node0.yaml", folder / "node1.yaml"
    )
    assert status == 0 and json.loads(printed)["status"] == 0


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ({"hosts": ["10.0.0.1"]}, "belong together"),
        ({"gpus_per_host": 2, "cpu": True}, "contradict"),
        ({"gpus_per_host": 0}, "--gpus-per-host is 0"),
        ({"meet": True}, "--meet needs the file"),
        ({"batch_size": 0}, "--batch-size is 0"),
    ],
    ids=str,
)
def test_flags_that_make_no_sense_are_refused(flags, expected):
    with pytest.raises(ForgeError, match=expected):
        check(CheckConfig(**flags))


def test_a_process_alone_times_the_real_model_and_changes_nothing(prepared, tmp_path):
    config = CheckConfig(
        dataset_path=str(prepared),
        output_dir=str(tmp_path / "run"),
        **TINY,
        cpu=True,
    )
    report = check(config)
    assert report.status() == 0, report.text()
    assert len(report.update_s) == 1 and report.update_s[0] > 0
    assert report.forecast == [] and report.bytes_per_s == []
    assert not (tmp_path / "run").exists()


def test_a_launch_that_starts_strangers_is_a_finding(monkeypatch):
    monkeypatch.setenv("MASTER_ADDR", "10.0.0.1")
    report = check(CheckConfig())
    assert report.status() == 1 and "would train alone" in report.text()


@pytest.mark.slow
def test_another_program_at_the_main_port_is_reported_within_the_deadline(zygote, tmp_path):
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never answers
        port = silent.getsockname()[1]
        flags = ["--world-size=2", "--rank=1", "--master-addr=127.0.0.1", "--rendezvous-timeout=1"]
        pid = zygote.start([*flags, f"--master-port={port}", "--json"], log, script="check_cluster")
        assert zygote.wait(pid, 30) == 1
    report = json.loads(log.read_text())
    assert report["rank"] == 1
    (found,) = report["findings"]
    assert f"127.0.0.1:{port} is not rank 0 of a run (no answer for 1 s)" in found["found"]


def looked_at(config, homes, name="data", others_resume=True):
    """What each rank reports of its data, and what a run would fetch.

    others_resume: whether ranks beside rank 0 got its --resume as well.
    """

    def act(cluster):
        home = homes[cluster.rank]
        own = replace(config, dataset_path=str(home / name), output_dir=str(home / "run"))
        if cluster.rank and not others_resume:
            own.resume = None
        report = ClusterReport(peers=["attic", "desk", "cellar"])
        data, trips = look_at_data(own, cluster, report)
        if trips:
            look_at_trips(own, trips, LINKS, report)
        return data is not None, report

    with clusters(3) as ranks:
        return run_ranks(ranks, act)


LINKS = Links([[0.0] * 3 for _ in range(3)], [[1e6] * 3 for _ in range(3)])


def test_what_a_run_would_fetch_is_said_with_its_time_and_nothing_is_fetched(prepared, tmp_path):
    homes = [tmp_path / str(rank) for rank in range(3)]
    for home in homes:
        home.mkdir()
    shutil.copytree(prepared, homes[1] / "data")
    config = CheckConfig(output_dir=str(tmp_path / "run"))
    for has_data, report in looked_at(config, homes):
        (found,) = report.findings
        assert not has_data and found.level == FINE and found.topic == "data"
        assert "from rank 1 (desk) to rank 0 (attic) and rank 2 (cellar)" in found.found
        assert ": about 0 s at 8 Mbit/s" in found.found
    assert not any(any(home.iterdir()) for home in (homes[0], homes[2]))
    for _, report in looked_at(replace(config, fetch="never"), homes):
        assert "no such folder" in report.findings[0].found and report.status() == 1


def on_record(home, data):
    """A machine has a run on record that is trained on these data."""
    (home / "run").mkdir(exist_ok=True)
    config = settle(TrainConfig(str(data), str(home / "run")))
    identity = {**identity_without_data(config), "dataset": look(data).fingerprint}
    RunRecord(identity, started="1" * 32).write(home / "run")


def as_fetched(data):
    (data / "fetched.json").write_text(json.dumps({"manifest": look(data).manifest}))


def is_said_and_nothing_is_fetched(config, homes, name="data", others_resume=True):
    before = tree(homes[0].parent)
    for has_data, report in looked_at(config, homes, name, others_resume):
        (found,) = report.findings
        assert not has_data and found.level == FINE, found
        assert "from rank 1 (desk) to rank 0 (attic) and rank 2 (cellar)" in found.found
    assert tree(homes[0].parent) == before


@pytest.mark.parametrize("others_resume", [True, False])
def test_what_is_fetched_for_a_run_that_resumes_is_said_and_not_fetched_by_the_check(
    prepared, text_file, tmp_path, others_resume
):
    """Of two that were fetched, the run says which one counts."""
    homes = [tmp_path / str(rank) for rank in range(3)]
    shutil.copytree(prepared, homes[0] / "data")
    other_data(text_file, homes[1] / "data")
    homes[2].mkdir()
    for home in homes[:2]:
        as_fetched(home / "data")
        on_record(home, homes[1] / "data")
    config = CheckConfig(resume="auto")
    is_said_and_nothing_is_fetched(config, homes, others_resume=others_resume)


def test_what_a_lost_text_became_is_not_fetched_by_the_check(text_file, tmp_path):
    homes = [tmp_path / str(rank) for rank in range(3)]
    other_data(text_file, made := homes[1] / "run" / "prepared")
    homes[0].mkdir()
    homes[2].mkdir()
    for home in homes[1:]:
        on_record(home, made)
    is_said_and_nothing_is_fetched(CheckConfig(resume="auto"), homes, text_file.name)
