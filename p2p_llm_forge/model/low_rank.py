"""A linear layer with a LoRA adapter beside it, in the memory that the layer alone takes.

peft's own forward makes four tensors of the output's size where one is kept, and its backward two
of the input's. On a CPU their memory comes back to the system in pieces too small for the next
ones: with 8 blocks a process grew to more than full tuning takes.
"""

from __future__ import annotations

import types
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from p2p_llm_forge.model.fused_steps import autocast_dtype


class LowRank(torch.autograd.Function):
    """y = x W' + bias + scale (x A') B', of which x, A and B have gradients.

    x: (n, in); weight W: (out, in); bias: (out,) or None; a: (rank, in); b: (out, rank). All is
    computed in x's dtype.
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, base: tuple[Tensor, Tensor | None], a: Tensor, b: Tensor, scale: float
    ) -> Tensor:
        weight, bias = base
        low = functional.linear(x, a.to(x.dtype))
        ctx.save_for_backward(x, low, a, b)
        # Frozen: kept as it is, so that under autocast no copy of it waits for the backward.
        ctx.weight, ctx.scale = weight, scale
        y = functional.linear(x, weight.to(x.dtype), None if bias is None else bias.to(x.dtype))
        return y.addmm_(low, b.to(x.dtype).t(), alpha=scale)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, low, a, b = ctx.saved_tensors
        (grad,) = grads
        to_low = (grad @ b.to(grad.dtype)).mul_(ctx.scale)  # (n, rank)
        grad_b = (grad.t() @ low).mul_(ctx.scale).to(b.dtype)
        grad_a = (to_low.t() @ x).to(a.dtype)
        grad_x = None
        if ctx.needs_input_grad[0]:
            grad_x = (grad @ ctx.weight.to(grad.dtype)).addmm_(to_low, a.to(grad.dtype))
        return grad_x, None, grad_a, grad_b, None


def take_less_memory(lm: Any, adapter: str) -> None:
    """Let the adapted layers compute by `LowRank` where they are of the usual kind.

    Those with dropout, or of other kinds, compute as peft does.
    """
    from peft.tuners.lora import Linear

    for module in lm.modules():
        is_usual = type(module) is Linear and not module.lora_variant
        if is_usual and isinstance(module.lora_dropout[adapter], torch.nn.Identity):
            module.forward = types.MethodType(forward_of(adapter), module)


def forward_of(adapter: str) -> Any:
    """A layer's forward by `LowRank`."""

    def forward(self: Any, x: Tensor) -> Tensor:
        layer, device = self.get_base_layer(), x.device.type
        a, b = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        halved = autocast_dtype(x)
        is_mixed = halved is None and not x.dtype == layer.weight.dtype == a.dtype
        if self.disable_adapters or self.merged or is_mixed:
            return type(self).forward(self, x)
        dtype = halved or x.dtype
        weight = layer.weight.t() if self.fan_in_fan_out else layer.weight
        rows = x.reshape(-1, x.shape[-1]).to(dtype)
        with torch.autocast(device, enabled=False):
            y = LowRank.apply(rows, (weight, layer.bias), a, b, self.scaling[adapter])
        return y.view(*x.shape[:-1], y.shape[-1])

    return forward
