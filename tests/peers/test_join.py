"""Who cannot join says why, in one message; who joins must be alike; failures are explained."""

from __future__ import annotations

import os
import socket

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.join import differences, join
from p2p_llm_forge.peers.rank_failure import RankFailure

ALONE = TrainConfig(cpu=True, output_dir="unused")


def second_of_two(port, timeout_s):
    return TrainConfig(
        rank=1, world_size=2, master_addr="127.0.0.1", master_port=port, peer_timeout=timeout_s
    )


def test_a_main_address_that_nobody_serves_is_one_message():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    before = dict(os.environ)
    with (
        pytest.raises(ForgeError, match=f"rank 1 could not meet .* 127.0.0.1:{port}"),
        join(second_of_two(port, timeout_s=2)),
    ):
        pass
    assert dict(os.environ) == before


def test_something_else_at_the_main_port_is_reported():
    with socket.create_server(("127.0.0.1", 0)) as stranger:
        port = stranger.getsockname()[1]
        with (
            pytest.raises(ForgeError, match=f"what answers at 127.0.0.1:{port} is not rank 0"),
            join(second_of_two(port, timeout_s=1)),
        ):
            pass


@pytest.mark.parametrize(
    ("error", "expected"),
    [
        (MemoryError(), "out of memory"),
        (OSError(28, "No space left on device"), "could not read or write: .*No space left"),
        (torch.distributed.DistBackendError("NCCL"), "lost a peer"),
    ],
    ids=str,
)
def test_errors_of_the_machine_are_explained(error, expected):
    with pytest.raises(RankFailure, match=rf"rank 0 \(.*\): {expected}") as failure, join(ALONE):
        raise error
    assert failure.value.status == 1 and failure.value.is_of_this_rank
    assert failure.value.problems[0].fix


@pytest.mark.parametrize("error", [ForgeError("a", "b"), ValueError("NCCL"), RuntimeError("a bug")])
def test_a_users_mistake_and_a_bug_stay_what_they_are(error):
    with pytest.raises(type(error)) as raised, join(ALONE):
        raise error
    assert raised.value is error


def test_a_second_accelerator_in_one_process_is_refused():
    with (
        join(ALONE),
        pytest.raises(ForgeError, match="an Accelerator exists in this process already"),
        join(ALONE),
    ):
        pass
    with join(ALONE) as cluster:
        assert cluster.world_size == 1, "the first one is gone without a trace"


def facts(host, **changes):
    versions = {"torch": "2.13", "transformers": "5.2", "accelerate": "1.15", "forge": "0.1"}
    own = {"precision": "no", "backend": "gloo", "settings": {"seed": 0}, **versions, "host": host}
    return {**own, **changes}


@pytest.mark.parametrize("name", ["dataset_path", "output_dir", "model_name"])
def test_a_place_that_decides_what_is_done_is_given_on_all_ranks_or_on_none(name):
    """Else one waits in an exchange that the other takes no part in."""
    places = {"dataset_path": "data", "output_dir": "run", "model_name": "model"}
    configs = [TrainConfig(**{**places, name: place}) for place in ("here", "there", "")]
    settings = [config.shared_settings() for config in configs]
    (found,) = differences([facts("anna", settings=one) for one in settings])
    flag = "--" + name.replace("_", "-")
    assert found.found == f"rank 2 (anna) was started with {flag} none, rank 0 with one"
    assert found.fix == f"start all machines with the same {flag}"


def test_ranks_that_differ_are_named_with_what_makes_them_alike():
    assert differences([facts("anna"), facts("berta")]) == []
    others = [
        facts("berta", accelerate="1.11.0", precision="bf16"),
        facts("carla", settings={"seed": 7}),
        facts("dora", backend="nccl"),
    ]
    found = [(found.found, found.fix) for found in differences([facts("anna"), *others])]
    assert found == [
        (
            "rank 1 (berta) has precision bf16, rank 0 has no",
            "give the same --mixed-precision on all machines",
        ),
        (
            "rank 1 (berta) has accelerate 1.11.0, rank 0 has 1.15",
            "install accelerate 1.15 there, or the same on all machines",
        ),
        (
            "rank 2 (carla) was started with --seed 7, rank 0 with 0",
            "start all machines with the same --seed",
        ),
        (
            "rank 3 (dora) has backend nccl, rank 0 has gloo",
            "give --backend gloo on all machines: a GPU then works with a CPU",
        ),
    ]
