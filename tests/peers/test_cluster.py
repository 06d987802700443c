"""A process's place in the launch is read right, or the launch is refused with the mend."""

from __future__ import annotations

import os
import socket
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import cluster
from p2p_llm_forge.peers.cluster import Launch, read_launch
from p2p_llm_forge.sync.base import refuse_elastic

TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "MASTER_ADDR": "10.0.0.1",
    "MASTER_PORT": "29500",
}
BY_HAND = {"rank": 1, "world_size": 2, "master_addr": "10.0.0.1", "master_port": 29500}


def test_a_launcher_is_read_from_its_environment():
    assert read_launch(TrainConfig(), TORCHRUN) == Launch(3, 4, 1, 2, "10.0.0.1", 29500)


def test_an_elastic_launch_must_not_share_its_store_over_restarts():
    elastic = {**TORCHRUN, "TORCHELASTIC_MAX_RESTARTS": "3"}
    assert read_launch(
        TrainConfig(), {**elastic, "TORCHELASTIC_USE_AGENT_STORE": "False"}
    ).is_elastic
    with pytest.raises(ForgeError, match="TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1"):
        read_launch(TrainConfig(), {**elastic, "TORCHELASTIC_USE_AGENT_STORE": "True"})
    once = {**TORCHRUN, "TORCHELASTIC_USE_AGENT_STORE": "True"}
    assert not read_launch(TrainConfig(), once).is_elastic


@pytest.mark.parametrize(
    ("settings", "told"),
    [
        ({"sync_every": 20, "overlap_steps": 5, "save_every": 40}, None),
        ({"sync_every": 20, "save_every": 50}, "use 40 or 60"),
        ({"sync_every": 20, "fragments": 2, "save_every": 40}, "--fragments 2 leaves no moment"),
    ],
)
def test_peers_can_come_and_go_only_where_a_round_ends_for_the_whole_model(settings, told):
    elastic = SimpleNamespace(launch=Launch(0, 2, 0, 1, "10.0.0.1", 29500, is_elastic=True))
    config = TrainConfig(sync="diloco", **settings)
    with pytest.raises(ForgeError, match=told) if told else nullcontext():
        refuse_elastic(config, elastic)


def test_flags_describe_a_launch_by_hand():
    assert read_launch(TrainConfig(**BY_HAND), {}) == Launch(1, 2, 0, 1, "10.0.0.1", 29500)


def test_a_plain_start_is_one_process():
    assert read_launch(TrainConfig(), {}) == Launch()


def test_a_launch_that_would_start_strangers_is_refused_with_the_mend():
    environ = {"MASTER_ADDR": "10.0.0.1", "MASTER_PORT": "29500"}
    with pytest.raises(ForgeError, match="distributed_type: MULTI_GPU"):
        read_launch(TrainConfig(), environ)
    assert read_launch(TrainConfig(world_size=1), environ) == Launch()


@pytest.mark.parametrize("left_out", BY_HAND)
def test_a_launch_by_hand_needs_all_four_flags(left_out):
    flags = {name: value for name, value in BY_HAND.items() if name != left_out}
    with pytest.raises(ForgeError, match=f"missing: --{left_out.replace('_', '-')}"):
        read_launch(TrainConfig(**flags), {})


def test_contradictions_are_refused():
    with pytest.raises(ForgeError, match="--rank 2 is not one of the 2 ranks"):
        read_launch(TrainConfig(**{**BY_HAND, "rank": 2}), {})
    with pytest.raises(ForgeError, match="a launcher has started 4 processes"):
        read_launch(TrainConfig(**BY_HAND), TORCHRUN)
    with pytest.raises(ForgeError, match="MPI"):
        read_launch(TrainConfig(), {"OMPI_COMM_WORLD_SIZE": "2", "MASTER_ADDR": "x"})


def test_loopback_needs_no_interface_and_unknown_hosts_are_told():
    assert cluster.route_to("127.0.0.1") is None
    with pytest.raises(ForgeError, match="no way to the main process at no.such.host.invalid"):
        cluster.route_to("no.such.host.invalid")


def test_the_users_choice_of_interface_is_kept(monkeypatch):
    monkeypatch.setattr(cluster, "route_to", lambda host: cluster.Route("10.0.0.2", "eth7"))
    launch = Launch(1, 2, 0, 1, "10.0.0.1", 29500)
    environ = {"NCCL_SOCKET_IFNAME": "ib0"}
    chosen = {"NCCL_SOCKET_IFNAME": "ib0", "GLOO_SOCKET_IFNAME": "eth7"}
    assert cluster.choose_interface(launch, environ) == chosen
    assert cluster.choose_interface(Launch(1, 2, 1, 2, "10.0.0.1"), {}) == {}


def test_threads_are_the_machines_share_unless_the_user_chose(monkeypatch):
    monkeypatch.setattr(cluster.os, "sched_getaffinity", lambda _: range(8), raising=False)
    two = Launch(0, 2, 0, 2)
    assert cluster.choose_threads(TrainConfig(), two, {"OMP_NUM_THREADS": "1"}) == 4
    assert cluster.choose_threads(TrainConfig(), two, {}) == 4
    assert cluster.choose_threads(TrainConfig(), two, {"OMP_NUM_THREADS": "3"}) == 3
    assert cluster.choose_threads(TrainConfig(cpu_threads=1), two, {}) == 1


def test_a_main_address_that_nobody_serves_is_one_message():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    config = TrainConfig(
        rank=1, world_size=2, master_addr="127.0.0.1", master_port=port, peer_timeout=2
    )
    before = dict(os.environ)
    with (
        pytest.raises(ForgeError, match=f"rank 1 could not meet .* 127.0.0.1:{port}"),
        cluster.join(config),
    ):
        pass
    assert dict(os.environ) == before


def test_something_else_at_the_main_port_is_told():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        config = TrainConfig(
            rank=1, world_size=2, master_addr="127.0.0.1", master_port=port, peer_timeout=1
        )
        with (
            pytest.raises(ForgeError, match=f"what answers at 127.0.0.1:{port} is not rank 0"),
            cluster.join(config),
        ):
            pass
