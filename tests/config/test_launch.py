"""Options of the launch: values that no launch can have are refused with the flag's name."""

from __future__ import annotations

import dataclasses

import pytest

from p2p_llm_forge.config import TrainConfig

GOOD = TrainConfig(dataset_path="d", output_dir="o")
BY_HAND = {"rank": 0, "world_size": 2, "master_addr": "10.0.0.1", "master_port": 29500}


def found(**settings):
    return [one.found for one in dataclasses.replace(GOOD, **settings).problems().found]


@pytest.mark.parametrize(
    ("name", "value"),
    [
        *(("master_port", 65536), ("master_port", -1), ("world_size", 10**9), ("rank", -1)),
        *(("cpu_threads", 10**6), ("peer_timeout", 1e300), ("peer_timeout", float("nan"))),
        *(("rendezvous_timeout", 0.0), ("max_seconds", float("inf"))),
    ],
)
def test_values_beyond_their_bounds_are_refused(name, value):
    flag = "--" + name.replace("_", "-")
    assert f"{flag} is {value}" in found(**{**BY_HAND, name: value})


def test_a_launch_by_hand_is_whole_or_not_one():
    assert found(**BY_HAND) == [] == found()
    assert found(**{**BY_HAND, "master_addr": ""}) == ["--master-addr is empty"]
    (missing,) = found(**{**BY_HAND, "master_port": None})
    assert "needs all of --rank, --world-size, --master-addr, --master-port" in missing
    (not_one,) = found(**{**BY_HAND, "rank": 2})
    assert "--rank 2 is not one of the 2 ranks" in not_one
