"""A program for tests: ranks that 'train' by known amounts, synchronised by the product's DiLoCo.

Its argument is JSON: the settings, the number of updates and, for each rank, what to break. Every
rank writes its weights after every update, so that a simulation can be compared with them. In
the update `stalled` the network stands still for a moment after the pseudo-gradient was sent.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Any

LAYERS, WIDTH = 3, 7


def moved(rank: int, step: int, count: int) -> list[float]:
    """By how much rank `rank` changes its `count` weights in update `step`."""
    return [((rank + 2) * (step + 3) * (number + 5) % 17 - 8) / 64 for number in range(count)]


def residuals(state: Any) -> dict[str, list[float]]:
    """The residuals of error feedback, as a checkpoint would hold them."""
    return {key: value.tolist() for key, value in state.own.items() if key.startswith("residual_")}


def main() -> int:
    import torch
    from torch import nn

    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.sync.base import Replica
    from p2p_llm_forge.sync.strategy import build_strategy

    order = json.loads(sys.argv[1])
    config = TrainConfig(output_dir="unused", cpu=True, **order["config"])

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = nn.Parameter(torch.linspace(-1, 1, 3 * WIDTH))
            self.layers = nn.ModuleList(nn.Linear(WIDTH, 1, bias=False) for _ in range(LAYERS))
            for layer in self.layers:
                nn.init.constant_(layer.weight, 0.5)
            self.tied = self.embedding

        def forward(self) -> torch.Tensor:
            return sum(p.sum() for p in self.parameters())

    with join(config) as cluster:
        lm = Model()
        optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
        model, optimizer = cluster.accelerator.prepare(lm, optimizer)
        replica = Replica(model, lm, optimizer, total_steps=order["updates"])
        sync = build_strategy(config, cluster, replica)
        trace = []
        for step in range(order["updates"]):
            amounts = moved(cluster.rank, step, sum(p.numel() for p in lm.parameters()))
            with torch.no_grad():
                for parameter in lm.parameters():
                    own = [amounts.pop(0) for _ in range(parameter.numel())]
                    parameter += torch.tensor(own).view_as(parameter)
                    if [cluster.rank, step] == order.get("break"):
                        parameter.flatten()[0] = float("nan")
            tokens = order["tokens"][cluster.rank]
            if step == order.get("stalled"):
                gate = threading.Event()
                sync._channel.in_background(gate.wait, lambda _: None)
                threading.Timer(0.3, gate.set).start()
            report = sync.after_update(step, tokens)
            trace.append(
                {
                    "weights": [x for p in lm.parameters() for x in p.flatten().tolist()],
                    "bytes_sent": report.bytes_sent,
                    "is_agreed": sync.is_agreed(),
                }
            )
            if step == order.get("stalled"):
                trace[-1]["residuals"] = [residuals(sync.state()), residuals(sync.state())]
        Path(order["folder"], f"rank{cluster.rank}.json").write_text(json.dumps(trace))
    return 0
