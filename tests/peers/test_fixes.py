"""Fixes of one machine are followed to the letter; then the same check finds nothing to fix."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import socket
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from check_cluster import check, write_configs
from p2p_llm_forge.config import CheckConfig, TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import addresses, launcher, machine, routes
from p2p_llm_forge.peers.findings import FAILURE, FINE, WARNING
from p2p_llm_forge.peers.launch import COMPILERS, Launch, read_launch
from p2p_llm_forge.peers.launch_files import (
    LaunchFile,
    judge_launch_file,
    judge_together,
    read_launch_file,
)
from p2p_llm_forge.peers.preflight import judge_alone
from p2p_llm_forge.peers.rendezvous import choose_endpoint
from p2p_llm_forge.peers.secret import read_secret
from tests import ROOT
from tests.peers.good_file import GOOD
from tests.ports import free_port
from tests.runs import TINY

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
    (
        {"distributed_type": "FSDP"},
        "write `distributed_type: MULTI_GPU`",
        {"distributed_type": "MULTI_GPU"},
    ),
    (
        {"num_machine": 2, "num_machines": OUT, "num_processes": 1},
        "did you mean num_machines",
        {"num_machine": OUT, "num_machines": 2, "num_processes": 2},
    ),
    ({"dynamo_config": {"dynamo_backend": "EAGER"}}, "take them out", {"dynamo_config": OUT}),
    ({"dynamo_backend": "EAGER"}, "take them out", {"dynamo_backend": OUT}),
]
# For GPUs: what is wrong in a file, on a machine with so many, the fix, and the file that does it.
GPUS = {"use_cpu": OUT, "num_processes": 4}
DEVICES = [
    ({"gpu_ids": "0"}, 2, "write `gpu_ids: all`", {"gpu_ids": "all"}),
    ({"gpu_ids": "0"}, 2, "or name one for each process", {"gpu_ids": "0,1"}),
    ({}, 3, "write num_processes: 6 in all files", {"num_processes": 6}),
    ({}, 1, "write num_processes: 2 in all files", {"num_processes": 2}),
    ({**ALONE, "num_processes": 2}, 1, "write num_processes: 1", {"num_processes": 1}),
    ({}, 0, "write `use_cpu: true`", {"use_cpu": True}),
]


def judged(folder, *changes, gpus=0):
    """What there is to fix in the good file with changes, one after the other."""
    keys = dict(GOOD)
    for change in changes:
        keys = {key: value for key, value in {**keys, **change}.items() if value is not OUT}
    file = folder / "node.yaml"
    file.write_text(yaml.safe_dump(keys))
    found = judge_launch_file(read_launch_file(str(file)), gpus)
    return [finding for finding in found if finding.level != FINE]


def test_the_good_file_has_nothing_to_fix(tmp_path):
    assert judged(tmp_path) == []


@pytest.mark.parametrize(("mistake", "fix", "followed"), MISTAKES, ids=range(len(MISTAKES)))
def test_the_fix_of_a_launch_file_leaves_nothing_to_fix(tmp_path, mistake, fix, followed):
    found = judged(tmp_path, mistake)
    assert any(fix in finding.fix for finding in found), found
    assert judged(tmp_path, mistake, followed) == []


@pytest.mark.parametrize(("mistake", "gpus", "fix", "followed"), DEVICES, ids=range(len(DEVICES)))
def test_the_fix_of_a_file_for_gpus_leaves_nothing_to_fix(tmp_path, mistake, gpus, fix, followed):
    (found,) = judged(tmp_path, GPUS, mistake, gpus=gpus)
    assert fix in found.fix
    assert judged(tmp_path, GPUS, mistake, followed, gpus=gpus) == []


def test_the_fix_of_a_file_for_gpus_may_be_a_flag(monkeypatch):
    monkeypatch.setattr(machine, "accelerators", lambda: 0)
    files = [str(ROOT / f"accelerate_configs/two_machines_gpu/node{n}.yaml") for n in (0, 1)]
    found = [one for one in check(CheckConfig(config_file=files)).findings if one.level == WARNING]
    assert len(found) == 2 and all("add --cpu" in one.fix for one in found)
    assert check(CheckConfig(config_file=files, cpu=True)).status() == 0


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


def test_the_fixes_of_a_file_that_is_missing_are_to_name_it_or_to_count_those_there_are():
    def together(machines, *ranks):
        keys = {**GOOD, "num_machines": machines}
        return judge_together([LaunchFile(f"{n}", {**keys, "machine_rank": n}) for n in ranks])

    (found,) = together(3, 0, 1)
    assert found.fix.startswith("name the files of all machines, or set num_machines to as many as")
    (third,), (fewer,) = together(3, 0, 1, 2), together(2, 0, 1)
    assert third.level == fewer.level == FINE


# What is typed after --write-configs FOLDER, the fix, and what is typed then.
WRITTEN = [
    (["--hosts", "anna:22", "b"], "names of machines with spaces", ["--hosts", "anna", "b"]),
    (["--hosts", "a", "a"], "give each machine once", ["--hosts", "a", "b"]),
    (
        ["--hosts", "127.0.0.1", "b"],
        "write the address of that machine",
        ["--hosts", "10.0.0.1", "b"],
    ),
    ([], "give both: --write-configs FOLDER --hosts", ["--hosts", "a", "b"]),
]


def written(folder, words):
    hosts = words[1:]
    write_configs(CheckConfig(write_configs=str(folder), hosts=hosts))
    return [node.name for node in sorted(folder.iterdir())]


@pytest.mark.parametrize(("mistake", "fix", "followed"), WRITTEN, ids=range(len(WRITTEN)))
def test_the_fixes_of_files_to_write_let_them_be_written(tmp_path, mistake, fix, followed):
    with pytest.raises(ForgeError) as refused:
        written(tmp_path, mistake)
    assert fix in refused.value.problems[0].fix
    assert written(tmp_path, followed) == ["node0.yaml", "node1.yaml"]


def test_the_fixes_of_a_folder_let_files_be_written(tmp_path):
    (tmp_path / "node0.yaml").touch()
    with pytest.raises(ForgeError) as refused:
        written(tmp_path, ["--hosts", "a"])
    assert refused.value.problems[0].fix == "choose another folder, or add --overwrite"
    write_configs(CheckConfig(write_configs=str(tmp_path), hosts=["a"], overwrite=True))
    with pytest.raises(ForgeError) as refused:
        written(tmp_path / "node0.yaml", ["--hosts", "a"])
    assert refused.value.problems[0].fix == "choose another folder"
    assert written(tmp_path / "another", ["--hosts", "a"]) == ["node0.yaml"]


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


# An environment, flags, what the fix says, and the environment and flags that do it.
BY_HAND = {"rank": 1, "world_size": 2, "master_addr": "10.0.0.1", "master_port": 29500}
LAUNCHED = {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
ELASTIC = {**LAUNCHED, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_USE_AGENT_STORE": "True"}
ENVIRONMENTS = [
    ({**LAUNCHED, "RANK": "a"}, {}, "unset RANK, or start the script with torchrun", {}, {}),
    (
        *({**LAUNCHED, "LOCAL_RANK": "2", "LOCAL_WORLD_SIZE": "2"}, {}),
        *("or correct them on this machine", {**LAUNCHED, "LOCAL_WORLD_SIZE": "2"}, {}),
    ),
    ({"ACCELERATE_USE_CPU": "maybe"}, {}, "set it to true or", {"ACCELERATE_USE_CPU": "true"}, {}),
    ({"ACCELERATE_USE_FSDP": "true"}, {}, "write `distributed_type: MULTI_GPU`", LAUNCHED, {}),
    ({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "bf16", {"ACCELERATE_MIXED_PRECISION": "bf16"}, {}),
    (
        *({"ACCELERATE_MIXED_PRECISION": "fp8"}, {}, "or add --mixed-precision"),
        *({"ACCELERATE_MIXED_PRECISION": "fp8"}, {"mixed_precision": "bf16"}),
    ),
    *(
        *[
            (
                *({"ACCELERATE_DYNAMO_BACKEND": "ipex"}, {}, name),
                *({"ACCELERATE_DYNAMO_BACKEND": name}, {}),
            )
            for name in COMPILERS
        ],
        ({"ACCELERATE_DYNAMO_BACKEND": "ipex"}, {}, "take it out and add", {}, {"compile": "on"}),
    ),
    ({"OMP_NUM_THREADS": "many"}, {}, "unset OMP_NUM_THREADS", {}, {}),
    ({"OMP_NUM_THREADS": "many"}, {}, "set it to the threads of", {"OMP_NUM_THREADS": "2"}, {}),
    (
        *(ELASTIC, {}, "start torchrun with TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"),
        *({**ELASTIC, "TORCHELASTIC_USE_AGENT_STORE": "False"}, {}),
    ),
    (LAUNCHED, {**BY_HAND, "world_size": 3}, "leave out --rank, --world-size,", LAUNCHED, {}),
    (
        *(LAUNCHED, {**BY_HAND, "world_size": 3}, "start the script without the launcher"),
        *({}, {**BY_HAND, "world_size": 3}),
    ),
    ({"PMI_SIZE": "2"}, {}, "start it with torchrun", {"PMI_SIZE": "2", **LAUNCHED}, {}),
    ({"PMI_SIZE": "2"}, {}, "or by hand with --rank, --world-size,", {"PMI_SIZE": "2"}, BY_HAND),
    ({"WORLD_SIZE": "2"}, {}, "unset WORLD_SIZE", {}, {}),
    ({"MASTER_ADDR": "a"}, {}, "add --world-size 1", {"MASTER_ADDR": "a"}, {"world_size": 1}),
]


@pytest.mark.parametrize(
    ("environ", "flags", "fix", "then", "flags_then"), ENVIRONMENTS, ids=range(len(ENVIRONMENTS))
)
def test_the_fix_of_an_environment_makes_a_launch_of_it(environ, flags, fix, then, flags_then):
    with pytest.raises(ForgeError) as refused:
        read_launch(TrainConfig(**flags), environ)
    assert fix in refused.value.problems[0].fix
    assert isinstance(read_launch(TrainConfig(**flags_then), then), Launch)


def test_the_fix_of_a_launch_that_shares_its_store_is_a_script_that_is_there(run):
    with pytest.raises(ForgeError) as refused:
        read_launch(TrainConfig(), ELASTIC)
    (line,) = re.findall(
        r"`python (launch/elastic\.py --main .*?) \.\.\.`", refused.value.problems[0].fix
    )
    script, *flags = [word for word in shlex.split(line) if word.startswith(("-", "launch"))]
    status, printed = run(sys.executable, script, "--help")
    assert status == 0 and all(flag in printed for flag in [*flags, "--secret-file"])


def test_the_fix_of_a_launch_of_other_files_is_their_own(monkeypatch):
    monkeypatch.setattr("p2p_llm_forge.peers.preflight.judge_machine", lambda *_: [])
    file = LaunchFile("my.yaml", {"num_processes": 4, "num_machines": 1})

    def failures(world_size):
        launch = Launch(world_size=world_size, local_world_size=world_size)
        found = judge_alone(CheckConfig(), launch, file)
        return [finding.fix for finding in found if finding.level == FAILURE]

    assert failures(2) == ["start all machines with files of the same launch"]
    assert failures(file.processes) == []


def test_the_fixes_of_a_file_for_gpus_let_its_launch_train_on_the_cpu(tmp_path):
    file = LaunchFile("a.yaml", {**GOOD, "use_cpu": False})
    with pytest.raises(ForgeError) as refused:
        launcher.refuse_gpu_file(TrainConfig(), Launch(), file)
    assert "write `use_cpu: true` into a.yaml, or add --cpu" in refused.value.problems[0].fix
    launcher.refuse_gpu_file(TrainConfig(cpu=True), Launch(), file)
    launcher.refuse_gpu_file(TrainConfig(), Launch(), LaunchFile("a.yaml", GOOD))
    sharded = LaunchFile(
        "a.yaml", {**GOOD, "parallelism_config": {"parallelism_config_tp_size": 2}}
    )
    with pytest.raises(ForgeError) as refused:
        launcher.refuse_parallelism(sharded)
    assert "take the settings of the other way out" in refused.value.problems[0].fix
    launcher.refuse_parallelism(LaunchFile("a.yaml", GOOD))


@pytest.mark.parametrize(
    ("flags", "environ", "processes", "fix", "then"),
    [
        ({}, {"OMP_NUM_THREADS": "4096"}, 1, "unset OMP_NUM_THREADS", {}),
        ({}, {"OMP_NUM_THREADS": "99"}, 1, "or set --cpu-threads N", {"OMP_NUM_THREADS": "99"}),
        ({"cpu_threads": 4096}, {}, 1, "set --cpu-threads N", {}),
        (
            {"cpu_threads": 2},
            {},
            2,
            "start N process(es) on this machine, with --cpu-threads 1",
            {},
        ),
    ],
    ids=["unset", "or set", "set", "more processes than cores"],
)
def test_the_fix_of_threads_leaves_one_core_for_each(
    monkeypatch, flags, environ, processes, fix, then
):
    monkeypatch.setattr(machine, "cores", lambda: 2 // processes)
    monkeypatch.setattr("p2p_llm_forge.peers.launch.cores", lambda: 2 // processes)

    def threads(environ, processes, **flags):
        config = TrainConfig(**flags)
        launch = replace(
            read_launch(config, environ), world_size=processes, local_world_size=processes
        )
        found = machine.judge_machine(config, launch)
        return next(finding for finding in found if finding.topic == "threads")

    found = threads(environ, processes, **flags)
    (number,) = re.findall(r"(?:--cpu-threads|start) (\d+)", found.fix)[:1]
    assert found.level == WARNING and fix in found.fix.replace(number, "N", 1)
    fixed = {"cpu_threads": 1} if "start" in fix else {"cpu_threads": int(number)}
    fixed = {} if fix.startswith("unset") else fixed
    assert threads(then, int(number) if "start" in fix else 1, **fixed).level == FINE


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 8 MB."""
    folder = tmp_path / "disk"
    folder.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=8m", "none", str(folder)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("needs the right to mount (root)")
    yield folder
    subprocess.run(["umount", str(folder)], check=True)


