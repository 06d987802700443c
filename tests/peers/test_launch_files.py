"""Launch files are judged by what Accelerate makes of them, and those that are written are good."""

from __future__ import annotations

import pytest
import yaml

from p2p_llm_forge.config import CheckConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.launch_files import (
    LaunchFile,
    by_hand,
    judge_launch_file,
    judge_together,
    read_launch_file,
    write_launch_files,
)
from tests import ROOT
from tests.peers import good_file

GOOD = {**good_file.GOOD, "machine_rank": 1}


def judged(gpus=0, **changes):
    keys = {key: value for key, value in {**GOOD, **changes}.items() if value != "absent"}
    return judge_launch_file(LaunchFile("my.yaml", keys), gpus)


@pytest.mark.parametrize("file", sorted((ROOT / "accelerate_configs").rglob("*.yaml")), ids=str)
def test_the_projects_own_files_are_good(file):
    gpus = 0 if read_launch_file(str(file)).keys.get("use_cpu") else 2
    assert {finding.level for finding in judge_launch_file(read_launch_file(str(file)), gpus)} == {
        "fine"
    }


def test_a_good_file_is_described_by_what_it_starts():
    (finding,) = judged()
    assert finding.found == "my.yaml: machine 1 of 2, 1 of 2 processes"


@pytest.mark.parametrize(
    ("changes", "found", "fix"),
    [
        ({"num_proceses": 2}, "unknown key 'num_proceses'", "did you mean num_processes"),
        ({"compute_environment": "AMAZON_SAGEMAKER"}, "AMAZON_SAGEMAKER", "LOCAL_MACHINE"),
        ({"machine_rank": 2}, "machine_rank is 2, and num_machines is 2", "from 0 to 1"),
        ({"num_processes": 1}, "num_processes is 1 for 2 machine", "write 2 for 1 on each"),
        ({"num_processes": 3}, "num_processes is 3 for 2 machine", "write 4 for 2 on each"),
        ({"num_processes": "absent"}, "num_processes is missing", "write 2"),
        ({"num_processes": "2"}, "num_processes is '2'", "whole number"),
        ({"distributed_type": "MULTI_CPU"}, "knows nothing of the others", "MULTI_GPU"),
        ({"distributed_type": "NO"}, "knows nothing of the others", "MULTI_GPU"),
        ({"distributed_type": False}, "YAML reads as false", "'NO' in quotes"),
        ({"distributed_type": "FSDP"}, "FSDP is not supported", "MULTI_GPU"),
        ({"distributed_type": "absent"}, "no distributed_type", "MULTI_GPU"),
        ({"main_process_ip": "absent"}, "no main_process_ip", "address of machine 0"),
        ({"main_process_port": 0}, "main_process_port is 0", "such as 29500"),
        ({"main_process_port": "absent"}, "main_process_port is missing", "such as 29500"),
        ({"mixed_precision": False}, "YAML reads as false", "'no' in quotes"),
        ({"mixed_precision": "fp16"}, "fp16 on CPUs", "'no' or bf16"),
        ({"mpirun_config": {"mpirun_hostfile": "x"}}, "by MPI", "take it out"),
        ({"use_cpu": False, "gpu_ids": "0", "num_processes": 4}, "names 1 GPU", "gpu_ids: all"),
    ],
    ids=str,
)
def test_what_will_not_work_is_reported_with_its_fix(changes, found, fix):
    failures = [finding for finding in judged(**changes) if finding.level == "failure"]
    assert any(found in finding.found and fix in finding.fix for finding in failures), failures


@pytest.mark.parametrize(
    ("gpus", "changes", "found"),
    [
        (0, {"main_process_ip": "127.0.0.1"}, "each machine's own"),
        (0, {"rdzv_backend": "c10d"}, "is not read from the file"),
        (0, {"debug": True}, "checks every exchange"),
        (0, {"dynamo_config": {"dynamo_backend": "INDUCTOR"}}, "dynamo"),
        (0, {"use_cpu": False}, "this machine has none"),
        (2, {"use_cpu": False}, "starts 1 process(es) here, and this machine has 2"),
    ],
    ids=str,
)
def test_what_works_badly_is_a_warning(gpus, changes, found):
    findings = judged(gpus, **changes)
    assert {finding.level for finding in findings} == {"fine", "warning"}
    assert any(found in finding.found for finding in findings if finding.fix)


def test_a_file_for_cpus_is_good_on_a_machine_with_gpus():
    assert [finding.level for finding in judged(gpus=2)] == ["fine"]


