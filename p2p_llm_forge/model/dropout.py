"""Dropout of the stream that all layers share, for models that have none of their own there."""

from __future__ import annotations

from typing import Any

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.shape import OUTPUT_PROJECTIONS


def add_dropout(lm: Any, probability: float) -> None:
    """In training, drop parts of the embedding and of what attention and feed-forward add.

    The model stays what it is: nothing of this is in its weights or its configuration, and nothing
    is dropped in evaluation. The places are GPT-2's, but for attention weights, whose dropout is
    slow. Raises ForgeError for a family whose places are not known.
    """
    if not probability:
        return
    projections = [
        module
        for name, module in lm.named_modules()
        if name.rpartition(".")[2] in OUTPUT_PROJECTIONS
        # An adapter is beside the layer that it adds to.
        and isinstance(getattr(module, "base_layer", module), torch.nn.Linear)
    ]
    if not projections:
        own = [name for name, value in lm.config.to_dict().items() if _is_dropout(name, value)]
        given = ",".join(f"{name}={probability:g}" for name in own)
        raise ForgeError(
            f"--dropout {probability:g} is for families whose layers end in"
            f" {' and '.join(OUTPUT_PROJECTIONS)}, which {lm.config.model_type} has not",
            "leave it out"
            + f"; from scratch, the family has its own: --config-overrides {given}" * bool(own),
        )

    def drop(module: torch.nn.Module, _: Any, output: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.dropout(output, probability, module.training)

    for module in (lm.get_input_embeddings(), *projections):
        module.register_forward_hook(drop)


def _is_dropout(name: str, value: Any) -> bool:
    is_of_other_heads = name.startswith(("summary", "classifier"))
    ends = ("pdrop", "dropout", "dropout_prob")
    return isinstance(value, float) and name.endswith(ends) and not is_of_other_heads
