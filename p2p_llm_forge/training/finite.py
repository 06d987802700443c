"""Whether weights and moments are numbers that one can compute with: looked at once a save."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

# A weight whose square overflows float32 makes the next forward infinite.
LARGEST_WEIGHT = torch.finfo(torch.float32).max ** 0.5
# How files of weights begin; others hold moments.
OF_WEIGHTS = ("model", "pytorch_model", "adapter_model")


def bad_tensor(named: Iterable[tuple[str, Tensor]], largest: float = torch.inf) -> str | None:
    """What is wrong with the first tensor that holds NaN, infinity or more than `largest`."""
    for name, tensor in named:
        if not (tensor.is_floating_point() and tensor.numel()):
            continue
        if tensor.element_size() < 2:
            tensor = tensor.float()  # torch has no comparisons of 8-bit floats
        # The extremes decide, and no mask is made. Of NaN they are NaN.
        low, high = (float(value) for value in tensor.detach().aminmax())
        size = max(-low, high)
        if not size < torch.inf:
            return f"NaN or infinite values in {name}"
        if size > largest:
            return f"values of {size:.1e} in {name}, too large to compute with"
    return None


def bad_weight(named: Iterable[tuple[str, Tensor]]) -> str | None:
    """As `bad_tensor`, for weights, which must also be small enough for a forward."""
    return bad_tensor(named, LARGEST_WEIGHT)


def bad_tensor_in(file: Path) -> str | None:
    """What is wrong with the first such tensor in a safetensors file, read one by one.

    Raises OSError, or ValueError for a file that is none.
    """
    largest = LARGEST_WEIGHT if file.name.startswith(OF_WEIGHTS) else torch.inf
    try:
        with safe_open(file, framework="pt") as tensors:
            names = sorted(tensors.keys())
            return bad_tensor(((name, tensors.get_tensor(name)) for name in names), largest)
    except SafetensorError as error:
        raise ValueError(str(error)) from error
