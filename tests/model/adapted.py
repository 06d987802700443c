"""Small models with adapters."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

SIZES = {"vocab_size": 300, "bos_token_id": 1, "eos_token_id": 1}


def a_llama(folder: Path, tokenizer_dir: Path, seed: int = 0, **sizes: Any) -> str:
    """A Llama with a head of its own, saved with its tokenizer; its path."""
    torch.manual_seed(seed)
    shape = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
    shape |= {"num_attention_heads": 2, "max_position_embeddings": 64, **sizes}
    LlamaForCausalLM(LlamaConfig(**SIZES, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return str(folder)


def a_gpt2(folder: Path, tokenizer_dir: Path) -> str:
    """A GPT-2, whose layers lie the other way round and whose head is tied; its path."""
    torch.manual_seed(0)
    shape = {"n_layer": 2, "n_head": 2, "n_embd": 32, "n_positions": 64}
    GPT2LMHeadModel(GPT2Config(**SIZES, **shape)).save_pretrained(folder)
    AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)
    return str(folder)


def shaken(lm: Any, seed: int = 1) -> Any:
    """The model, its adapters with random numbers: new ones add nothing."""
    draw = torch.Generator().manual_seed(seed)
    changed = 0
    for name, parameter in lm.named_parameters():
        if ".lora_" in name:
            parameter.data.copy_(0.1 * torch.randn(parameter.shape, generator=draw))
            changed += 1
    assert changed
    return lm


def logits_of(lm: Any) -> torch.Tensor:
    """For the tokens that stranger_peft.py reads."""
    with torch.no_grad():
        return lm.eval()(input_ids=torch.arange(32).unsqueeze(0), use_cache=False).logits
