"""Steps of a layer with a backward of their own: fewer passes over memory than autograd's of each.

On a CPU most of a small model's update is such passes: torch's matrix products are a fifth of it.
(What Liger Kernel, arXiv 2410.10989, does on GPUs, by torch's own operations.)
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def exact_dtype(x: Tensor) -> torch.dtype:
    """What a norm of x is computed in: at least float32."""
    return torch.promote_types(x.dtype, torch.float32)


def autocast_dtype(x: Tensor) -> torch.dtype | None:
    """What autocast computes products of x in; None where it is off."""
    kind = x.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def _normalised(x: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    """(x / rms, 1 / rms) over the last dimension, in at least float32."""
    exact = x.to(exact_dtype(x))
    squares = torch.linalg.vector_norm(exact, dim=-1, keepdim=True).square_()
    scale = squares.div_(x.shape[-1]).add_(eps).rsqrt_()
    return exact * scale, scale


def _of_weight(ctx: Any, grad: Tensor, normal: Tensor, weight: Tensor) -> Tensor | None:
    """The gradient of a norm's weight; None of a frozen one."""
    if not ctx.needs_input_grad[1]:
        return None
    return (grad * normal).flatten(0, -2).sum(0).to(weight.dtype)


def _of_normalised(grad: Tensor, normal: Tensor, scale: Tensor) -> Tensor:
    """The gradient of x from that of `_normalised(x)`, which is written over."""
    along = torch.linalg.vecdot(grad, normal).unsqueeze(-1).div_(normal.shape[-1])
    return grad.addcmul_(normal, along, value=-1).mul_(scale)


class RMSNorm(torch.autograd.Function):
    """weight * x / rms(x), rms over the last dimension, computed in at least float32.

    x: (..., width), any float dtype; weight: (width,). The result is in `dtype`.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, eps: float, dtype: torch.dtype) -> Tensor:
        normal, scale = _normalised(x, eps)
        ctx.save_for_backward(x, weight, scale)
        return normal.mul_(weight).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale = ctx.saved_tensors
        grad, normal = grads[0].to(scale.dtype), x.to(scale.dtype) * scale
        of_weight = _of_weight(ctx, grad, normal, weight)
        of_x = _of_normalised(grad * weight.to(scale.dtype), normal, scale)
        return of_x.to(x.dtype), of_weight, None, None


class RotatedRMSNorm(torch.autograd.Function):
    """RMSNorm of each head, then rotary positions: of queries and of keys.

    x: (blocks, tokens, heads, size), any float dtype; weight: (size,); cosine, sine: (1 or blocks,
    tokens, 1, size) in `exact_dtype(x)`, their halves alike. The result is in `dtype`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        rotation: tuple[Tensor, Tensor],
        eps: float,
        dtype: torch.dtype,
    ) -> Tensor:
        normal, scale = _normalised(x, eps)
        ctx.save_for_backward(x, weight, scale, *rotation)
        return _rotated(normal.mul_(weight), *rotation, sign=1).to(dtype)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, scale, cosine, sine = ctx.saved_tensors
        grad = _rotated(grads[0].to(scale.dtype), cosine, sine, sign=-1)
        normal = x.to(scale.dtype) * scale
        of_weight = _of_weight(ctx, grad, normal, weight)
        of_x = _of_normalised(grad.mul_(weight), normal, scale)
        return of_x.to(x.dtype), of_weight, None, None, None


def _rotated(x: Tensor, cosine: Tensor, sine: Tensor, sign: int) -> Tensor:
    """x (..., size) with each value of its first half turned with that of its second; -1: back."""
    half = x.shape[-1] // 2
    turned = x * cosine
    turned[..., :half].addcmul_(x[..., half:], sine[..., :half], value=-sign)
    turned[..., half:].addcmul_(x[..., :half], sine[..., half:], value=sign)
    return turned


class CausalAttention(torch.autograd.Function):
    """softmax(scale * query @ key') @ value, of tokens up to each one's own, without dropout.

    All (blocks, heads, tokens, size), in the dtype that all is computed in. It keeps what each
    token attends to, tokens^2 values a head: for short blocks. Scores are in float32. In the
    backward keys and values lose their mean, which changes nothing but rounding: gradients of a
    token's scores sum to zero, and what is added to all of its weights' gradients cancels.
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, scale: float) -> Tensor:
        tokens = query.shape[2]
        flat = [one.flatten(0, 1) for one in (query, key, value)]
        exact = [one.to(exact_dtype(one)) for one in flat[:2]]
        later = exact[0].new_full((tokens, tokens), -torch.inf).triu(1)
        scores = torch.baddbmm(later, exact[0], exact[1].transpose(1, 2), alpha=scale)
        weights = scores.softmax(-1).to(query.dtype)
        ctx.save_for_backward(*flat, weights)
        ctx.scale, ctx.shape = scale, query.shape
        return (weights @ flat[2]).view(query.shape)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        query, key, value, weights = ctx.saved_tensors
        grad = grads[0].flatten(0, 1)
        of_value = weights.transpose(1, 2) @ grad
        of_weights = grad @ (value - value.mean(1, keepdim=True)).transpose(1, 2)
        of_scores = torch._softmax_backward_data(of_weights, weights, -1, weights.dtype)
        of_query = (of_scores @ (key - key.mean(1, keepdim=True))).mul_(ctx.scale)
        of_key = (of_scores.transpose(1, 2) @ query).mul_(ctx.scale)
        of_all = (one.view(ctx.shape) for one in (of_query, of_key, of_value))
        return *of_all, None
