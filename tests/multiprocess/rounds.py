"""A program for tests: real ranks that 'train' by known amounts, synchronised by DiLoCo.

Its argument is JSON: the settings, what the ranks do, and the folder in which each rank writes what
it has seen.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path


def main() -> int:
    import torch

    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.sync.base import Replica
    from p2p_llm_forge.sync.strategy import build_strategy
    from tests.sync.ranks import Model, Rounds, take_rounds

    order = json.loads(sys.argv[1])
    config = TrainConfig(output_dir="unused", cpu=True, **order["config"])
    rounds = Rounds(**order["rounds"])
    with join(config) as cluster:
        lm = Model()
        optimizer = torch.optim.SGD(lm.parameters(), lr=0.1)
        model, optimizer = cluster.accelerator.prepare(lm, optimizer)
        replica = Replica(model, lm, optimizer, total_steps=rounds.updates)
        trace = take_rounds(build_strategy(config, cluster, replica), lm, cluster.rank, rounds)
        Path(order["folder"], f"rank{cluster.rank}.json").write_text(json.dumps(vars(trace)))
    return 0
