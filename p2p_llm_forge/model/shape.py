"""The default model, from one dial: the sizes and the rate that follow from `--depth`."""

from __future__ import annotations

from typing import Any

# Short convolutions, then attention: measured best of the stock classes (benchmarks/README.md).
FAMILY, WITHOUT_CONVOLUTIONS = "lfm2", "qwen3"
DEPTH = 4
NARROWEST, MOST_HEADS = 128, 1024
STARTS_AT_ZERO = ("lfm2", "qwen3")  # families whose output projections do
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


def family_of(depth: int | None, overrides: str | None) -> str:
    """The family where none is given: llama.cpp reads no lfm2 of a single kind of layer.

    overrides: single sizes that were given, by the names of the one family that all depths have.
    """
    return WITHOUT_CONVOLUTIONS if depth == 1 and not overrides else FAMILY


def sizes_of_family(family: str, shape: dict[str, Any], layers: int) -> dict[str, Any]:
    """What a family needs besides, or otherwise, to be of that shape (see `shape_of`)."""
    if family != "lfm2":
        return {}
    width, most = shape["hidden_size"], shape["num_attention_heads"]
    # Its heads share the width evenly, and rotary positions turn pairs.
    heads = next((n for n in range(most, 0, -1) if width % (2 * n) == 0), most)
    return {
        **dict.fromkeys(("num_attention_heads", "num_key_value_heads"), heads),
        "layer_types": ["full_attention" if one else "conv" for one in has_attention(layers)],
        "block_auto_adjust_ff_dim": False,  # it would take two thirds of the feed-forward's size
        "pad_token_id": None,  # its first token, the end of our documents, would not be learnt
        "rope_parameters": {"rope_type": "default", "rope_theta": 10_000.0},
        "tie_word_embeddings": False,
    }


def has_attention(layers: int) -> list[bool]:
    """Which layers of an lfm2 attend: every third, and the last; the others are convolutions."""
    return [layer % 3 == 2 or layer == layers - 1 for layer in range(layers)]


def output_projections(family: str) -> tuple[str, ...]:
    """What adds to the stream that all layers share: from zero, a new layer changes nothing."""
    return ("out_proj", "w2") if family == "lfm2" else ("o_proj", "down_proj")


def learning_rate_of(optimizer: str, depth: int | None) -> float:
    """The peak rate where none is given. depth: None where sizes do not follow from it."""
    if depth is None or optimizer not in RATES:
        return RATE
    width = shape_of(depth)["hidden_size"]
    return float(f"{RATES[optimizer] * (256 / width) ** 0.5:.2g}")
