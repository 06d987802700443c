"""A program for tests: gradients that become infinite once, as loss scaling in fp16 makes them.

Its argument is JSON: the settings. Every rank writes the gradient that every backward has left.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

WIDTH, BACKWARDS, SPOILED = 16, 8, 4


def main() -> int:
    import torch
    from torch import nn

    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.sync.base import Replica
    from p2p_llm_forge.sync.strategy import build_strategy

    order = json.loads(sys.argv[1])
    config = TrainConfig(output_dir="unused", cpu=True, **order["config"])
    with join(config) as cluster:
        lm = nn.Linear(WIDTH, WIDTH, bias=False)
        optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
        model, optimizer = cluster.accelerator.prepare(lm, optimizer)
        replica = Replica(model, lm, optimizer, total_steps=BACKWARDS)
        sync = build_strategy(config, cluster, replica)
        gradients = []
        for number in range(BACKWARDS):
            size = torch.inf if [cluster.rank, number] == [1, SPOILED] else 1.0
            with sync.context(is_last_micro_batch=True):
                (model(torch.full((1, WIDTH), 0.5)).sum() * size).backward()
            gradients.append(lm.weight.grad.flatten().tolist())
            lm.weight.grad = None
        Path(order["folder"], f"rank{cluster.rank}.json").write_text(json.dumps(gradients))
    return 0
