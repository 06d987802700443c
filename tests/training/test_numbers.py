"""FLOPs of a token, peaks of devices and times, against counts by hand and by torch."""

from __future__ import annotations

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch.utils.flop_counter import FlopCounterMode

from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.training.numbers import data_sheet_flops, duration, flops_per_token, mfu
from tests.model.families import model_of

LENGTH = 32
SIZES = {"hidden_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4, "vocab_size": 96}
LLAMA = {**SIZES, "num_key_value_heads": 2, "intermediate_size": 128}
# Query, key, value (of 2 heads of 16), output; three matrices; two norms: of each layer.
LAYER = 64 * 64 + 2 * 64 * 32 + 64 * 64 + 3 * 64 * 128 + 2 * 64
ATTENTION = 12 * 2 * 4 * 16 * LENGTH


def test_flops_of_a_llama_are_those_counted_by_hand():
    lm = model_of("llama", **LLAMA)
    head, norm = 96 * 64, 64  # the embedding is looked up
    assert flops_per_token(lm, LENGTH) == 6 * (2 * LAYER + norm + head) + ATTENTION


def test_a_tied_head_counts_and_a_table_of_positions_does_not():
    lm = model_of("gpt2", **SIZES)
    norms, biases = 2 * 2 * 64, (3 * 64 + 64) + (256 + 64)
    layer = 64 * 192 + 64 * 64 + 2 * 64 * 256 + norms + biases
    head, norm = 96 * 64, 2 * 64
    assert flops_per_token(lm, LENGTH) == 6 * (2 * layer + norm + head) + ATTENTION


def test_tokens_that_do_not_count_cost_no_head():
    """Whole with its gradient, or frozen, against what torch counts in a loss of a quarter."""
    lm = model_of("llama", **LLAMA)
    module, tokens = NextTokenLoss(lm), torch.randint(96, (2, LENGTH))
    targets = tokens.masked_fill(torch.arange(LENGTH) % 4 > 0, -100)
    begins = torch.zeros_like(tokens, dtype=torch.bool)
    for _ in ("learns", "frozen"):
        torch_counts = []
        for one in (tokens, targets):
            with FlopCounterMode(display=False) as counter:
                module(tokens, one, begins)[0].backward()
            torch_counts.append(counter.get_total_flops() / tokens.numel())
        saved = flops_per_token(lm, LENGTH) - flops_per_token(lm, LENGTH, 0.25)
        assert saved == torch_counts[0] - torch_counts[1] > 0
        lm.lm_head.weight.requires_grad_(False)
        lm.peft_config = {"default": None}


def test_of_experts_those_count_that_a_token_uses():
    lm = model_of("mixtral", **LLAMA, num_local_experts=8, num_experts_per_tok=2)
    dense = LAYER - 3 * 64 * 128 + 8 * 64  # with a router
    used = 2 * 3 * 64 * 128
    expected = 6 * (2 * (dense + used) + 64 + 96 * 64) + ATTENTION
    assert flops_per_token(lm, LENGTH) == expected


def test_what_no_text_reaches_costs_nothing():
    lm = model_of("llama", **LLAMA)
    whole = flops_per_token(lm, LENGTH)
    lm.model.layers[1].mlp.down_proj.weight.requires_grad_(False)
    assert flops_per_token(lm, LENGTH) == whole - 6 * 64 * 128


@pytest.mark.parametrize("setting", [{"num_experts_per_tok": 0}, {"num_local_experts": 0}])
def test_experts_of_which_nobody_knows_how_many_are_used_make_it_unknown(setting):
    lm = model_of("mixtral", **LLAMA, num_local_experts=4)
    for name, value in setting.items():
        setattr(lm.config, name, value)
    assert flops_per_token(lm, LENGTH) is None


MOE = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48}
LATENT = {"q_lora_rank": 24, "kv_lora_rank": 16, "v_head_dim": 16, "n_routed_experts": 4}
LATENT |= {"qk_nope_head_dim": 16, "qk_rope_head_dim": 8, "num_experts_per_tok": 2, "n_group": 1}
LATENT |= {"topk_group": 1, "moe_intermediate_size": 48, "first_k_dense_replace": 1}
COUNTED = {
    "llama": LLAMA,
    "gpt2": {**SIZES, "resid_pdrop": 0.0},
    "qwen3": {**LLAMA, "head_dim": 24},
    "lfm2": {**LLAMA, "layer_types": ["conv", "full_attention"]},
    "nanochat": LLAMA,
    "gpt_neox": {**SIZES, "intermediate_size": 256},
    "gemma2": {**LLAMA, "head_dim": 16},
    "qwen3_moe": {**LLAMA, **MOE},
    "granitemoe": {**LLAMA, "num_local_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v3": {**LLAMA, **LATENT, "num_key_value_heads": 4, "num_hidden_layers": 3},
}


@pytest.mark.parametrize("family", COUNTED)
def test_flops_are_those_that_torch_counts(family):
    lm = model_of(family, **COUNTED[family]).eval()
    lm.set_attn_implementation("eager")
    if hasattr(lm, "set_experts_implementation"):
        lm.set_experts_implementation("eager")
    tokens = torch.randint(96, (2, LENGTH))
    with FlopCounterMode(display=False) as counter:
        lm(input_ids=tokens, use_cache=False).logits.sum().backward()
    counted = counter.get_total_flops() / tokens.numel()
    assert counted
    assert flops_per_token(lm, LENGTH) == pytest.approx(counted, rel=0.03)


def test_a_window_of_attention_ends_what_it_costs():
    sizes = {**LLAMA, "head_dim": 16, "sliding_window": 8}
    lm = model_of("gemma2", **sizes)
    assert lm.config.layer_types == ["sliding_attention", "full_attention"]
    of_a_token = 12 * 4 * 16
    assert flops_per_token(lm, 32) - flops_per_token(lm, 16) == of_a_token * 16


@pytest.mark.parametrize(
    ("name", "precision", "tera"),
    [
        ("NVIDIA H200", "bf16", 989.4),
        ("NVIDIA H100 80GB HBM3", "fp16", 989.4),
        ("NVIDIA H100 PCIe", "bf16", 756),
        ("NVIDIA A100-SXM4-80GB", "no", 19.5),
        ("NVIDIA GeForce RTX 4090", "bf16", 165.2),
        ("Tesla T4", "fp16", 65),
        ("Tesla T4", "bf16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bf16", None),
        ("NVIDIA H200 MIG 1g.18gb", "bf16", None),
        ("NVIDIA A10G", "bf16", None),
        ("Something Else", "bf16", None),
    ],
)
def test_only_the_very_gpu_of_a_data_sheet_has_its_peak(name, precision, tera):
    peak = data_sheet_flops(name, precision)
    assert peak == (None if tera is None else pytest.approx(1e12 * tera))


def test_tf32_counts_where_it_may_be_used():
    assert data_sheet_flops("NVIDIA A100-SXM4-40GB", "no", may_use_tf32=True) == 156e12


def test_utilisation_is_what_is_needed_of_what_there_is():
    assert mfu(1000.0, 2e9, 8e12) == 0.25
    assert mfu(1000.0, None, 8e12) is None and mfu(1000.0, 2e9, None) is None


@pytest.mark.parametrize(
    ("seconds", "words"),
    [
        (0.2, "0 s"),
        (59.6, "1 min 0 s"),
        (185, "3 min 5 s"),
        (3600, "1 h 0 min"),
        (7859, "2 h 10 min"),
        (3 * 86400 + 4 * 3600 + 5, "3 d 4 h"),
        (-1, "0 s"),
    ],
)
def test_a_duration_is_said_by_its_two_largest_units(seconds, words):
    assert duration(seconds) == words


def test_weights_that_stay_beside_adapters_cost_a_third_less():
    """Forward and the way back through them, but no gradient of their own."""
    lm = model_of("llama", **LLAMA)
    whole = flops_per_token(lm, LENGTH)
    inject_adapter_in_model(LoraConfig(r=4, target_modules=["q_proj"]), lm)
    of_adapters = 2 * 2 * 4 * 64
    assert flops_per_token(lm, LENGTH) == pytest.approx(
        4 * (whole - ATTENTION) / 6 + ATTENTION + 6 * of_adapters
    )