def test_the_fixes_of_a_full_disk_make_room_for_a_run(small_disk, tmp_path, monkeypatch):
    monkeypatch.setattr(machine, "LITTLE_DISK", 2e6)
    (small_disk / "old").write_bytes(bytes(7_000_000))

    def judged(folder):
        found = machine.judge_machine(TrainConfig(output_dir=str(folder)), Launch())
        return next(finding for finding in found if finding.topic == "disk")

    found = judged(small_disk / "run")
    assert found.level == WARNING and found.fix == "make room, or choose another --output-dir"
    assert judged(tmp_path / "another").level == FINE
    (small_disk / "old").unlink()
    assert judged(small_disk / "run").level == FINE


@pytest.mark.parametrize(("taken", "level"), [(2_000_000, WARNING), (7_500_000, FAILURE)])
def test_the_fixes_of_checkpoints_that_do_not_fit_let_them_fit(small_disk, tmp_path, taken, level):
    """Of 100,000 parameters each has 1.2 MB; the model has 0.4."""
    old = small_disk / "old"
    old.write_bytes(bytes(taken))

    def judged(folder, keep):
        config = TrainConfig(output_dir=str(folder / "run"), keep_checkpoints=keep)
        return machine.judge_checkpoints(config, 100_000)

    found = judged(small_disk, keep=8)
    assert found.level == level and "or choose another --output-dir" in found.fix
    assert judged(tmp_path, keep=8).level == FINE
    if level == WARNING:
        (fits,) = re.findall(r"or write --keep-checkpoints (\d+)", found.fix)
        assert judged(small_disk, int(fits)).level == FINE
        assert judged(small_disk, int(fits) + 1).level == WARNING
    else:
        assert "--keep-checkpoints" not in found.fix
    # 9 * 1.2 + 0.4 MB are more than the whole disk: a larger one is made of it.
    subprocess.run(["mount", "-o", "remount,size=20m", str(small_disk)], check=True)
    assert judged(small_disk, keep=8).level == FINE


