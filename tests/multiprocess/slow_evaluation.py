"""A program for tests: an evaluation in which rank 1 needs longer than --peer-timeout.

Its argument is JSON: the settings.
"""

from __future__ import annotations

import json
import sys
import threading
from typing import Any


def main() -> int:
    import numpy as np
    import torch

    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.data.held_out import HeldOut
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.training.evaluation import evaluate_blocks

    config = TrainConfig(output_dir="unused", cpu=True, **json.loads(sys.argv[1]))

    class Blocks(list):
        def inputs_and_targets(self, numbers: range) -> tuple[Any, Any]:
            return np.zeros((len(numbers), 4)), np.zeros((len(numbers), 4))

        def begins(self, numbers: range) -> None:
            return None

    with join(config) as cluster:

        class Model(torch.nn.Module):
            def forward(self, inputs: Any, targets: Any, begins: Any, by_block: bool) -> Any:
                if cluster.rank == 1:
                    threading.Event().wait(2.5 * config.peer_timeout)
                return torch.tensor([8.0]), torch.tensor([1])

        held_out = HeldOut(Blocks([0, 1]), 32, range(2))
        figures = evaluate_blocks(Model(), held_out, 1, cluster)
        assert figures["eval_loss"] == 2.0, figures
    return 0
