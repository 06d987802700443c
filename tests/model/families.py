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
