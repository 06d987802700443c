"""Steps of a model that transformers writes as several, as one each: less time, less memory."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from p2p_llm_forge.model.fit import in_trial
from p2p_llm_forge.model.fused_steps import (
    CausalAttention,
    RMSNorm,
    RotatedRMSNorm,
    autocast_dtype,
    exact_dtype,
)

# Families whose norms, but the last and those of heads, are read by linear layers alone: under
# autocast those may get half precision at once, where each would make its own copy.
BEFORE_LINEAR = {
    "lfm2": ("operator_norm", "ffn_norm"),
    "qwen3": ("input_layernorm", "post_attention_layernorm"),
    "llama": ("input_layernorm", "post_attention_layernorm"),
}
# Attention that normalises each head and rotates it: names of its two norms and its last layer.
NORMALISED_HEADS = {
    "Lfm2Attention": ("q_layernorm", "k_layernorm", "out_proj"),
    "Qwen3Attention": ("q_norm", "k_norm", "o_proj"),
}
# Up to here (tokens), in half precision, torch's flash attention takes 1.2 to 2.6 times the time of
# `CausalAttention` on a CPU, most of it in its backward.
SHORT_BLOCK = 256
# What else transformers may ask of attention. position_bias is a tensor.
NOT_PLAIN = ("dropout", "softcap", "cache")


def fuse(lm: Any) -> None:
    """Have a model's steps computed by fewer of torch's.

    Modules are known by their classes, and each is tried: one that computes otherwise stays as it
    is. Weights, their names and the configuration do not change. From then on this process computes
    torch's attention of short blocks by `attend_in_short_blocks`, whichever model asks for it.
    """
    fuse_activations(lm)
    AttentionInterface.register("sdpa", attend_in_short_blocks)
    for name, module in lm.named_modules():
        kind, last = type(module).__name__, name.rpartition(".")[2]
        if kind.endswith("RMSNorm") and _is_norm_of_one_weight(module):
            module.is_before_linear = last in BEFORE_LINEAR.get(lm.config.model_type, ())
            _fuse_alike(module, _normalise, _inputs_of_norm)
        elif kind in NORMALISED_HEADS:
            _fuse_alike(module, _attend, _inputs_of_attention)


def _fuse_alike(
    module: Any, forward: Callable[..., Any], inputs_of: Callable[[Any], tuple[Any, ...]]
) -> None:
    """Give a module this forward, if both compute the same."""
    try:
        inputs = inputs_of(module)
        with in_trial(module):  # where a last layer begins at zero, too
            own, ours = (call(module, *inputs) for call in (type(module).forward, forward))
        first, second = (one[0] if isinstance(one, tuple) else one for one in (own, ours))
        rtol, atol = (1e-3, 1e-5) if second.dtype.itemsize > 2 else (0.05, 0.05)
        is_alike = torch.allclose(second, first, rtol=rtol, atol=atol)
    except Exception:  # whatever a module of another kind raises, or returns
        return
    if is_alike:
        module.forward = MethodType(forward, module)


def _is_norm_of_one_weight(module: Any) -> bool:
    weight = getattr(module, "weight", None)
    parameters = inspect.signature(type(module).forward).parameters
    is_known = hasattr(module, "variance_epsilon") and len(parameters) == 2
    return is_known and isinstance(weight, nn.Parameter) and weight.dim() == 1


def _values(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(0))


def _inputs_of_norm(module: Any) -> tuple[Tensor]:
    return (_values(3, len(module.weight)).to(module.weight.device),)


def _inputs_of_attention(module: Any) -> tuple[Any, ...]:
    """Three tokens, their angles, and no mask."""
    weight = module.q_proj.weight
    angles = _values(1, 3, module.head_dim // 2).repeat(1, 1, 2).to(weight.device)
    hidden = _values(1, 3, module.q_proj.in_features).to(weight)
    return hidden, (angles.cos().to(weight), angles.sin().to(weight)), None


def _normalise(self: Any, hidden_states: Tensor) -> Tensor:
    """An RMSNorm's forward."""
    if torch.compiler.is_compiling():
        found: Tensor = type(self).forward(self, hidden_states)
        return found
    dtype = torch.promote_types(hidden_states.dtype, self.weight.dtype)
    if self.is_before_linear:
        dtype = autocast_dtype(hidden_states) or dtype
    with torch.autocast(hidden_states.device.type, enabled=False):
        return RMSNorm.apply(hidden_states, self.weight, self.variance_epsilon, dtype)


