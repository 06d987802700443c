"""Numbers that say how well hardware is used: FLOPs of a token, peaks by data sheet, time left."""

from __future__ import annotations

import re
from typing import Any

EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
EXPERTS_OF_A_TOKEN = (
    *("num_experts_per_tok", "num_experts_per_token", "top_k_experts", "moe_topk", "moe_k"),
)
# TFLOP/s without sparsity: bf16 or fp16 with sums in float32, TF32, float32 without tensor cores.
# From NVIDIA's data sheets (B200, H200, H100, A100, A40, A30, A10, L40S, L40, L4, V100, T4) and
# whitepapers (GB202, AD102, GA102: appendix, "peak FP16 Tensor TFLOPS with FP32 accumulate").
TENSOR_PEAKS: dict[str, tuple[float, float, float]] = {
    r"B200": (2250, 1125, 75),
    r"H200|H100( 80GB HBM3)?|GH200 480GB": (989.4, 494.7, 66.9),
    r"H200 NVL|H100 NVL": (835, 417, 60),
    r"H100 PCIe": (756, 378, 51.2),
    r"A100-(SXM4|PCIE)-[48]0GB|A100 80GB PCIe": (312, 156, 19.5),
    r"A40": (149.7, 74.8, 37.4),
    r"A30": (165, 82, 10.3),
    r"A10": (125, 62.5, 31.2),
    r"L40S": (362, 183, 91.6),
    r"L40": (181, 90.5, 90.5),
    r"L4": (121, 60, 30.3),
    r"RTX 5090": (209.5, 104.8, 104.8),
    r"RTX 6000 Ada Generation": (364.2, 182.1, 91.1),
    r"RTX 4090": (165.2, 82.6, 82.6),
    r"RTX A6000": (154.8, 77.4, 38.7),
    r"RTX 3090": (71, 35.6, 35.6),
}
# Without bfloat16: fp16 on tensor cores, and float32.
OLD_PEAKS = {r"V100-SXM2-(16|32)GB": (125, 15.7), r"T4": (65, 8.1)}


def data_sheet_flops(name: str, precision: str, may_use_tf32: bool = False) -> float | None:
    """Dense FLOP/s of a GPU by its data sheet; None where it is not known.

    name: as torch has it. precision: of products: bf16, fp16 or no (float32, in TF32 if allowed).
    """
    short = re.sub(r"^(NVIDIA |GeForce |Tesla )*", "", name)
    for pattern, (half, tf32, full) in TENSOR_PEAKS.items():
        if re.fullmatch(pattern, short):
            return 1e12 * (half if precision != "no" else tf32 if may_use_tf32 else full)
    for pattern, (half, full) in OLD_PEAKS.items():
        if re.fullmatch(pattern, short) and precision != "bf16":
            return 1e12 * (half if precision == "fp16" else full)
    return None


def flops_per_token(lm: Any, length: int, counted: float = 1.0) -> float | None:
    """FLOPs of forward and backward for each token of texts of `length` tokens; None: unknown.

    6 N + 12 L H Q T, as PaLM counts (arXiv 2204.02311, appendix B): N parameters that a token is
    multiplied with, then attention to the whole length, so what a causal mask leaves out is
    counted. Neither recomputed activations nor lookups, and of experts those that a token uses.
    counted: the share of tokens that count in the loss; the others never reach the head.
    """
    adapted = getattr(lm, "peft_config", None)  # by LoRA: weights that stay have no gradient
    parameters = active_parameters(lm)
    attention = attention_products(lm.config.get_text_config(decoder=True), length)
    if parameters is None or attention is None:
        return None
    trained = sum(p.numel() for p in lm.parameters() if p.requires_grad) if adapted else parameters
    whole = 4.0 * parameters + 2.0 * trained + 6.0 * attention
    if counted == 1:
        return whole
    head = lm.get_output_embeddings().weight
    return whole - (1 - counted) * (6 if head.requires_grad else 4) * head.numel()


def active_parameters(lm: Any) -> float | None:
    """Parameters that every token is multiplied with; None where experts make that unknown.

    A layer that stands in several places counts as often; an embedding only as a tied head.
    """
    from torch import nn  # not at import: --help cannot wait

    config = lm.config.get_text_config(decoder=True)
    experts, used = _first(config, EXPERTS), _first(config, EXPERTS_OF_A_TOKEN)
    dense, of_experts = 0, 0
    for path, module in lm.named_modules(remove_duplicate=False):
        if isinstance(module, nn.Embedding):
            continue
        for parameter in module.parameters(recurse=False):
            is_stack = parameter.dim() == 3 and len(parameter) == experts
            is_stack &= not isinstance(module, nn.Conv1d)
            is_reached = parameter.requires_grad or getattr(lm, "peft_config", None)
            if not is_reached:
                continue
            if is_stack or "experts" in path.split("."):
                of_experts += parameter.numel()
            else:
                dense += parameter.numel()
    if bool(of_experts) != bool(experts and experts > 1) or hasattr(config, "zero_expert_num"):
        return None
    if not of_experts:
        return float(dense)
    return dense + of_experts * used / experts if experts and used else None


def attention_products(config: Any, length: int) -> int | None:
    """Multiplications of a token's forward in attention to `length` tokens; None: unknown."""
    heads, layers = (_first(config, (n,)) for n in ("num_attention_heads", "num_hidden_layers"))
    if not getattr(config, "num_attention_heads", None):
        return 0  # a recurrent family
    if not heads or not layers:
        return None
    width = _first(config, ("head_dim",)) or (_first(config, ("hidden_size",)) or 0) // heads
    latent = [_first(config, (n,)) or 0 for n in ("qk_nope_head_dim", "qk_rope_head_dim")]
    of_query = sum(latent) if all(latent) else width
    of_value = (_first(config, ("v_head_dim",)) if all(latent) else None) or width
    return heads * (of_query + of_value) * sum(_attended(config, layers, length))


def _attended(config: Any, layers: int, length: int) -> list[int]:
    """How many tokens the attention of each layer spans."""
    names = ("layer_types", "layers_block_type")
    kinds = next((kinds for n in names if (kinds := getattr(config, n, None))), None)
    windows = {
        "sliding_attention": _first(config, ("sliding_window",)) or length,
        "chunked_attention": _first(config, ("attention_chunk_size",)) or length,
    }
    if kinds is None:
        return [length] * layers
    return [
        min(length, windows.get(kind, length))
        for kind in list(kinds)[:layers]
        if kind == "hybrid" or ("attention" in kind and "linear" not in kind)
    ]


def _first(config: Any, names: tuple[str, ...]) -> int | None:
    """The first of these sizes that a configuration has as a number."""
    values = (getattr(config, name, None) for name in names)
    return next((one for one in values if isinstance(one, int) and one > 0), None)


def mfu(tokens_per_second: float, of_a_token: float | None, peak: float | None) -> float | None:
    """Model FLOPs utilisation, 0 to 1: of what all ranks could multiply, what the model needs.

    of_a_token: its FLOPs. peak: FLOP/s of all ranks together. None where one is unknown.
    """
    return tokens_per_second * of_a_token / peak if of_a_token and peak else None


def duration(seconds: float) -> str:
    """Seconds for a person: 42 s, 3 min 5 s, 2 h 10 min, 3 d 4 h."""
    whole = max(0, round(seconds))
    for size, unit, below, sub in ((86400, "d", 3600, "h"), (3600, "h", 60, "min")):
        if whole >= size:
            return f"{whole // size} {unit} {whole % size // below} {sub}"
    return f"{whole // 60} min {whole % 60} s" if whole >= 60 else f"{whole} s"
