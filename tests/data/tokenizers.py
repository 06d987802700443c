"""Tokenizers for tests, and documents to train them on."""

from __future__ import annotations

import random

import numpy as np
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
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


def byte_tokenizer(
    normalizer=None, pre_tokenizer=None, added: tuple[AddedToken, ...] = (), **model
) -> PreTrainedTokenizerFast:
    """A byte-level BPE tokenizer, made without this project."""
    backend = Tokenizer(models.BPE(**model))
    if normalizer:
        backend.normalizer = normalizer
    backend.pre_tokenizer = pre_tokenizer or pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=500,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(some_documents(), trainer)
    backend.add_tokens(list(added))
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|end|>")


def expected(tokenizer: PreTrainedTokenizerFast, texts: list[str]) -> list[list[int]]:
    """What the tokenizers library gives for texts in which control tokens are plain text."""
    backend = Tokenizer.from_str(tokenizer.backend_tokenizer.to_str())
    backend.encode_special_tokens = True
    return [one.ids for one in backend.encode_batch(texts, add_special_tokens=False)]
