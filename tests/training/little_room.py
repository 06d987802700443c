"""What --micro-batch-size auto comes to in a process that may take only so much more memory.

python -m tests.training.little_room FLAGS_OF_TRAIN

Linux refuses the process what goes beyond. Prints a line for each room: what it came to, or what
was raised.
"""

from __future__ import annotations

import contextlib
import json
import resource
import sys
from collections.abc import Callable, Iterator
from typing import Any

import psutil
import torch
from tqdm import tqdm

from p2p_llm_forge.config import TrainConfig, parse
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.memory import return_memory
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.join import join
from p2p_llm_forge.training import trial
from p2p_llm_forge.training.compilation import one_micro_batch
from p2p_llm_forge.training.forecast import computing_s
from p2p_llm_forge.training.job import open_job
from p2p_llm_forge.training.learner import new_model
from p2p_llm_forge.training.micro_batch import settle_micro_batch

PER_TOKEN = 2 << 20  # bytes for a moment of each forward: far more than all else
LENGTH = 32  # tokens of a block that the rooms are for


class Hungry(NextTokenLoss):
    """A model that takes more memory than it keeps."""

    def forward(self, inputs: torch.Tensor, *more: Any) -> Any:
        torch.empty(inputs.numel() * PER_TOKEN, dtype=torch.uint8)
        return super().forward(inputs, *more)


@contextlib.contextmanager
def room_for(blocks: float) -> Iterator[None]:
    """The process may take as much more as so many blocks need, until this is left."""
    return_memory()  # or what lies free in its heap is room, too
    most = psutil.Process().memory_info().vms + int(blocks * LENGTH * PER_TOKEN)
    resource.setrlimit(resource.RLIMIT_AS, (most, resource.RLIM_INFINITY))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (resource.RLIM_INFINITY,) * 2)


def show(blocks: float, act: Callable[[], object]) -> None:
    """Print what `act` comes to in a room for so many blocks."""
    with room_for(blocks):
        try:
            found = act()
        except ForgeError as error:
            found = str(error)
    print("room", json.dumps(found), flush=True)


def main() -> int:
    config = parse(TrainConfig, sys.argv[1:], "train.py")
    trial.NextTokenLoss = Hungry
    tqdm.monitor_interval = 0  # a thread takes 64 MB of addresses
    with join(config) as cluster:
        job = open_job(config, cluster)
        model, lm = Hungry(new_model(job)).train(), new_model(job)
        one_micro_batch(job, model, 1)  # what the first one makes is there
        show(1.5, lambda: settle_micro_batch(job, model, None))
        show(0.7, lambda: settle_micro_batch(job, model, None))
        show(2.5, lambda: computing_s(job, lm))
    return 0
