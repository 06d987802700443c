"""Tiny models of several families, and whether their head is a linear layer."""

from __future__ import annotations

import torch


def model_of(family: str, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).float().train()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES = {
    "gpt2": ({**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, True),
    "llama": (LLAMA, True),
    "gpt_neox": ({**SIZES, "intermediate_size": 64}, True),
    "gemma2": ({**LLAMA, "head_dim": 16, "final_logit_softcapping": 2.0}, False),  # capped logits
    "cohere": ({**LLAMA, "logit_scale": 0.1}, False),  # scaled logits
}
# With the caps and scales that they have by default, which new weights do not show.
CAPPED_OR_SCALED = {
    "gemma2": {**LLAMA, "head_dim": 16},
    "gemma3n_text": {
        **{**LLAMA, "head_dim": 16, "num_hidden_layers": 4, "num_kv_shared_layers": 2},
        **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64, "laurel_rank": 4},
    },
    "cohere": LLAMA,
    "granite": {**LLAMA, "logits_scaling": 8.0},
    "minicpm3": {**LLAMA, "q_lora_rank": 16, "kv_lora_rank": 16, "dim_model_base": 8},
    "nanochat": LLAMA,
}
