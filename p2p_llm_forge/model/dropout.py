"""Dropout of the stream that all layers share, for models that have none of their own there."""

from __future__ import annotations

from typing import Any

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.shape import output_projections


def add_dropout(lm: Any, probability: float) -> None:
    """In training, drop parts of the embedding and of what attention and feed-forward add.

    The model stays what it is: nothing of this is in its weights or its configuration, and nothing
    is dropped in evaluation. The places are GPT-2's, but for attention weights, whose dropout is
    slow. Raises ForgeError for a family whose places are not known.
    """
    if not probability:
        return
    names = output_projections(lm.config.model_type)
    projections = [
        module
        for name, module in lm.named_modules()
        if name.rpartition(".")[2] in names
        # An adapter is beside the layer that it adds to.
        and isinstance(getattr(module, "base_layer", module), torch.nn.Linear)
    ]
    if not projections:
        own = [name for name, value in lm.config.to_dict().items() if _is_dropout(name, value)]
        given = ",".join(f"{name}={probability:g}" for name in own)
        raise ForgeError(
            f"--dropout {probability:g} is for families whose layers end in"
            f" {' and '.join(names)}, which {lm.config.model_type} has not",
            "leave it out"
            + f"; from scratch, the family has its own: --config-overrides {given}" * bool(own),
        )

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return dropped(output, probability) if module.training else output

    for module in (lm.get_input_embeddings(), *projections):
        module.register_forward_hook(drop)


def dropped(values: torch.Tensor, probability: float) -> torch.Tensor:
    """`values` without a random share of them, the rest scaled up, of their shape and dtype.

    On a CPU torch draws a number for each (2.13: an eighth of a small model's update); here
    each number drawn serves four, and the probability is one in whole 65,536ths.
    """
    if values.device.type != "cpu" or torch.compiler.is_compiling():
        return torch.nn.functional.dropout(values, probability)
    draws = torch.empty(-(-values.numel() // 4), dtype=torch.int64).random_(-(2**63), None)
    parts = draws.view(torch.int16)[: values.numel()].view(values.shape)
    is_left = parts >= round(2**16 * probability) - 2**15
    return values * (is_left.to(values.dtype) * (1 / (1 - probability)))


def _is_dropout(name: str, value: Any) -> bool:
    is_of_other_heads = name.startswith(("summary", "classifier"))
    ends = ("pdrop", "dropout", "dropout_prob")
    return isinstance(value, float) and name.endswith(ends) and not is_of_other_heads
