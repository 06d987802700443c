"""The default model, from one dial: the sizes and the rate that follow from `--depth`."""

from __future__ import annotations

from typing import Any

FAMILY = "qwen3"
DEPTH = 4
NARROWEST, MOST_HEADS = 128, 1024
# What adds to the stream that all layers share: from zero, a new layer changes nothing at first.
OUTPUT_PROJECTIONS = ("o_proj", "down_proj")
STARTS_AT_ZERO = ("qwen3",)  # families whose output projections do
# Peak rates of a model that is 256 wide, from scratch; wider ones take less.
RATES = {"muon": 5.5e-3, "adamw": 2e-3}
RATE = 1e-3  # where sizes, or anything about the optimizer, are not known


def shape_of(depth: int, width: int | None = None, heads: int | None = None) -> dict[str, Any]:
    """The sizes of a model of so many layers, by transformers' usual names.

    width, heads: where they are not to follow from the depth.
    """
    width = width or max(NARROWEST, 64 * depth)
    head_size = 64 if width >= 128 else 32
    usual = max(1, width // head_size)
    heads = heads or min(MOST_HEADS, usual)
    if heads != usual:
        head_size = max(2, width // heads)
    return {
        "num_hidden_layers": depth,
        "hidden_size": width,
        "num_attention_heads": heads,
        "num_key_value_heads": heads,
        "head_dim": head_size,
        "intermediate_size": 3 * width,
    }


def learning_rate_of(optimizer: str, depth: int | None) -> float:
    """The peak rate where none is given. depth: None where sizes do not follow from it."""
    if depth is None or optimizer not in RATES:
        return RATE
    width = shape_of(depth)["hidden_size"]
    return float(f"{RATES[optimizer] * (256 / width) ** 0.5:.2g}")
