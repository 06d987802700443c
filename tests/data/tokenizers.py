"""Tokenizers for tests, and documents to train them on."""

from __future__ import annotations

import random
import shutil
from pathlib import Path

import numpy as np
import sentencepiece
from tokenizers import (
    AddedToken,
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    trainers,
)
from transformers import GPTSw3Tokenizer, PreTrainedTokenizerFast

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


def sentencepiece_tokenizer(folder: Path) -> GPTSw3Tokenizer:
    """One that is written in Python, whose pieces hold its end of text; folder: for `sp.model`."""
    letters = "<|/>s abcdehilotxpn[]SEPUNKworldfm"
    (folder / "text").write_text("\n".join(["hello world", " ".join(letters)] * 50))
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text"), model_prefix=str(folder / "sp"), vocab_size=50,
        hard_vocab_limit=False, user_defined_symbols=["<|end|>"], minloglevel=2,
    )  # fmt: skip
    return GPTSw3Tokenizer(str(folder / "sp.model"), eos_token="<|end|>", pad_token="<s>")


def word_by_word(folder: Path, more_code: str = "") -> None:
    """Write a tokenizer that brings its own code, of whole words: `</s>` is among them."""
    folder.mkdir()
    code = Path(__file__).with_name("word_by_word_tokenizer.py")
    shutil.copy(code, folder)
    with (folder / code.name).open("a") as file:
        file.write(more_code)
    (folder / "tokenizer_config.json").write_text(
        '{"auto_map": {"AutoTokenizer": ["word_by_word_tokenizer.WordByWord", null]}, '
        '"tokenizer_class": "WordByWord", "eos_token": "</s>", "unk_token": "<unk>"}'
    )
    (folder / "words.json").write_text('["<unk>", "</s>", "hello", "world"]')
