"""How a family makes logits of its last hidden state: scales, a linear layer, a soft cap."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product as all_of
from typing import Any

import torch
from torch import nn

from p2p_llm_forge.model.fit import in_evaluation

# By what names configurations have them (transformers 5.23). A scale multiplies or divides, the
# logits or the hidden state: granite divides logits by what hyperclovax multiplies them with, and
# minicpm3 divides the hidden state by it.
CAPS = ("final_logit_softcapping", "logits_soft_cap", "output_logit_soft_cap")
SCALES = ("logit_scale", "logits_scaling", "lm_head_multiplier", "logits_mup_width_multiplier")


@dataclass(frozen=True)
class Head:
    """logits = capped(scale * (weight @ (before * hidden) + bias)), capped(x) = cap * tanh(x / cap)
    or, without a cap, x."""

    before: float = 1.0
    scale: float = 1.0
    cap: float | None = None

    def scaled(self, hidden: torch.Tensor) -> torch.Tensor:
        """What the linear layer is given."""
        return hidden if self.before == 1 else hidden * self.before

    def logits(self, product: torch.Tensor) -> torch.Tensor:
        """The logits, from what the linear layer gives."""
        scaled = product if self.scale == 1 else product * self.scale
        return scaled if self.cap is None else self.cap * torch.tanh(scaled / self.cap)


PLAIN = Head()


def head_of(lm: Any) -> Head | None:
    """How the model makes its logits; None where it is not as a Head does it.

    Its configuration says how, where it has one of the names above, and a trial confirms it, since
    only the model knows what it does: with large values in place of hidden states and logits. Those
    of a new model are so small that a soft cap or one more norm changes nothing.
    """
    head, base = lm.get_output_embeddings(), lm.base_model
    if base is lm or not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return None
    tried = _try(lm, head)
    if tried is None:
        return None
    sent, received, shown, logits = tried
    factors, caps = settings_of(lm.config)
    candidates = (Head(*one) for one in all_of(factors, factors, caps))
    return next(
        (
            one
            for one in candidates
            if is_close(one.scaled(sent), received) and is_close(one.logits(shown), logits)
        ),
        None,
    )


def settings_of(config: Any) -> tuple[list[float], list[float | None]]:
    """(factors, caps) that a head may have by its configuration; last those that change nothing."""
    factors: list[float] = []
    caps: list[float | None] = []
    for part in (config, config.get_text_config(decoder=True)):
        caps += [cap for name in CAPS if (cap := number_of(part, name))]
        for scale in (number_of(part, name) for name in SCALES):
            factors += [scale, 1 / scale] if scale else []
    return list(dict.fromkeys([*factors, 1.0])), list(dict.fromkeys([*caps, None]))


def number_of(config: Any, name: str) -> float | None:
    """A value of a configuration, None where it is no number."""
    value = getattr(config, name, None)
    return float(value) if isinstance(value, int | float) else None


def _try(lm: Any, head: nn.Module) -> tuple[torch.Tensor, ...] | None:
    """(sent, received, shown, logits): the hidden states that the head was sent and what came to
    it, then what it was made to give and the logits that the model made of that.

    None where head and base model are not used once each, or the base model otherwise than alone.
    """
    # Two tokens: every model takes that many, however short its context.
    tokens = torch.tensor([[1, 0]], device=lm.get_output_embeddings().weight.device)
    own, sent, received, shown = [], [], [], []

    def replace_hidden(_: Any, __: Any, output: Any) -> Any:
        own.append(output[0])
        sent.append(loud(output[0]))
        if isinstance(output, tuple):
            return (sent[-1], *output[1:])
        output[next(iter(output))] = sent[-1]
        return output

    def replace_logits(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        received.append(inputs[0])
        shown.append(loud(output))
        return shown[-1].clone()  # xlstm caps in place

    with in_evaluation(lm):
        alone = lm.base_model(input_ids=tokens, use_cache=False)[0]
        hooks = [lm.base_model.register_forward_hook(replace_hidden)]
        hooks += [head.register_forward_hook(replace_logits)]
        try:
            logits = lm(input_ids=tokens, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
    if not len(own) == len(received) == 1 or not is_close(own[0], alone):
        return None
    return sent[0], received[0], shown[0], logits


def loud(like: torch.Tensor) -> torch.Tensor:
    """Values from a tenth to thousands in the shape of `like`, the same at every call: a cap bends
    the middle ones, and the largest would show any."""
    draw = torch.Generator().manual_seed(0)
    sizes = 10 ** (5 * torch.rand(like.shape, generator=draw) - 1)
    return (sizes * torch.randn(like.shape, generator=draw)).to(like)


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same but for rounding in float32."""
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), rtol=1e-4, atol=1e-5
    )
