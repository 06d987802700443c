"""Conversations as tokens, each marked whether it is trained."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.chat_template import MARK_IT, ChatTemplate, NotRenderedError, Span
from p2p_llm_forge.data.conversations import ASSISTANT, KEYWORDS, TOOLS
from p2p_llm_forge.data.tokenizer import control_tokens, is_slow, panics_as_errors, rules_of
from p2p_llm_forge.errors import ForgeError, quoted

IS_TRAINED = np.uint32(1 << 31)  # beside a token, in the pieces; no vocabulary comes near it
PIECES_DTYPE = "uint32"
AT_A_TIME = 500  # conversations that the tokenizer is asked for


class Rendered(NamedTuple):
    """A conversation as text. said: the characters to train, None where the prompt decides.

    prompt: of a completion; has_ends: what the tokenizer puts around a text is to be there.
    """

    text: str
    said: list[Span] | None = None
    prompt: str | None = None
    has_ends: bool = False


class ConversationEncoder:
    """Encodes documents of conversations as transformers does what its templates give. Any thread.

    train_on: `assistant` or `all`; skips_bad: what cannot be encoded is no error. give_up: asked
    between conversations, whether to.
    """

    def __init__(
        self,
        tokenizer: Any,
        template: ChatTemplate,
        train_on: str,
        skips_bad: bool = False,
        gives_up: Callable[[], bool] = lambda: False,
    ) -> None:
        if is_slow(tokenizer):
            raise ForgeError(
                "the tokenizer is written in Python, and does not know where in a text its tokens"
                " are, so what the assistant says could not be marked",
                "use a --tokenizer with a tokenizer.json",
            )
        self._tokenizer, self._template = tokenizer, template
        self._all = train_on != ASSISTANT
        self._skips_bad, self._gives_up = skips_bad, gives_up
        self._control = control_tokens(tokenizer)
        self._spelled = re.compile("|".join(map(re.escape, sorted(self._control, reverse=True))))
        self._numbers = np.array(sorted(self._control.values()))

    @cached_property
    def _backends(self) -> tuple[Any, Any]:
        """The tokenizer for rendered conversations, and for plain texts, to which it adds ends."""
        from tokenizers import Tokenizer

        rules = rules_of(self._tokenizer)
        bare, whole = Tokenizer.from_str(rules), Tokenizer.from_str(rules)
        bare.post_processor = None  # it would move places: white space at ends is trimmed
        return bare, whole

    def encode(self, documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Tokens (uint32, IS_TRAINED beside those), their number and the bytes of trained text of
        each conversation (int64); a number of -1 is that of a bad one, which has no tokens.

        The first token of a conversation is never trained: nothing of its own precedes it. Control
        tokens stand for no bytes. Raises ForgeError for a bad one unless such are skipped.
        """
        tokens, lengths, sizes = [np.empty(0, np.uint32)], [], []
        for start in range(0, len(documents), AT_A_TIME):
            if self._gives_up():
                raise ForgeError("the work was given up", "run the same command again")
            found = [self._rendered_or_none(one.as_py()) for one in documents[start:][:AT_A_TIME]]
            good = iter(self._marked([one for one in found if one is not None]))
            for one in found:
                marked = next(good) if one is not None else None
                if marked is None:
                    lengths.append(-1)
                    sizes.append(0)
                    continue
                tokens.append(marked[0])
                lengths.append(len(marked[0]))
                sizes.append(marked[1])
        return np.concatenate(tokens), np.array(lengths, np.int64), np.array(sizes, np.int64)

    def _rendered_or_none(self, document: bytes) -> Rendered | None:
        content = json.loads(document)
        try:
            return self._rendered(content)
        except NotRenderedError as error:
            self._refuse(f"{self._template.origin}: {error}", error.fix, content)
            return None

    def _rendered(self, content: dict[str, Any]) -> Rendered:
        eos = self._tokenizer.eos_token
        others = {**content.get(KEYWORDS, {}), TOOLS: content.get(TOOLS)}
        if isinstance(content.get("prompt"), str):
            prompt, completion = content["prompt"], content["completion"].removesuffix(eos)
            self._require_no_control([prompt, completion])
            return Rendered(prompt + completion + eos, None, prompt, has_ends=True)
        self._require_no_control(content)
        if "prompt" in content:
            whole = content["prompt"] + content["completion"]
            text, _ = self._template.rendered(whole, others)
            self._template.require_calls(text, whole, others)
            prompt, _ = self._template.rendered(content["prompt"], others, is_prompt=True)
            return Rendered(text, None, prompt)
        messages = content["messages"]
        if self._all:
            text, _ = self._template.rendered(messages, others)
            said = [(0, len(text))]
        else:
            text, said = self._template.said(messages, others)
        self._template.require_calls(text, messages, others)
        return Rendered(text, said)

    def _require_no_control(self, value: Any) -> None:
        """Raise NotRenderedError for what would end a turn, or begin one, where somebody says it.

        A template's own control tokens are like these in everything once they are one text.
        """
        if isinstance(value, str):
            if found := self._spelled.search(value):
                raise NotRenderedError(f"a text in it spells the control token {found[0]!r}")
        elif isinstance(value, dict | list):
            for one in value.values() if isinstance(value, dict) else value:
                self._require_no_control(one)

    def _marked(self, found: list[Rendered]) -> list[tuple[np.ndarray, int] | None]:
        """The tokens with marks, and the bytes of trained text, of each; None: it is bad."""
        bare = self._ask([one for one in found if not one.has_ends], has_ends=False)
        whole = self._ask([one for one in found if one.has_ends], has_ends=True)
        return [self._one(one, *next(whole if one.has_ends else bare)) for one in found]

    def _ask(self, found: list[Rendered], has_ends: bool) -> Any:
        """For each its encoding, and the tokens of its prompt."""
        backend = self._backends[has_ends]
        with panics_as_errors():
            texts = backend.encode_batch([one.text for one in found], add_special_tokens=has_ends)
            prompts = backend.encode_batch(
                [one.prompt or "" for one in found], add_special_tokens=has_ends
            )
        return zip(texts, (prompt.ids for prompt in prompts), strict=True)

    def _one(
        self, rendered: Rendered, encoding: Any, prompt: list[int]
    ) -> tuple[np.ndarray, int] | None:
        tokens = np.array(encoding.ids, np.uint32)
        places = np.array(encoding.offsets, np.int64).reshape(-1, 2)
        if self._all:
            trained = np.ones(len(tokens), bool)
        elif rendered.said is None:
            trained = np.arange(len(tokens)) >= _common(prompt, encoding.ids)
        else:
            trained = np.zeros(len(tokens), bool)
            for start, end in rendered.said:
                trained |= (places[:, 0] < end) & (places[:, 1] > start)
        trained[:1] = False
        if not trained.any():
            found = f"{self._template.origin} marks nothing in it to learn from"
            self._refuse(found, MARK_IT, rendered.text)
            return None
        is_text = ~np.isin(tokens, self._numbers)
        size = bytes_of(rendered.text, places, trained, is_text)
        return np.where(trained, tokens | IS_TRAINED, tokens), size

    def _refuse(self, found: str, fix: str, content: Any) -> None:
        """Count a bad conversation by its absence. Raises ForgeError unless such are skipped."""
        if not self._skips_bad:
            text = content if isinstance(content, str) else _beginning(content)
            raise ForgeError(
                f"the conversation that begins {quoted(text, 60)} cannot be encoded ({found})",
                f"{fix}, or use --skip-bad-rows to leave such out and count them",
            )


