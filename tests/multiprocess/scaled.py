"""A program for tests: train.py with loss scaling, as fp16 has it on a GPU, but on the CPU.

The environment's FIRST_SCALE is the scale that a rank begins with, times its number from 1.
"""

from __future__ import annotations

import os
from typing import Any


def main() -> int:
    import accelerate
    import torch

    import train
    from p2p_llm_forge.peers import join

    class Scaling(accelerate.Accelerator):
        def __init__(self, **settings: Any) -> None:
            super().__init__(**settings)
            first = float(os.environ["FIRST_SCALE"]) * (1 + self.process_index)
            kind = self.device.type
            self.scaler = torch.amp.GradScaler(kind, init_scale=first, growth_interval=3)

    join.Accelerator = Scaling  # the process is the test's own
    return train.main()
