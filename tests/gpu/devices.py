"""Where the tests of this folder run: on a GPU, or on the CPU where they are only rehearsed."""

from __future__ import annotations

import os

import pytest
import torch

DEVICE = os.environ.get("GPU_TESTS_ON") or "cuda"
IS_REHEARSAL = DEVICE == "cpu"

# For every test of this folder: pytestmark = [*ON_A_GPU, ...]
ON_A_GPU = [
    pytest.mark.gpu,
    pytest.mark.skipif(
        not (IS_REHEARSAL or torch.cuda.is_available()),
        reason="needs an NVIDIA GPU (GPU_TESTS_ON=cpu rehearses it on the CPU)",
    ),
]
