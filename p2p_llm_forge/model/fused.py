"""Steps of a model that transformers writes as several, as one each: less time, less memory."""

from __future__ import annotations

from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface, AttentionMaskInterface, PreTrainedModel
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from p2p_llm_forge.model.fit import in_trial
from p2p_llm_forge.model.fused_steps import (
    CausalAttention,
    RMSNorm,
    RotatedRMSNorm,
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
# Up to here (tokens), in half precision, torch's flash attention takes twice the time of
# `CausalAttention` on a CPU, most of it in its backward.
SHORT_BLOCK = 256
SHORT_ATTENTION = "causal_attention_of_short_blocks"


def fuse(lm: Any) -> None:
    """Have a model's steps computed by fewer of torch's, where this is known to be the same.

    Tried on a few tokens: where the logits are others, all but the activations stay as they were.
    Weights, their names and the configuration do not change.
    """
    fuse_activations(lm)
    before = _of_a_trial(lm)
    fused = [module for name, module in lm.named_modules() if _is_fused(lm, name, module)]
    has_attention = _has_attention_of_torch(lm)
    if has_attention:
        _set_attention(lm, SHORT_ATTENTION)
    if torch.allclose(_of_a_trial(lm), before, rtol=1e-3, atol=1e-4):
        return
    for module in fused:
        del module.forward
    if has_attention:
        _set_attention(lm, "sdpa")


def _has_attention_of_torch(lm: Any) -> bool:
    """Whether all of its attention is torch's, by the interface that transformers has for it."""
    parts = [module.config for module in lm.modules() if isinstance(module, PreTrainedModel)]
    is_torchs = all(part._attn_implementation == "sdpa" for part in parts)
    return bool(parts) and is_torchs and lm._can_set_attn_implementation()


def _set_attention(lm: Any, name: str) -> None:
    AttentionInterface.register(SHORT_ATTENTION, attend_in_short_blocks)
    AttentionMaskInterface.register(SHORT_ATTENTION, sdpa_mask)
    lm.set_attn_implementation(name)


def _of_a_trial(lm: Any) -> Tensor:
    tokens = torch.tensor([[1, 0, 1, 1]], device=next(lm.parameters()).device)
    with in_trial(lm):
        logits: Tensor = lm(input_ids=tokens, use_cache=False).logits
    return logits


def _is_fused(lm: Any, name: str, module: nn.Module) -> bool:
    """Fuse the steps of this one module; False where it is of no kind that is known."""
    kind, last = type(module).__name__, name.rpartition(".")[2]
    own: Any = module  # which takes other attributes than tensors and modules, too
    if kind.endswith("RMSNorm") and hasattr(module, "variance_epsilon"):
        own.is_before_linear = last in BEFORE_LINEAR.get(lm.config.model_type, ())
        own.forward = MethodType(_normalise, module)
        return True
    if kind in NORMALISED_HEADS:
        own.forward = MethodType(_attend, module)
        return True
    return False


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
        of_cache = {"past_key_values": past_key_values, **others}
        arguments = (hidden_states, position_embeddings, attention_mask)
        found: tuple[Tensor, Tensor | None] = type(self).forward(self, *arguments, **of_cache)
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
    kept = {"scaling": self.scaling, "sliding_window": getattr(self, "sliding_window", None)}
    heads = (one.transpose(1, 2) for one in (query, key, value))
    output, weights = interface(self, *heads, attention_mask, dropout=dropout, **kept, **others)
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
    tokens = query.shape[2]
    dtype = autocast_dtype(query) or query.dtype
    is_ours = (
        *(attention_mask is None, query.device.type == "cpu", dtype.itemsize == 2),
        *(1 < tokens <= SHORT_BLOCK, query.shape == key.shape == value.shape),
        *(torch.is_grad_enabled(), not torch.compiler.is_compiling()),
        *(not others.get(name) for name in ("dropout", "softcap", "position_bias", "cache")),
        others.get("is_causal") in (None, True) and getattr(module, "is_causal", True),
    )
    if not all(is_ours):
        found: tuple[Tensor, None] = sdpa_attention_forward(
            module, query, key, value, attention_mask, **others
        )
        return found
    scale = others.get("scaling") or query.shape[-1] ** -0.5
    with torch.autocast("cpu", enabled=False):
        heads = (one.to(dtype) for one in (query, key, value))
        output = CausalAttention.apply(*heads, scale)
    return output.transpose(1, 2), None


def autocast_dtype(tensor: Tensor) -> torch.dtype | None:
    """What autocast computes products of it in; None where it is off."""
    kind = tensor.device.type
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else None


def fuse_activations(lm: Any) -> None:
    """Have GELU by its tanh approximation, as GPT-2 has it, computed by torch's one kernel.

    Written as eight steps it keeps four tensors of the feed-forward's size for the backward, where
    the kernel keeps one: a third of all that a GPT-2 keeps. Found by what a module computes, not by
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
