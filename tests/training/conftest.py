"""A job of one process on the small dataset, for the parts of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from tests.runs import TINY_MODEL


@pytest.fixture
def alone():
    """A cluster of this process only, without anything of Accelerate's."""
    from p2p_llm_forge.peers.cluster import Cluster
    from p2p_llm_forge.peers.launch import Launch

    return Cluster(Launch(), torch.device("cpu"), peers=None)


@pytest.fixture
def config(prepared, tmp_path):
    """A short run."""
    return TrainConfig(
        dataset_path=str(prepared),
        output_dir=str(tmp_path / "run"),
        config_overrides=TINY_MODEL,
        batch_size=8,
        max_steps=6,
        report_to="none",
        cpu_threads=1,
    )


@pytest.fixture
def open_small_job(config, alone):
    """Opens that run's job, with other settings if they are given."""
    from p2p_llm_forge.training.job import Job, open_job

    def opened(**settings: Any) -> Job:
        return open_job(replace(config, **settings), alone)

    return opened