def test_the_fix_of_little_memory_is_that_others_leave_theirs(monkeypatch):
    """What is free comes from a stand-in: a test must not take a machine's memory."""
    import psutil

    from p2p_llm_forge import limits

    def judged(available, limit=8e9):
        memory = SimpleNamespace(available=available)
        monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
        monkeypatch.setattr(limits, "free_in_groups", lambda: [limit])
        found = machine.judge_machine(TrainConfig(), Launch())
        return next(finding for finding in found if finding.topic == "memory")

    for little in (judged(5e8), judged(5e9, limit=5e8)):
        assert little.fix.startswith("end other programs, or raise the limit of this one")
    assert judged(5e9).level == FINE


def test_the_fixes_of_a_taken_port_name_its_owner_and_another_port():
    port = free_port()  # none that another program's connection may get meanwhile
    with subprocess.Popen(
        [sys.executable, "-m", "http.server", str(port), "--bind", "127.0.0.1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        env={**os.environ, "PYTHONUNBUFFERED": "1"},
        text=True,
    ) as other:
        assert other.stdout is not None
        assert f"port {port}" in other.stdout.readline()  # it is served
        found = addresses.judge_own_port(port)
        (command,) = re.findall(r"see who has it: (.*?);", found.fix)
        listed = subprocess.run(["sh", "-c", command], capture_output=True, text=True, check=True)
        assert re.findall(r"pid=(\d+)", listed.stdout) == [str(other.pid)]
        assert addresses.judge_own_port(free_port()).level == FINE
        other.terminate()  # "end that program"
    assert addresses.judge_own_port(port).level == FINE


@contextlib.contextmanager
def another_user():
    """Without the rights of root."""
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.mark.skipif(os.geteuid() != 0, reason="needs root, to become another user")
def test_the_fix_of_a_port_of_the_system_is_another_one():
    least = Path("/proc/sys/net/ipv4/ip_unprivileged_port_start")
    if int(least.read_text()) < 2:
        pytest.skip("needs a machine where low ports are root's (ip_unprivileged_port_start)")
    with another_user():
        found = addresses.judge_own_port(1)
        assert "is not to be had" in found.found and found.fix.startswith("choose another port")
        assert addresses.judge_own_port(free_port()).level == FINE


def test_the_fixes_of_addresses_are_addresses_that_work():
    own = subprocess.run(["ip", "-brief", "address"], capture_output=True, text=True, check=True)
    (found,) = addresses.judge_name("127.0.0.1", machines=2)
    assert "(`ip -brief address` there)" in found.fix
    shown = [word.split("/")[0] for line in own.stdout.splitlines() for word in line.split()[2:]]
    assert "127.0.0.1" in shown and set(shown) == routes.own_addresses()
    (found,) = addresses.judge_public(["8.8.8.8"], is_allowed=False)
    assert "use the address of a private network" in found.fix
    assert addresses.judge_public(["10.0.0.1"], is_allowed=False) == []
    assert "--allow-public-address if a firewall guards it" in found.fix
    (found,) = addresses.judge_public(["8.8.8.8"], is_allowed=True)
    assert found.level == WARNING and "or keep a firewall before it" in found.fix
    with pytest.raises(ForgeError) as refused:
        routes.route_to("no.such.host.invalid")
    assert "check the address" in refused.value.problems[0].fix
    assert routes.route_to("127.0.0.1") is None


@pytest.mark.parametrize(
    ("flags", "fix", "then"),
    [
        ({"hosts": ["a"]}, "give both: --write-configs FOLDER --hosts", {"write_configs": "x"}),
        ({"gpus_per_host": 2, "cpu": True}, "give one of them", {"cpu": False}),
        ({"meet": True}, "add --config-file my_node.yaml", {"config_file": ["my_node.yaml"]}),
        ({**BY_HAND, "master_addr": ""}, "give the address of rank 0's machine", BY_HAND),
        ({"rank": 1}, "add --world-size and --master-addr and --master-port", BY_HAND),
        ({**BY_HAND, "rank": 2}, "use 0 to 1", {"rank": 1}),
        ({"gpus_per_host": 0}, "1 or more", {"gpus_per_host": 1}),
    ],
    ids=str,
)
def test_the_fixes_of_flags_make_flags_that_are_taken(flags, fix, then):
    flags = {"dataset_path": "x", "output_dir": "y", **flags}
    (problem,) = CheckConfig(**flags).problems().found[-1:]
    assert fix in problem.fix, problem.fix
    assert CheckConfig(**{**flags, **then}).problems().found == []


@pytest.mark.parametrize(
    ("flags", "fix", "then"),
    [
        ({"backend": "nccl"}, "use --backend gloo", {"backend": "gloo"}),
        (
            {"mixed_precision": "fp16"},
            "use --mixed-precision bf16 or no",
            {"mixed_precision": "no"},
        ),
        ({"mixed_precision": "fp16"}, "use --mixed-precision bf16", {"mixed_precision": "bf16"}),
    ],
    ids=["backend", "no", "bf16"],
)
def test_the_fixes_of_what_this_machine_has_not_let_the_check_pass(flags, fix, then):
    found = check(CheckConfig(cpu=True, **flags)).findings
    assert [fix in finding.fix for finding in found if finding.level == FAILURE] == [True]
    assert check(CheckConfig(cpu=True, **then)).status() == 0


@pytest.mark.slow
def test_the_fix_of_a_text_is_a_command_that_prepares_it(run, text_file, tmp_path):
    model = {**TINY, "cpu": True, "output_dir": str(tmp_path / "run")}
    (found,) = check(CheckConfig(dataset_path=str(text_file), **model)).findings[-1:]
    assert found.level == WARNING and found.found.endswith("is a text")
    (command,) = re.findall(r"python (.*), then check with --dataset-path FOLDER", found.fix)
    folder = tmp_path / "prepared"
    status, printed = run(sys.executable, *shlex.split(command.replace("FOLDER", str(folder))))
    assert status == 0, printed
    report = check(CheckConfig(dataset_path=str(folder), **model))
    assert report.status() == 0, report.text()
