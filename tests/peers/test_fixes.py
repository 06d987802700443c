"""Fixes are followed to the letter, after which the same check finds nothing to fix."""

from __future__ import annotations

import re
import socket
import subprocess
from dataclasses import replace

import pytest
import yaml

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import addresses
from p2p_llm_forge.peers.findings import FINE
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.peers.launch_files import judge_launch_file, judge_together, read_launch_file
from p2p_llm_forge.peers.rendezvous import choose_endpoint
from p2p_llm_forge.peers.secret import read_secret
from tests.ports import free_port

GOOD = {
    "compute_environment": "LOCAL_MACHINE",
    "distributed_type": "MULTI_GPU",
    "use_cpu": True,
    "num_machines": 2,
    "num_processes": 2,
    "machine_rank": 0,
    "main_process_ip": "10.0.0.1",
    "main_process_port": 29500,
    "mixed_precision": "no",
}
ALONE = {"num_machines": 1, "num_processes": 1}
OUT = object()  # the key is taken out
# What is wrong in a file, what its fix says, and the file that does just that.
MISTAKES = [
    ({"colour": "red"}, "take it out", {"colour": OUT}),
    ({"num_machines": "two"}, "write a whole number", {"num_machines": 2}),
    (
        {"compute_environment": "AMAZON_SAGEMAKER"},
        "write LOCAL_MACHINE",
        {"compute_environment": "LOCAL_MACHINE"},
    ),
    ({**ALONE, "distributed_type": False}, "write 'NO' in quotes", {"distributed_type": "NO"}),
    (
        {"distributed_type": "MULTI_CPU"},
        "write `distributed_type: MULTI_GPU`",
        {"distributed_type": "MULTI_GPU"},
    ),
    (
        {"distributed_type": "NO"},
        "write `distributed_type: MULTI_GPU`",
        {"distributed_type": "MULTI_GPU"},
    ),
    (
        {"distributed_type": OUT},
        "write `distributed_type: MULTI_GPU`",
        {"distributed_type": "MULTI_GPU"},
    ),
    ({"num_machines": 0}, "write 1 or more", {"num_machines": 1}),
    ({"num_processes": 1}, "write 2 for 1 on each machine", {"num_processes": 2}),
    ({"num_processes": OUT}, "write 2 for 1 on each machine", {"num_processes": 2}),
    ({"machine_rank": 2}, "number the machines from 0 to 1", {"machine_rank": 1}),
    ({"main_process_ip": OUT}, "write the address of machine 0", {"main_process_ip": "10.0.0.1"}),
    (
        {"main_process_ip": "127.0.0.1"},
        "write the address of machine 0",
        {"main_process_ip": "10.0.0.1"},
    ),
    ({"main_process_port": OUT}, "such as 29500", {"main_process_port": 29500}),
    ({"main_process_port": 99999}, "such as 29500", {"main_process_port": 29500}),
    ({"mixed_precision": False}, "write 'no' in quotes", {"mixed_precision": "no"}),
    ({"mixed_precision": "fp16"}, "write 'no' or bf16", {"mixed_precision": "bf16"}),
    ({"rdzv_backend": "c10d"}, "take it out", {"rdzv_backend": OUT}),
    ({"debug": True}, "write false", {"debug": False}),
    ({"mpirun_config": {"mpirun_ccl": "1"}}, "take it out", {"mpirun_config": OUT}),
    ({"use_cpu": False}, "write `use_cpu: true`", {"use_cpu": True}),
]


def judged(folder, *changes):
    """What there is to fix in the good file with changes, one after the other."""
    keys = dict(GOOD)
    for change in changes:
        keys = {key: value for key, value in {**keys, **change}.items() if value is not OUT}
    file = folder / "node.yaml"
    file.write_text(yaml.safe_dump(keys))
    found = judge_launch_file(read_launch_file(str(file)), gpus=0)
    return [finding for finding in found if finding.level != FINE]


def test_the_good_file_has_nothing_to_fix(tmp_path):
    assert judged(tmp_path) == []


@pytest.mark.parametrize(("mistake", "fix", "followed"), MISTAKES, ids=range(len(MISTAKES)))
def test_the_fix_of_a_launch_file_leaves_nothing_to_fix(tmp_path, mistake, fix, followed):
    found = judged(tmp_path, mistake)
    assert any(fix in finding.fix for finding in found), found
    assert judged(tmp_path, mistake, followed) == []


@pytest.mark.parametrize(
    ("mistake", "fix"),
    [
        ({"machine_rank": 0}, "give every machine a number of its own, 0 to 1"),
        ({"main_process_port": 29600}, "write the same main_process_port"),
        ({"mixed_precision": "bf16"}, "write the same mixed_precision"),
    ],
    ids=["rank", "port", "precision"],
)
def test_the_fix_of_files_that_do_not_belong_together_makes_them_one_launch(tmp_path, mistake, fix):
    def together(second):
        files = []
        for number, keys in enumerate((GOOD, {**GOOD, "machine_rank": 1, **second})):
            files.append(tmp_path / f"node{number}.yaml")
            files[-1].write_text(yaml.safe_dump(keys))
        found = judge_together([read_launch_file(str(file)) for file in files])
        return [finding for finding in found if finding.level != FINE]

    assert any(fix in finding.fix for finding in together(mistake))
    assert together({}) == []


def test_the_fixes_of_a_secret_make_one_that_is_taken(tmp_path, monkeypatch):
    """Missing, too short, open to others: each command is run as it is printed."""
    monkeypatch.chdir(tmp_path)

    def follow(pattern):
        with pytest.raises(ForgeError) as refused:
            read_secret("cluster.secret")
        (command,) = re.findall(pattern, refused.value.problems[0].fix)
        subprocess.run(["sh", "-c", f"umask 022; {command}"], check=True)

    follow(r"`(.*?)`")
    assert len(read_secret("cluster.secret") or b"") == 64
    (tmp_path / "cluster.secret").write_text("short")
    follow(r"`(.*?)`")
    (tmp_path / "cluster.secret").chmod(0o644)
    follow(r"(chmod 600 \S+)")
    assert len(read_secret("cluster.secret") or b"") == 64


def test_the_fixes_of_a_port_and_a_name_lead_to_the_main_machine():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        found = addresses.judge_own_port(port)
        assert found.level != FINE and "choose another port" in found.fix
    assert addresses.judge_own_port(free_port()).level == FINE
    refused = addresses.judge_reach(
        addresses.probe("127.0.0.1", port), "127.0.0.1", port, "127.0.0.1"
    )
    assert "start machine 0 first" in refused.fix
    with socket.create_server(("127.0.0.1", port)):
        state = addresses.probe("127.0.0.1", port)
        assert addresses.judge_reach(state, "127.0.0.1", port, "127.0.0.1").level == FINE
    (name,) = addresses.judge_name("localhost", machines=2)
    assert "write the address of machine 0" in name.fix
    assert [one.level for one in addresses.judge_name("10.0.0.1", machines=2)] == [FINE]


def test_the_fix_of_an_interface_that_is_not_there_is_to_choose_none():
    launch = Launch(rank=1, world_size=2, master_addr="127.0.0.1", gloo_interface="none0")
    with pytest.raises(ForgeError) as refused:
        choose_endpoint(TrainConfig(), launch, {"GLOO_SOCKET_IFNAME": "none0"})
    assert "unset GLOO_SOCKET_IFNAME" in refused.value.problems[0].fix
    assert choose_endpoint(TrainConfig(), replace(launch, gloo_interface=None), {}) is not None
