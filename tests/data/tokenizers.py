"""Tokenizers for tests, and documents to train them on."""

from __future__ import annotations

import random

import numpy as np
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

WORDS = [
    "peer",
    "block",
    "Gewicht",
    "öğrenme",
    "模型",
    "👩🏽‍🚀",
    "don't",
    "3.14",
    "==",
    "  ",
    "\r\n",
    "\t",
]


def some_documents(count: int = 300, seed: int = 1) -> list[str]:
    chosen = random.Random(seed)
    return [
        " ".join(chosen.choices(WORDS, k=chosen.randint(1, 60))) + chr(chosen.randint(0x21, 0xD7FF))
        for _ in range(count)
    ]


def per_document(tokens, lengths) -> list[list[int]]:
    return [part.tolist() for part in np.split(tokens, np.cumsum(lengths))[:-1]]


def word_tokenizer() -> PreTrainedTokenizerFast:
    """Unknown to gigatoken, with a normalizer, and with its end of text among the words."""
    backend = Tokenizer(models.WordLevel(unk_token="<unk>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    trainer = trainers.WordLevelTrainer(special_tokens=["<unk>", "</s>"], show_progress=False)
    backend.train_from_iterator(["the quick brown fox", "jumps over </s> the lazy dog"], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>", unk_token="<unk>")
