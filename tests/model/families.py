"""Tiny models of several families, and how their heads make logits, read off their forwards."""

from __future__ import annotations

import torch

from p2p_llm_forge.model.head import Head


def model_of(family: str, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).float().train()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
# Convolutions wide enough to show, and a first token that is one like others.
CONVOLUTIONS = {"layer_types": ["conv", "full_attention"], "initializer_range": 0.2}
CONVOLUTIONS |= {"block_auto_adjust_ff_dim": False, "pad_token_id": None}
BERT = {"is_decoder": True, "hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
FAMILIES = {
    "gpt2": ({**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, Head()),
    "llama": (LLAMA, Head()),
    "lfm2": ({**LLAMA, **CONVOLUTIONS}, Head()),
    "gpt_neox": ({**SIZES, "intermediate_size": 64}, Head()),
    "gemma2": ({**LLAMA, "head_dim": 16, "final_logit_softcapping": 2.0}, Head(cap=2.0)),
    "cohere": ({**LLAMA, "logit_scale": 0.1}, Head(scale=0.1)),
    "bert": ({**SIZES, "intermediate_size": 64, **BERT}, None),  # more layers than one
}
WIDE = {**LLAMA, "hidden_size": 48}
GEMMA = {**WIDE, "head_dim": 16}
# Caps and scales that new weights do not show, at a width that is no power of two.
CAPPED_OR_SCALED = {
    "gemma2": (GEMMA, Head(cap=30.0)),
    "gemma3n_text": (
        {
            **{**GEMMA, "num_hidden_layers": 4, "num_kv_shared_layers": 2, "laurel_rank": 4},
            **{"hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 64},
        },
        Head(cap=30.0),
    ),
    "gemma3_text": ({**GEMMA, "final_logit_softcapping": 20.0}, Head(cap=20.0)),
    "recurrent_gemma": ({**WIDE, "lru_width": 48}, Head(cap=30.0)),
    "xlstm": ({"hidden_size": 48, "num_blocks": 2, "num_heads": 4, "vocab_size": 64}, Head(cap=30)),
    "nanochat": (WIDE, Head(cap=15.0)),
    "cohere": (WIDE, Head(scale=0.0625)),
    "granite": ({**WIDE, "logits_scaling": 8.0}, Head(scale=1 / 8)),
    "hyperclovax": ({**WIDE, "logits_scaling": 8.0}, Head(scale=8.0)),
    "minicpm3": (
        {**WIDE, "q_lora_rank": 16, "kv_lora_rank": 16, "dim_model_base": 8},
        Head(before=1 / 6),
    ),
}
