"""check_cluster.py on one machine: its flags, its report and its exit status."""

from __future__ import annotations

import json
import socket
import sys

import pytest

from check_cluster import check, main
from p2p_llm_forge.config import CheckConfig
from p2p_llm_forge.errors import ForgeError
from tests import ROOT
from tests.runs import TINY

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
