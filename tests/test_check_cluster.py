"""check_cluster.py on one machine: its flags, its report and its exit status."""

from __future__ import annotations

import json
import math
import socket
import sys
import time

import pytest

from check_cluster import check, main
from p2p_llm_forge.config import CheckConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import preflight
from p2p_llm_forge.peers.findings import ClusterReport, failure, fine, warning
from tests import ROOT
from tests.runs import TINY_MODEL

TWO_MACHINES = [
    str(ROOT / "accelerate_configs" / "two_machines" / f"node{node}.yaml") for node in (0, 1)
]


def run_main(monkeypatch, capsys, *argv):
    monkeypatch.setattr(sys, "argv", ["check_cluster.py", *map(str, argv)])
    status = main()
    return status, capsys.readouterr().out


def test_the_status_is_that_of_the_worst_finding():
    report = ClusterReport([fine("a", "good")])
    assert report.status() == 0
    report.findings.append(warning("b", "so so", "do that"))
    assert report.status() == 3
    report.findings.append(failure("c", "bad", "do this"))
    assert report.status() == 1
    assert "fix: do this" in report.text() and "will not work" in report.text()
    with pytest.raises(AssertionError):
        failure("d", "bad", "")


def test_a_table_marks_the_slowest_link_and_json_has_no_nan():
    report = ClusterReport(peers=["anna", "berta"])
    report.bytes_per_s = [[math.nan, 1.25e6], [1.25e8, math.nan]]
    report.latency_s = [[math.nan, 0.001], [0.001, math.nan]]
    assert "rank 0 (anna)   -       10.0 <- slowest" in report.text()
    assert json.loads(json.dumps(report.as_dict(), allow_nan=False))["latency_s"][0] == [None, 1e-3]


def test_files_of_several_machines_are_compared(monkeypatch, capsys):
    status, told = run_main(monkeypatch, capsys, "--config-file", *TWO_MACHINES)
    assert status == 0 and "2 files of one launch" in told
    status, told = run_main(monkeypatch, capsys, "--config_file", TWO_MACHINES[0], TWO_MACHINES[0])
    assert status == 1 and "both have machine_rank 0" in told


def test_files_are_written_with_the_lines_to_run(monkeypatch, capsys, tmp_path):
    folder = tmp_path / "out"
    hosts = ("--hosts", "10.0.0.1", "10.0.0.2", "--cpu")
    status, told = run_main(monkeypatch, capsys, "--write-configs", folder, *hosts)
    assert status == 0
    assert f"on 10.0.0.2:  accelerate launch --config_file {folder}/node1.yaml train.py" in told
    status, told = run_main(
        monkeypatch, capsys, "--json", "--config-file", folder / "node0.yaml", folder / "node1.yaml"
    )
    assert status == 0 and json.loads(told)["status"] == 0


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        ({"hosts": ["10.0.0.1"]}, "belong together"),
        ({"gpus_per_host": 2, "cpu": True}, "contradict"),
        ({"gpus_per_host": 0}, "--gpus-per-host is 0"),
        ({"meet": True}, "--meet needs the file"),
        ({"batch_size": 0}, "--batch-size is 0"),
    ],
    ids=str,
)
def test_flags_that_make_no_sense_are_refused(flags, told):
    with pytest.raises(ForgeError, match=told):
        check(CheckConfig(**flags))


def test_a_process_alone_times_the_real_model_and_changes_nothing(prepared, tmp_path):
    config = CheckConfig(
        dataset_path=str(prepared),
        output_dir=str(tmp_path / "run"),
        config_overrides=TINY_MODEL,
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


class Clocks:
    """Stands for a cluster whose ranks' clocks are so many seconds off."""

    def __init__(self, *offsets):
        self.offsets = offsets

    def gather_numbers(self, values):
        return [[time.time() + offset] for offset in self.offsets]


def test_a_clock_that_is_off_is_named():
    (finding,) = preflight.judge_clocks(Clocks(0, 0.2, -90), ["anna", "berta", "carla"])
    assert finding.level == "warning" and "rank 2 (carla) is 90.0 s behind" in finding.found
    (finding,) = preflight.judge_clocks(Clocks(0, 0.2), ["anna", "berta"])
    assert finding.level == "fine" and "0.2" in finding.found


def test_another_program_at_the_main_port_is_told_within_the_deadline(zygote, tmp_path):
    log = tmp_path / "log"
    with socket.create_server(("127.0.0.1", 0)) as silent:  # connects, and never says a word
        port = silent.getsockname()[1]
        flags = ["--world-size=2", "--rank=1", "--master-addr=127.0.0.1", "--peer-timeout=1"]
        pid = zygote.start([*flags, f"--master-port={port}", "--json"], log, script="check_cluster")
        assert zygote.wait(pid, 30) == 1
    report = json.loads(log.read_text())
    assert report["rank"] == 1
    (found,) = report["findings"]
    assert f"127.0.0.1:{port} is not rank 0 of a run (it said nothing for 1 s)" in found["found"]