def _attend(
    self: Any,
    hidden_states: Tensor,
    position_embeddings: tuple[Tensor, Tensor],
    attention_mask: Tensor | None,
    past_key_values: Any = None,
    **others: Any,
) -> tuple[Tensor, Tensor | None]:
    """The forward of attention with normalised heads; its own where tokens were kept before."""
    interface = ALL_ATTENTION_FUNCTIONS.get(self.config._attn_implementation)
    if interface is None or past_key_values is not None or torch.compiler.is_compiling():
        found: tuple[Tensor, Tensor | None] = type(self).forward(
            self,
            hidden_states,
            position_embeddings,
            attention_mask,
            past_key_values=past_key_values,
            **others,
        )
        return found
    norm_of_query, norm_of_key, last = (
        getattr(self, name) for name in NORMALISED_HEADS[type(self).__name__]
    )
    before = hidden_states.shape[:-1]
    query, key, value = (
        layer(hidden_states).view(*before, -1, self.head_dim)
        for layer in (self.q_proj, self.k_proj, self.v_proj)
    )
    rotation = tuple(one.unsqueeze(2).to(exact_dtype(query)) for one in position_embeddings)
    query, key = (
        _normalise_and_rotate(norm, heads, rotation)
        for norm, heads in ((norm_of_query, query), (norm_of_key, key))
    )
    dropout = getattr(self, "attention_dropout", 0.0) if self.training else 0.0
    window = getattr(self, "sliding_window", None)
    asked = {"dropout": dropout, "scaling": self.scaling, "sliding_window": window, **others}
    heads = (one.transpose(1, 2) for one in (query, key, value))
    output, weights = interface(self, *heads, attention_mask, **asked)
    return last(output.reshape(*before, -1)), weights


def _normalise_and_rotate(norm: Any, heads: Tensor, rotation: tuple[Tensor, ...]) -> Tensor:
    dtype = torch.promote_types(heads.dtype, norm.weight.dtype)
    dtype = autocast_dtype(heads) or dtype
    with torch.autocast(heads.device.type, enabled=False):
        return RotatedRMSNorm.apply(heads, norm.weight, rotation, norm.variance_epsilon, dtype)


def attend_in_short_blocks(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    **others: Any,
) -> tuple[Tensor, None]:
    """torch's attention, as transformers calls it; our own of short blocks in training."""
    dtype = autocast_dtype(query) or query.dtype
    is_plain = attention_mask is None and not any(others.get(name) for name in NOT_PLAIN)
    is_plain = is_plain and others.get("position_bias") is None
    is_causal = others.get("is_causal")
    is_causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    is_short = 1 < query.shape[2] <= SHORT_BLOCK and query.shape == key.shape == value.shape
    is_half = query.device.type == "cpu" and dtype.itemsize == 2
    is_in_training = torch.is_grad_enabled() and not torch.compiler.is_compiling()
    if not (is_plain and is_causal and is_short and is_half and is_in_training):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **others
        )
        return found
    scale = others.get("scaling")
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    with torch.autocast("cpu", enabled=False):
        heads = (one.to(dtype) for one in (query, key, value))
        output = CausalAttention.apply(*heads, scale)
    return output.transpose(1, 2), None


def fuse_activations(lm: Any) -> None:
    """Have GELU by its tanh approximation, as GPT-2 has it, computed by torch's one kernel.

    Written as eight steps it keeps four tensors of the feed-forward's size for the backward, where
    the kernel keeps one. Found by what a module computes, not by
    its name alone; weights and their names stay as they are.
    """
    for module in list(lm.modules()):
        for name, child in module.named_children():
            if is_gelu_by_tanh(child):
                setattr(module, name, nn.GELU("tanh"))


def is_gelu_by_tanh(module: nn.Module) -> bool:
    """Whether a module is that approximation, written in several steps."""
    own_kernel = type(module).forward is nn.GELU.forward
    if own_kernel or "gelu" not in type(module).__name__.lower() or list(module.parameters()):
        return False
    values = torch.linspace(-9, 9, 181, dtype=torch.float64)
    try:
        with torch.no_grad():
            found = module(values)
    except Exception:  # whatever a module of that name raises that wants something else
        return False
    # The exact one is up to 5e-4 away, and constants written with ten digits less than 1e-9.
    expected = nn.functional.gelu(values, approximate="tanh")
    is_alike = isinstance(found, torch.Tensor) and found.shape == expected.shape
    return is_alike and torch.allclose(found, expected, rtol=0, atol=1e-7)
