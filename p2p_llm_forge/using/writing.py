"""A model writes: token by token, shown as soon as they make whole characters."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from transformers.generation import BaseStreamer

from p2p_llm_forge.config.generate import GenerateConfig
from p2p_llm_forge.using.loading import LanguageModel
from p2p_llm_forge.using.prompts import window

REPLACEMENT = "\ufffd"  # what bytes that are no whole character decode to
OVERLAP = 8  # tokens that are decoded again: how a token is spelled may depend on those before


class TextStream(BaseStreamer):
    """Shows the text of tokens while they are drawn. `generate` of transformers calls it."""

    def __init__(self, tokenizer: Any, tokens: list[int], show: Callable[[str], object]) -> None:
        self._tokenizer, self._show = tokenizer, show
        self.tokens = list(tokens)
        self._shown = len(tokens)  # so many of them
        self._is_prompt = True

    def put(self, value: torch.Tensor) -> None:
        """Take what was drawn; the first call brings the prompt, which is shown already."""
        if not self._is_prompt:
            self.tokens += value.flatten().tolist()
            self._show_whole()
        self._is_prompt = False

    def end(self) -> None:
        """A window is full: the next one begins with a prompt again."""
        self._is_prompt = True

    def finish(self) -> None:
        """Show what has not become a whole character."""
        self._show_whole(is_last=True)

    def _show_whole(self, is_last: bool = False) -> None:
        first = max(0, self._shown - OVERLAP)
        before, now = (self._text(first, end) for end in (self._shown, len(self.tokens)))
        if is_last or not now.endswith(REPLACEMENT):
            self._show(now[len(before) :])
            self._shown = len(self.tokens)

    def _text(self, first: int, end: int) -> str:
        return str(self._tokenizer.decode(self.tokens[first:end], skip_special_tokens=True))


def write(
    model: LanguageModel, tokens: list[int], config: GenerateConfig, show: Callable[[str], object]
) -> list[int]:
    """Continue `tokens` and show each piece of text as it comes. Returns the new tokens.

    Where the text becomes longer than the model can read, it goes on from the end of it.
    """
    stream = TextStream(model.tokenizer, tokens, show)
    end = len(tokens) + config.max_new_tokens
    while len(stream.tokens) < end:
        seen = window(stream.tokens, model.context)
        room = end - len(stream.tokens)
        if model.context is not None:
            room = min(room, max(1, model.context - len(seen)))
        inputs = torch.tensor([seen], device=model.lm.device)
        model.lm.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            streamer=stream,
            max_new_tokens=room,
            use_cache=True,
            num_beams=1,
            eos_token_id=model.ends or None,
            pad_token_id=model.ends[0] if model.ends else 0,
            **sampling(config),
        )
        if stream.tokens[-1] in model.ends:
            break
    stream.finish()
    return stream.tokens[len(tokens) :]


def sampling(config: GenerateConfig) -> dict[str, Any]:
    """How the next token is chosen, as `generate` of transformers is asked for it."""
    if config.temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    chosen = {"temperature": config.temperature, "top_k": config.top_k, "top_p": config.top_p}
    return {"do_sample": True, **chosen}
