"""Conversations for tests: rows, templates, a tokenizer with one, and what a dataset holds of them.

What a dataset holds is read by `datasets` and numpy alone.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import numpy as np
from transformers import PreTrainedTokenizerFast

from tests.data.tokenizers import byte_tokenizer

WORDS = [
    "peer",
    "block",
    "Gewicht",
    "öğrenme",
    "模型",
    "👩🏽\u200d🚀",
    "don't",
    "3.14",
    "\n",
    "  ",
    "==",
]
# As most models write it, with the marks of transformers around what the assistant says.
MARKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{% if m['role'] == 'assistant' %}{% generation %}{{ m['content'] + '<|im_end|>\n' }}"
    "{% endgeneration %}{% else %}{{ m['content'] + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
UNMARKED = MARKED.replace("{% generation %}", "").replace("{% endgeneration %}", "")


def said(draw: random.Random, most: int = 20) -> str:
    return draw.choice("abcde") + " ".join(draw.choices(WORDS, k=draw.randint(1, most)))


def talk(draw: random.Random, turns: int, most: int = 20) -> list[dict[str, str]]:
    """A conversation, perhaps with a system message."""
    roles = ["system"] * draw.randint(0, 1) + ["user", "assistant"] * turns
    return [{"role": role, "content": said(draw, most)} for role in roles]


def rows(count: int, seed: int = 0, most: int = 20) -> list[dict[str, Any]]:
    """Rows of `messages`."""
    draw = random.Random(seed)
    return [{"messages": talk(draw, draw.randint(1, 4), most)} for _ in range(count)]


def write(path: Path, found: list[dict[str, Any]]) -> Path:
    """Rows as JSON lines."""
    text = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in found)
    path.write_text(text, encoding="utf-8")
    return path


def talking_tokenizer(template: str | None = MARKED) -> PreTrainedTokenizerFast:
    """A byte-level tokenizer with the tokens of ChatML, one for padding, and a template."""
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens(
        {
            "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
            "pad_token": "<|pad|>",
        }
    )
    tokenizer.chat_template = template
    return tokenizer


def saved(tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    tokenizer.save_pretrained(folder)
    return folder


def by_transformers(
    tokenizer: Any, messages: list[dict[str, str]], **how
) -> tuple[list[int], list[int]]:
    """Tokens and marks of a conversation, but for the first token, which no loss can count."""
    found = tokenizer.apply_chat_template(
        messages, return_dict=True, return_assistant_tokens_mask=True, **how
    )
    return found["input_ids"], [0, *found["assistant_masks"][1:]]


def blocks_of(folder: Path, split: str = "train") -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Tokens, which are trained, and where something begins, each (blocks x sequence length)."""
    found = datasets.load_from_disk(str(folder))[split].with_format("numpy")[:]
    tokens = np.array(found["input_ids"])
    length = tokens.shape[1]
    trained, begins = (
        np.unpackbits(np.array(found[name], np.uint8), axis=1, bitorder="little")[
            :, :length
        ].astype(bool)
        for name in ("trained", "begins")
    )
    return tokens, trained, begins


def talks_in(folder: Path, padding: int, split: str = "train") -> list[tuple[list[int], list[int]]]:
    """Tokens and marks of all that lies between two beginnings, but for padding."""
    talks = []
    for tokens, trained, begins in zip(*blocks_of(folder, split), strict=True):
        assert begins[0] and trained.any()
        places = [*np.flatnonzero(begins), len(tokens)]
        for start, end in zip(places, places[1:], strict=False):
            if (tokens[start:end] == padding).all():
                assert end == len(tokens) and not trained[start:end].any()
            else:
                talks.append((tokens[start:end].tolist(), trained[start:end].astype(int).tolist()))
    return talks
