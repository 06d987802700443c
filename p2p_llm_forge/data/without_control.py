"""Text that spells a control token, encoded without that token: one document at a time.

Encoders read such a spelling as text, but a vocabulary may list `</s>` among its ordinary entries,
and a normalizer may make it of other letters. Then the model of the tokenizer is asked once more,
without knowing that entry by its name.
"""

from __future__ import annotations

import functools
import json
import secrets
import threading
from collections.abc import Callable, Iterator
from typing import Any

from p2p_llm_forge.data.input_file import first_line
from p2p_llm_forge.data.tokenizer import (
    END_OF_TEXT,
    NONE,
    ask_python,
    ask_rules,
    control_tokens,
    is_slow,
    load_tokenizer,
    rules_of,
)
from p2p_llm_forge.errors import ForgeError


class PlainTextEncoder:
    """Encodes what the tokenizer itself makes control tokens of, or fails on. For any thread."""

    def __init__(self, tokenizer: Any, loaded_from: dict[str, Any] | None = None) -> None:
        self._tokenizer = tokenizer
        self._loaded_from = loaded_from
        self._control = set(control_tokens(tokenizer).values())

    @functools.cached_property
    def _ask(self) -> Callable[[str], list[int]]:
        """Made when it is needed: a large vocabulary takes a second."""
        make = _of_pieces if is_slow(self._tokenizer) else _of_hidden_entries
        return make(self._tokenizer)

    def encode(self, text: str) -> list[int]:
        """The tokens of a document, no control token among them.

        Raises ForgeError, naming the document, when the tokenizer cannot do that.
        """
        tokens, problem = [], ""
        try:
            tokens = self._ask(text)
        except Exception as error:  # anything: it may be code that came with the tokenizer
            message = first_line(error)
            problem = f"it has {NONE}" if NONE in message else f"{type(error).__name__}: {message}"
        control = self._control.intersection(tokens)
        if control:
            spelling = self._tokenizer.convert_ids_to_tokens(min(control))
            problem = f"it makes its control token {spelling!r} of the text"
        if problem:
            raise ForgeError(
                f"the tokenizer cannot encode the document that begins {text[:40]!r} ({problem})",
                f"{self._another_end(text)}add --skip-bad-rows to leave such documents out and "
                "count them, or use another --tokenizer",
            )
        return tokens

    def _another_end(self, text: str) -> str:
        """The first fix, where it is one: an --eos-token that leaves the text its own entries."""
        if not (self._loaded_from and self._loaded_from.get("eos_token")):
            return ""
        other = {"eos_token": END_OF_TEXT}
        try:
            PlainTextEncoder(load_tokenizer(**self._loaded_from | other)).encode(text)
        except ForgeError:
            return ""
        return f"give another --eos-token, such as {END_OF_TEXT!r}, "


def _of_hidden_entries(tokenizer: Any) -> Callable[[str], list[int]]:
    """Asks a tokenizer that has other names for its control tokens, which no text can know."""
    secret = secrets.token_hex(16)
    names = {text: f"{secret}{n}" for n, text in enumerate(control_tokens(tokenizer))}
    rules = json.loads(rules_of(tokenizer))
    rules["post_processor"] = None  # which may add control tokens by their names
    for token in rules["added_tokens"]:
        token["content"] = names.get(token["content"], token["content"])
    model = rules["model"]
    if isinstance(model["vocab"], dict):
        model["vocab"] = {names.get(text, text): n for text, n in model["vocab"].items()}
    else:
        model["vocab"] = [[names.get(text, text), score] for text, score in model["vocab"]]
    if model.get("unk_token") in names:
        model["unk_token"] = names[model["unk_token"]]
    if "merges" in model:
        prefix = model.get("continuing_subword_prefix") or ""
        model["merges"] = [
            [first, second]
            for first, second in model["merges"]
            if names.keys().isdisjoint((first, second, first + second.removeprefix(prefix)))
        ]
    ask = ask_rules(json.dumps(rules, separators=(",", ":")))
    return lambda text: ask([text])[0]


def _of_pieces(tokenizer: Any) -> Callable[[str], list[int]]:
    """Asks a tokenizer written in Python, and spells what it makes control tokens of."""
    control = set(control_tokens(tokenizer).values())
    ask_it = ask_python(tokenizer)
    lock = threading.Lock()  # its code may not know of threads

    def ask(text: str) -> list[int]:
        spelled: list[int] = []
        with lock:
            for token in ask_it([text])[0]:
                spelled += _spelled(tokenizer, token, control) if token in control else [token]
        return spelled

    return ask


def _spelled(tokenizer: Any, token: int, control: set[int]) -> list[int]:
    """The spelling of a control token by other tokens; the best of the ways that are known."""
    text = tokenizer.convert_ids_to_tokens(token)
    unknown = tokenizer.unk_token_id
    best = [token]
    for tokens in _spellings(tokenizer, text):
        if not tokens or None in tokens or not control.isdisjoint(tokens):
            continue
        if tokenizer.decode(tokens, clean_up_tokenization_spaces=False) == text:
            return tokens
        if best == [token] or best.count(unknown) > tokens.count(unknown):
            best = tokens
    return best


def _spellings(tokenizer: Any, text: str) -> Iterator[list[int]]:
    """Ways to spell a text: letter by letter, as BERT continues a word, in two parts."""
    for pieces in (list(text), [text[0], *(f"##{letter}" for letter in text[1:])]):
        yield list(tokenizer.convert_tokens_to_ids(pieces))
    for cut in range(1, len(text)):
        first, second = ask_python(tokenizer)([text[:cut], text[cut:]])
        yield first + second
    if tokenizer.unk_token_id is not None:
        yield [tokenizer.unk_token_id]