def test_a_check_without_a_launcher_computes_where_the_file_says():
    for use_cpu in (True, False):
        file = LaunchFile("my.yaml", {**GOOD, "use_cpu": use_cpu})
        assert by_hand(CheckConfig(), file).cpu is use_cpu
        assert by_hand(CheckConfig(cpu=True), file).cpu is True


def test_files_of_one_launch_agree_and_have_numbers_of_their_own():
    def together(*changes):
        files = [LaunchFile(f"n{n}.yaml", {**GOOD, **own}) for n, own in enumerate(changes)]
        return [(finding.level, finding.found) for finding in judge_together(files)]

    assert together({"machine_rank": 0}, {}) == [("fine", "2 files of one launch")]
    assert together({}) == []
    assert together({}, {}) == [
        ("failure", "n0.yaml and n1.yaml both have machine_rank 1"),
        ("warning", "no file was given for machine 0 of 2"),
    ]
    other = {"main_process_ip": "10.0.0.9", "main_process_port": 1, "num_processes": 4}
    found = together({"machine_rank": 0}, {**other, "mixed_precision": "bf16"})
    assert [text for _, text in found] == [
        "n1.yaml has num_processes 4, n0.yaml has 2",
        "n1.yaml has main_process_ip 10.0.0.9, n0.yaml has 10.0.0.1",
        "n1.yaml has main_process_port 1, n0.yaml has 29500",
        "n1.yaml has mixed_precision bf16, n0.yaml has no",
    ]


@pytest.mark.parametrize("gpus", [None, 2])
@pytest.mark.parametrize("hosts", [["10.0.0.1"], ["10.0.0.1", "10.0.0.2", "berta"]], ids=len)
def test_files_that_are_written_are_good(tmp_path, hosts, gpus):
    lines = write_launch_files(tmp_path / "out", hosts, 29500, gpus, overwrite=False)
    files = sorted((tmp_path / "out").iterdir())
    assert len(lines) == len(files) == len(hosts)
    read = [read_launch_file(str(file)) for file in files]
    for file in read:
        assert {found.level for found in judge_launch_file(file, gpus or 0)} == {"fine"}
        assert file.processes == len(hosts) * (gpus or 1)
    assert {found.level for found in judge_together(read)} <= {"fine"}
    assert f"on {hosts[-1]}:  accelerate launch --config_file {files[-1]} train.py" in lines[-1]
    assert "#" in files[0].read_text() and yaml.safe_load(files[0].read_text())
    with pytest.raises(ForgeError, match="would overwrite"):
        write_launch_files(tmp_path / "out", hosts, 29500, gpus, overwrite=False)


@pytest.mark.parametrize("number", [None, "absent", "two", -1, [2]], ids=str)
def test_a_number_that_is_none_hides_no_strangers(number):
    judged_as = [f.found for f in judged(distributed_type="MULTI_CPU", num_processes=number)]
    assert any("knows nothing of the others" in found for found in judged_as)
    alone = judged(distributed_type="MULTI_CPU", num_processes=number, num_machines=1)
    assert any("knows nothing of the others" in finding.found for finding in alone)


def test_addresses_that_are_each_machines_own_are_not_written(tmp_path):
    """The check of such files would warn of them."""
    for own in ("127.0.0.1", "localhost", "::1"):
        with pytest.raises(ForgeError, match=f"names {own}, which is each machine's own"):
            write_launch_files(tmp_path / "out", ["10.0.0.1", own], 29500, None, False)
    assert not (tmp_path / "out").exists()
    assert write_launch_files(tmp_path / "out", ["127.0.0.1"], 29500, None, False)


def test_what_cannot_be_read_or_written_is_reported(tmp_path):
    with pytest.raises(ForgeError, match="no such file"):
        read_launch_file(str(tmp_path / "nothing.yaml"))
    (tmp_path / "list.yaml").write_text("- 1\n")
    with pytest.raises(ForgeError, match="holds a list"):
        read_launch_file(str(tmp_path / "list.yaml"))
    with pytest.raises(ForgeError, match="names 10.0.0.1 twice"):
        write_launch_files(tmp_path, ["10.0.0.1", "10.0.0.1"], 29500, None, False)
    for wrong in ("", "a b", "user@berta", "10.0.0.2:22", "10.0.0.300", "10.0.0.2,10.0.0.3"):
        with pytest.raises(ForgeError, match=f"names '{wrong}', which is no address"):
            write_launch_files(tmp_path, ["10.0.0.1", wrong], 29500, None, False)
