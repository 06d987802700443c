"""A program for tests: what this process of `accelerate launch` was asked for."""

from __future__ import annotations

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.peers.launch import read_launch
from p2p_llm_forge.peers.launcher import as_asked

if __name__ == "__main__":
    launch, _ = as_asked(read_launch(TrainConfig()))
    print(
        f"rank {launch.rank} of {launch.world_size} wants the CPU: {launch.wants_cpu}", flush=True
    )
