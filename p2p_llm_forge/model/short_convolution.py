"""Short convolutions that do not cross the end of a document.

Those of transformers keep packed documents apart only by a CUDA kernel, and refuse elsewhere.
"""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import nn
from torch.nn import functional as F


def keep_inside_documents(lm: Any) -> bool:
    """Have the model's gated short convolutions heed `seq_idx`; False where it has none.

    What its forward is given by that name is handed to them, as it is to the kernel: the number of
    each token's document in its block, (blocks, tokens). Without it nothing changes.
    """
    found = [module for module in lm.modules() if _is_short_convolution(module)]
    for module in found:
        module.forward = MethodType(_forward, module)
    return bool(found)


def convolved(
    values: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, documents: torch.Tensor
) -> torch.Tensor:
    """A causal convolution of each channel in which every document begins with zeros before it.

    values: (blocks, tokens, channels); weight: (channels, size); documents: (blocks, tokens).
    """
    size, tokens = weight.shape[1], values.shape[1]
    total = values * weight[:, -1]
    for back in range(1, min(size, tokens)):
        is_same = documents[:, back:] == documents[:, :-back]
        earlier = values[:, :-back] * weight[:, -1 - back] * is_same.unsqueeze(-1)
        total = total + F.pad(earlier, (0, 0, back, 0))
    return total if bias is None else total + bias


def _is_short_convolution(module: nn.Module) -> bool:
    """Whether it is lfm2's: a convolution between two gates, all three by one projection."""
    conv, into = (getattr(module, name, None) for name in ("conv", "in_proj"))
    if not isinstance(conv, nn.Conv1d) or into is None or not hasattr(module, "out_proj"):
        return False
    return type(module).__name__.endswith("ShortConv") and conv.groups == conv.in_channels


def _forward(self: Any, hidden_states: torch.Tensor, **others: Any) -> torch.Tensor:
    """The module's own forward, but where the tokens' documents are given."""
    documents = others.pop("seq_idx", None)
    if documents is None:
        found: torch.Tensor = type(self).forward(self, hidden_states, **others)
        return found
    gate, gate_after, values = self.in_proj(hidden_states).chunk(3, dim=-1)
    weight = self.conv.weight.squeeze(1)
    inside = convolved(gate * values, weight, self.conv.bias, documents)
    found = self.out_proj(gate_after * inside)
    return found
