"""A conversation as text by a chat template (Jinja, as transformers renders it), and which of its
characters the assistant says."""

from __future__ import annotations

import hashlib
import re
import threading
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

from p2p_llm_forge.data.conversations import ASSISTANT, CALLS, HAS_WORDS
from p2p_llm_forge.data.input_file import first_line
from p2p_llm_forge.data.tokenizer import control_tokens
from p2p_llm_forge.errors import ForgeError

Span = tuple[int, int]  # characters from, up to
Messages = list[dict[str, Any]]
NOTHING: Mapping[str, Any] = MappingProxyType({})

# For a tokenizer that has none: plain text, no new tokens; EOS ends what the assistant says.
PLAIN = (
    "{%- for message in messages -%}"
    "{{- '### ' + message['role'] | capitalize + ':\\n' + message['content'] | trim -}}"
    "{%- if message['role'] == 'assistant' -%}{{- eos_token -}}{%- endif -%}"
    "{{- '\\n\\n' -}}"
    "{%- endfor -%}"
    "{%- if add_generation_prompt -%}{{- '### Assistant:\\n' -}}{%- endif -%}"
)
TRIED = [{"role": "user", "content": "a"}, {"role": ASSISTANT, "content": "b"}]
MARK_IT = (
    "give --chat-template FILE, a copy of the template with {% generation %} before and"
    " {% endgeneration %} after what the assistant says (TRL has such for many models), or"
    " --train-on all"
)


class NotRenderedError(Exception):
    """A conversation of which the template makes no text, or shows not what the assistant says."""

    def __init__(self, found: str, fix: str = "correct it") -> None:
        super().__init__(found)
        self.fix = fix


