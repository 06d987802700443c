"""What gigatoken 0.10 passes over in silence: tokenizers that use it are encoded without gigatoken.

Source: its src/load_tokenizer/hf.rs, of which the settings here are those that it neither reads nor
refuses; and added tokens with lstrip or rstrip, of which it takes the white space otherwise when
that is an added token too, or part of one: seldom enough to pass every sample. What it refuses by
itself is not here.
"""

from __future__ import annotations

import json
from typing import Any

from p2p_llm_forge.data.tokenizer import settings_of


class FastPathDiffers(Exception):
    """The fast encoder gives other tokens than the tokenizer itself, or does not support it."""


def require_all_read(rules: str) -> None:
    """Raise FastPathDiffers for a setting that gigatoken is known not to read."""
    settings = settings_of(rules)
    model, pre_tokenizer = settings["model"], settings["pre_tokenizer"]
    unread = [
        f"its model's {name} {model[name]!r}"
        for name in ("dropout", "continuing_subword_prefix", "end_of_word_suffix")
        if model.get(name)
    ]
    unread += [
        f"{name} of the added token {token['content']!r}"
        for token in settings["added_tokens"]
        for name in ("single_word", "lstrip", "rstrip")
        if token[name]
    ]
    is_byte_level = model["type"] == "BPE" and not model.get("byte_fallback")
    if is_byte_level and not _divides_by_regex(pre_tokenizer):
        unread.append(f"a part of its pre-tokenizer ({json.dumps(pre_tokenizer)[:200]})")
    if unread:
        raise FastPathDiffers(f"gigatoken would pass over {unread[0]}")


def _divides_by_regex(pre_tokenizer: Any) -> bool:
    """Whether it is ByteLevel with its own regex, or regexes that divide the text and ByteLevel.

    gigatoken takes the regexes that it finds, or that of GPT-2, and passes over the rest.
    """
    parts = [pre_tokenizer]
    if pre_tokenizer and pre_tokenizer["type"] == "Sequence":
        parts = pre_tokenizer["pretokenizers"]
    *splits, last = parts or [None]
    if not last or last["type"] != "ByteLevel" or last["use_regex"] == bool(splits):
        return False
    divides = (("Isolated", False), ("Removed", True))
    return not (splits and last["add_prefix_space"]) and all(
        part["type"] == "Split" and (part["behavior"], part["invert"]) in divides for part in splits
    )