def _beginning(content: dict[str, Any]) -> str:
    said = content.get("messages") or content["prompt"]
    return said if isinstance(said, str) else str(said[0].get("content", ""))


def _common(first: list[int], second: list[int]) -> int:
    """How many tokens two lists begin with in common."""
    pairs = zip(first, second, strict=False)
    different = (place for place, (a, b) in enumerate(pairs) if a != b)
    return next(different, min(len(first), len(second)))


def bytes_of(text: str, places: np.ndarray, trained: np.ndarray, is_text: np.ndarray) -> int:
    """UTF-8 bytes of the text of trained tokens, each counted once.

    places: characters from and up to (tokens x 2). Between two trained tokens is text of theirs,
    too: places leave out white space that a token begins with, in some tokenizers.
    """
    counted = np.zeros(len(text) + 1, np.int8)
    edges = np.flatnonzero(np.diff(np.concatenate([[False], trained, [False]]).astype(np.int8)))
    for first, end in edges.reshape(-1, 2):
        counted[places[first, 0] : places[end - 1, 1]] = 1
    for start, end in places[trained & ~is_text]:
        counted[start:end] = 0
    if text.isascii():
        return int(counted.sum())
    letters = np.frombuffer(text.encode("utf-32-le"), np.uint32)
    sizes = 1 + (letters > 0x7F).astype(int) + (letters > 0x7FF) + (letters > 0xFFFF)
    return int(sizes[counted[: len(text)] == 1].sum())
