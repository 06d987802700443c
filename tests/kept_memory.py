"""How often the system fills the same tensor with zeros, in a process that has just begun.

python -m tests.kept_memory [FLAGS_OF_TRAIN]

Prints that with memory kept, and what is then held inside and afterwards, in tensors; with flags
what it is at the beginning of the loop of train.py, and of an evaluation of what was trained.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import psutil
import torch

import train
from p2p_llm_forge.config import TrainConfig, parse
from p2p_llm_forge.memory import freed_memory_kept
from p2p_llm_forge.training import modes

SIZE = 200 << 20  # bytes
TIMES = 5


def times_filled() -> float:
    """How often, at least, the system fills a tensor that is taken and freed TIMES times.

    Kept memory is filled, too, where something small has come to lie in its place meanwhile: so
    the least of some.
    """
    import resource

    found = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(TIMES):
            torch.ones(SIZE, dtype=torch.uint8)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found) * os.sysconf("SC_PAGE_SIZE") / SIZE


def looked_at(usual: Callable[..., Any]) -> Callable[..., Any]:
    def look(*arguments: Any) -> Any:
        print("found", times_filled(), flush=True)
        return usual(*arguments)

    return look


def main(words: list[str]) -> None:
    if words:
        config = parse(TrainConfig, words, "train.py")
        train.loop = looked_at(train.loop)
        train.train(config)
        modes.evaluate_blocks = looked_at(modes.evaluate_blocks)
        train.train(replace(config, eval_only=True))
        return
    before = psutil.Process().memory_info().rss
    with freed_memory_kept():
        print("found", times_filled())
        print("found", (psutil.Process().memory_info().rss - before) / SIZE)
    print("found", (psutil.Process().memory_info().rss - before) / SIZE)


if __name__ == "__main__":
    main(sys.argv[1:])
