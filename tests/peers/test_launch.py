"""A process's place in the launch is read right, or the launch is refused with the fix."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import launch
from p2p_llm_forge.peers.launch import Launch, choose_threads, read_launch

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
AT = {"master_addr": "10.0.0.1", "master_port": 29500}
BY_HAND = {"rank": 1, "world_size": 2, **AT}


def test_a_launcher_is_read_from_its_environment():
    expected = Launch(rank=3, world_size=4, local_rank=1, local_world_size=2, **AT)
    assert read_launch(TrainConfig(), TORCHRUN) == expected
    assert expected.machines == 2
    assert launch.local_rank(TORCHRUN) == 1
    assert launch.rank_and_world_size(TORCHRUN) == (3, 4)


def test_without_a_launcher_a_process_is_the_only_one():
    assert read_launch(TrainConfig(), {}) == Launch()
    assert launch.local_rank({}) == 0
    assert launch.rank_and_world_size({}) == (0, 1)
    assert not launch.has_launcher({}) and launch.has_launcher({"TORCHELASTIC_RUN_ID": "none"})


def test_a_worker_knows_whom_to_end_with():
    assert launch.launcher_pid({}) is None
    assert launch.launcher_pid({"TORCHELASTIC_RUN_ID": "none"}) == 0
    assert launch.launcher_pid({"ACCELERATE_MIXED_PRECISION": "no"}) == 0
    ours = {"TORCHELASTIC_RUN_ID": "of our own", "P2P_LLM_FORGE_LAUNCHER": "123"}
    assert launch.launcher_pid(ours) == 123


def test_an_elastic_launch_must_not_share_its_store_over_restarts():
    elastic = {**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3", "TORCHELASTIC_RUN_ID": "home"}
    read = read_launch(TrainConfig(), {**elastic, "TORCHELASTIC_USE_AGENT_STORE": "False"})
    assert read.is_elastic and read.run_id == "home" and not read.serves_store
    assert read.by_torchrun
    with pytest.raises(ForgeError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        read_launch(TrainConfig(), {**elastic, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    once = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True", "TORCHELASTIC_RUN_ID": "none"}
    read = read_launch(TrainConfig(), once)
    assert not read.is_elastic and read.run_id is None and read.serves_store


@pytest.mark.parametrize("config", [TrainConfig(), TrainConfig(**BY_HAND)], ids=["plain", "hand"])
def test_what_accelerate_and_the_user_ask_for_is_read_too(config):
    environ = {"ACCELERATE_MIXED_PRECISION": "bf16", "ACCELERATE_USE_CPU": "True"}
    environ |= {"GLOO_SOCKET_IFNAME": "eth1", "NCCL_SOCKET_IFNAME": "ib0", "OMP_NUM_THREADS": "3"}
    read = read_launch(config, environ)
    assert (read.precision, read.wants_cpu, read.threads) == ("bf16", True, 3)
    assert (read.gloo_interface, read.nccl_interface) == ("eth1", "ib0")


def test_flags_describe_a_launch_by_hand():
    read = read_launch(TrainConfig(**BY_HAND), {})
    assert read == Launch(**BY_HAND)
    assert read.environ() == {
        **{"RANK": "1", "WORLD_SIZE": "2", "LOCAL_RANK": "0", "LOCAL_WORLD_SIZE": "1"},
        **{"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"},
    }
    assert Launch().environ() == {}


def test_a_launch_of_multi_cpu_that_would_start_strangers_is_refused_with_the_fix():
    environ = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(ForgeError, match="distributed_type: MULTI_CPU") as refusal:
        read_launch(TrainConfig(), environ)
    assert "write `distributed_type: MULTI_GPU`" in refusal.value.problems[0].fix
    assert read_launch(TrainConfig(world_size=1), environ) == Launch()


def test_contradictions_are_refused():
    with pytest.raises(ForgeError, match="a launcher has started 4 processes"):
        read_launch(TrainConfig(**BY_HAND), TORCHRUN)
    with pytest.raises(ForgeError, match="MPI"):
        read_launch(TrainConfig(), {"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "x"})


@pytest.mark.parametrize(
    ("environ", "found", "fix"),
    [
        ({**TORCHRUN, "RANK": "a"}, "RANK is 'a' in the environment", "unset RANK"),
        ({**TORCHRUN, "LOCAL_WORLD_SIZE": "-1"}, "LOCAL_WORLD_SIZE is '-1'", "unset LOCAL_WORLD"),
        ({"WORLD_SIZE": "2"}, "WORLD_SIZE is 2 in the environment", "unset WORLD_SIZE"),
    ],
)
def test_an_environment_that_no_launcher_makes_is_refused(environ, found, fix):
    with pytest.raises(ForgeError) as error:
        read_launch(TrainConfig(), environ)
    (problem,) = error.value.problems
    assert found in problem.found and fix in problem.fix


def test_threads_are_the_machines_part_unless_the_user_chose(monkeypatch):
    monkeypatch.setattr(launch.os, "sched_getaffinity", lambda _: range(8), raising=False)

    def threads(config, environ):
        two = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "RANK": "0"}
        return choose_threads(config, read_launch(config, {**two, **environ}))

    assert threads(TrainConfig(), {"OMP_NUM_THREADS": "1"}) == 4
    assert threads(TrainConfig(), {}) == 4
    assert threads(TrainConfig(), {"OMP_NUM_THREADS": "3"}) == 3
    assert threads(TrainConfig(), {"OMP_NUM_THREADS": "2,2"}) == 4
    assert threads(TrainConfig(cpu_threads=1), {"OMP_NUM_THREADS": "3"}) == 1
