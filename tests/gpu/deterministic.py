"""A program for tests: train.py with the kernels of torch that always add in the same order."""

from __future__ import annotations

import os


def main() -> int:
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":4096:8"  # or cuBLAS is refused
    import torch

    import train

    torch.use_deterministic_algorithms(True)
    torch.utils.deterministic.fill_uninitialized_memory = False  # it costs time, and hides nothing
    return train.main()
