"""A job of one process on the small dataset, for the parts of a run."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch


@pytest.fixture
def alone():
    """A cluster of this process only, without anything of Accelerate's."""
    from p2p_llm_forge.peers.cluster import Cluster
    from p2p_llm_forge.peers.launch import Launch

    return Cluster(Launch(), torch.device("cpu"), peers=None)


@pytest.fixture
def open_small_job(config, alone):
    """Opens that run's job, with other settings if they are given."""
    from p2p_llm_forge.training.job import Job, open_job

    def opened(**settings: Any) -> Job:
        return open_job(replace(config, **settings), alone)

    return opened