@dataclass(frozen=True)
class ChatTemplate:
    """A chat template with the special tokens that it may write.

    origin: where it came from, for messages; control: all control tokens, by which turns may end.
    """

    text: str
    origin: str
    tokens: dict[str, Any]
    control: tuple[str, ...] = ()
    # transformers 5.23 keeps one compiled template, whose marks two threads must not make at once.
    lock: threading.Lock = field(default_factory=threading.Lock, compare=False, repr=False)

    @classmethod
    def of(cls, tokenizer: Any, path: str | None) -> ChatTemplate:
        """That of a file, else the tokenizer's own, else the plain one. Raises ForgeError."""
        text, origin = text_of(tokenizer, path)
        control = tuple(sorted(control_tokens(tokenizer), key=len, reverse=True))
        template = cls(text, origin, dict(tokenizer.special_tokens_map), control)
        template._try(is_file=bool(path))
        return template

    @property
    def says_where(self) -> bool:
        """Whether it marks by itself what the assistant says."""
        return re.search(r"{%-?\s*generation\s*-?%}", self.text) is not None

    @property
    def depends_on_the_day(self) -> bool:
        return "strftime_now" in self.text

    def rendered(
        self, messages: Messages, others: Mapping[str, Any] = NOTHING, is_prompt: bool = False
    ) -> tuple[str, list[Span]]:
        """The text, and what it marks. is_prompt: the assistant's turn is next.

        others: `tools` and what else a row gives the template. Raises NotRenderedError.
        """
        from transformers.utils.chat_template_utils import render_jinja_template

        try:
            with self.lock:
                found: Any = render_jinja_template(
                    [messages],
                    chat_template=self.text,
                    return_assistant_tokens_mask=self.says_where,
                    add_generation_prompt=is_prompt,
                    **{**self.tokens, **others},
                )
        except Exception as error:  # jinja2's own, and what a template's expressions raise
            raise NotRenderedError(f"{type(error).__name__}: {first_line(error)}") from error
        texts, marks = found
        return texts[0], [tuple(span) for span in marks[0]] if marks else []

    def said(
        self, messages: Messages, others: Mapping[str, Any] = NOTHING
    ) -> tuple[str, list[Span]]:
        """The text of a conversation, and what the assistant says in it.

        Where the template does not mark that, it is what comes between the prompt for the turn and
        the end of the turn, each rendered by itself. Raises NotRenderedError.
        """
        text, spans = self.rendered(messages, others)
        if self.says_where:
            return text, spans
        for place, message in enumerate(messages):
            if message["role"] == ASSISTANT:
                before, _ = self.rendered(messages[:place], others, is_prompt=True)
                is_last = place == len(messages) - 1
                until = text if is_last else self.rendered(messages[: place + 1], others)[0]
                end = len(until)
                if not text.startswith(until):
                    end = self._end_of_turn(text, len(before), message["content"])
                if not text.startswith(before) or end < len(before):
                    found = f"it writes turn {place + 1} otherwise when others follow"
                    if not text.startswith(before):
                        found = f"what it writes to ask for turn {place + 1} is not what stands"
                        found = f"{found} before that turn"
                    found = f"{found}, so what the assistant says is not known"
                    raise NotRenderedError(found, MARK_IT)
                spans.append((len(before), end))
        return text, spans

    def require_calls(self, text: str, messages: Messages, others: Mapping[str, Any]) -> None:
        """Raise NotRenderedError where nothing of the tools that turns call, or of what stands in
        place of a content, is in the text: a model would learn to answer nothing."""
        without = [
            {k: one for k, one in m.items() if k not in (CALLS if m.get("content") else HAS_WORDS)}
            for m in messages
        ]
        if without == messages:
            return
        try:
            other, _ = self.rendered(without, others)
        except NotRenderedError:  # it asks for them
            return
        if other == text:
            names = {name for m in messages for name in m if name in HAS_WORDS}
            raise NotRenderedError(
                f"it writes nothing of {' and '.join(sorted(names))}",
                "give --chat-template FILE, one that does",
            )

    @property
    def ends_answers(self) -> bool:
        """Whether a model learns where an answer ends: by a control token at its end."""
        try:
            text, spans = self.said(TRIED)
        except NotRenderedError:  # rows that are like this are refused with the reason
            return True
        return not spans or text[slice(*spans[-1])].rstrip().endswith(self.control)

    def _end_of_turn(self, text: str, start: int, content: str) -> int:
        """Where a turn ends that the template writes otherwise when it is the last; -1: unknown.

        Its content stands there, then perhaps a token and a line's end (Qwen 3 leaves out the
        thoughts of turns before the last).
        """
        content = content.rpartition("</think>")[2].strip()
        if not content or not text.startswith(content, start):
            return -1
        end = start + len(content)
        for name in self.control:
            if text.startswith(name, end):
                end += len(name)
                return end + text.startswith("\n", end)
        return -1

    def _try(self, is_file: bool) -> None:
        """Raise ForgeError for a template that fails on any conversation."""
        try:
            text, _ = self.rendered(TRIED)
        except NotRenderedError as error:
            other = "correct it" if is_file else "give another by --chat-template FILE"
            raise ForgeError(f"{self.origin} fails: {error}", other) from error
        if not text.strip():
            raise ForgeError(
                f"{self.origin} makes no text of a conversation",
                "give a template that writes `messages`, by --chat-template FILE",
            )


def text_of(tokenizer: Any, path: str | None) -> tuple[str, str]:
    """The template that is used, and where it came from. tokenizer: None where one is trained."""
    if path:
        return _read(path), f"--chat-template {path}"
    if getattr(tokenizer, "chat_template", None):
        try:
            return tokenizer.get_chat_template(), "the tokenizer's chat template"
        except ValueError as error:  # it has several, and none is called `default`
            raise ForgeError(
                f"the tokenizer has several chat templates: {first_line(error)}",
                "write the one to use into a file, and give it by --chat-template FILE",
            ) from error
    return PLAIN, "the plain chat template ('### User:', '### Assistant:')"


def sha256_of(template: str) -> str:
    """What tells templates apart."""
    return hashlib.sha256(template.encode()).hexdigest()


def _read(path: str) -> str:
    try:
        text = Path(path).read_bytes().decode().removeprefix("\ufeff")
    except (OSError, UnicodeDecodeError) as error:
        reason = getattr(error, "strerror", None) or "it is not UTF-8"
        raise ForgeError(
            f"--chat-template {path} cannot be read: {reason}",
            "give a file that holds a template (Jinja), or leave the flag out",
        ) from error
    if not text.strip():
        raise ForgeError(f"--chat-template {path} is empty", "write the template into it")
    return text
