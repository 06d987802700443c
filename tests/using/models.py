"""Small models with random weights, saved as transformers saves them, without this project."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedTokenizerFast

CONTEXT = 48
SIZES: dict[str, dict[str, Any]] = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": CONTEXT},
    **dict.fromkeys(
        ("llama", "qwen3"),
        {
            **{"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 48},
            **{"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16},
            "max_position_embeddings": CONTEXT,
        },
    ),
    "lfm2": {
        **{"hidden_size": 32, "num_hidden_layers": 3, "intermediate_size": 96},
        **{"num_attention_heads": 4, "num_key_value_heads": 4, "tie_word_embeddings": False},
        **{"layer_types": ["conv", "conv", "full_attention"], "block_auto_adjust_ff_dim": False},
        "max_position_embeddings": CONTEXT,
    },
}
TEXT = [
    "Mara bakes bread, and Ines mends the nets; don't you see 3.14 ferries?",
    "Öğrenme ağırlığı: 学習と模型 👩🏽‍🚀 naïve café\n\n    def peer(x):\n\treturn x == 12345",
]
CHAT = (
    "{% for message in messages %}<{{ message.role }}> {{ message.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>{% endif %}"
)


def byte_tokenizer(**settings: Any) -> PreTrainedTokenizerFast:
    """Byte-level BPE, as GPT-2 has it."""
    backend = Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=["<|endoftext|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(TEXT * 3, trainer)
    ends = {"eos_token": "<|endoftext|>", "bos_token": "<|endoftext|>"}
    return PreTrainedTokenizerFast(tokenizer_object=backend, **ends, **settings)


def save_model(folder: Path, family: str = "gpt2", chat: str | None = None, **sizes: Any) -> Path:
    """A model of this family and its tokenizer. Its weights are large, so that tokens differ."""
    torch.manual_seed(3)
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = chat
    ends = dict.fromkeys(("bos_token_id", "eos_token_id"), tokenizer.eos_token_id)
    ends["pad_token_id"] = None
    given = {**SIZES[family], "vocab_size": len(tokenizer), **ends, **sizes}
    config = AutoConfig.for_model(family, **given)
    model = AutoModelForCausalLM.from_config(config).float()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if parameter.dim() < 2:  # biases, and factors of norms
                parameter.copy_(torch.randn(parameter.shape) * 0.3 + ("norm" in name))
            else:
                parameter.copy_(torch.randn(parameter.shape) * 0.25)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
