"""A row as a conversation: what people's datasets hold, in one form, and what is wrong with a row.

Four forms are read: `messages` (roles and contents), `prompt` and `completion` (texts, or messages
each; TRL's names), `instruction`, `input` (may be missing) and `output` (Alpaca's), and
`conversations` (`from` and `value`; ShareGPT's). A document is a row as JSON without what is null,
in a fixed order of keys, so that the same conversation is the same document in a file of any
format.
"""

from __future__ import annotations

import contextlib
import json
import re
from collections.abc import Iterable, Iterator
from typing import Any

from p2p_llm_forge.data.columns import NoTextError, found_names
from p2p_llm_forge.data.input_file import InputFile
from p2p_llm_forge.data.parts import ReadOptions

ROLES = ("system", "developer", "user", "assistant", "tool")
ASSISTANT = "assistant"
OTHER_ROLES = {"human": "user", "gpt": ASSISTANT, "bot": ASSISTANT, "model": ASSISTANT}
MESSAGES, PAIR, ALPACA = ("messages",), ("prompt", "completion"), ("instruction", "output")
SHARED = ("conversations",)
FORMS = (MESSAGES, PAIR, ALPACA, SHARED)
TOOLS = "tools"  # that an assistant may call: a list of JSON schemas, or its JSON
KEYWORDS = "chat_template_kwargs"  # what a template is to know besides, by name: TRL's column
RESERVED = {"conversations", "messages", TOOLS, "documents", "chat_template"}
RESERVED |= {"return_assistant_tokens_mask", "continue_final_message", "add_generation_prompt"}
COLUMNS = (*MESSAGES, *PAIR, "instruction", "input", "output", *SHARED, TOOLS, KEYWORDS)
IN_WORDS = "'messages', 'prompt' and 'completion', 'instruction' and 'output', or 'conversations'"
CALLS = ("tool_calls", "function_call")
HAS_WORDS = (*CALLS, "reasoning_content", "thinking")  # beside a content


def form_of(names: Iterable[str]) -> tuple[str, ...] | None:
    """The first form whose columns are all among these; None: no conversation."""
    there = set(names)
    return next((form for form in FORMS if there.issuperset(form)), None)


def messages_column(options: ReadOptions) -> str:
    """What the column of messages is called."""
    return "messages" if options.text_column == ReadOptions.text_column else options.text_column


def column_names(options: ReadOptions) -> list[str]:
    """The columns that rows of conversations may have."""
    return list(dict.fromkeys([messages_column(options), *COLUMNS]))


def document_in(row: Any, where: str, file: InputFile) -> list[bytes]:
    """The document of a row of a file, none where it is bad. where: the row, for messages."""
    options = file.options
    assert options.train_on
    try:
        return [document_of(row, messages_column(options), options.train_on)]
    except NoTextError as error:
        file.skip(where + error.found, error.fix)
        return []


def document_of(row: Any, messages_column: str, train_on: str) -> bytes:
    """A row as a document. Raises NoTextError, whose text follows the row's place.

    messages_column: what is called `messages`; train_on: `assistant` asks for one to learn from.
    """
    if not isinstance(row, dict):
        raise NoTextError(f" holds a {type(row).__name__} where an object is expected")
    row = _without_nulls(row)
    if messages_column in row and messages_column not in COLUMNS:
        others = {name: row[name] for name in (TOOLS, KEYWORDS) if name in row}
        row = {"messages": row[messages_column], **others}
    form = form_of(row)
    if form is None:
        found = found_names(map(str, row))
        raise NoTextError(f" holds no conversation ({IN_WORDS}): found {found}")
    of_form = {MESSAGES: _of_messages, PAIR: _of_pair, ALPACA: _of_alpaca, SHARED: _of_shared}[form]
    content = of_form(row, train_on)
    if tools := row.get(TOOLS):
        content[TOOLS] = _tools(tools)
    if known := row.get(KEYWORDS):
        if not isinstance(known, dict) or RESERVED & known.keys():
            raise NoTextError(f": '{KEYWORDS}' is no object of a template's own names")
        content[KEYWORDS] = known
    text = json.dumps(content, ensure_ascii=False, separators=(",", ":"))
    return re.sub("[\ud800-\udfff]", "\ufffd", text).encode()


def in_words_of(train_on: str) -> str:
    """What is trained, for people."""
    return "what the assistant says" if train_on == ASSISTANT else "everything"


def texts_of(document: bytes) -> str:
    """What is said in a document, for a tokenizer to be trained on."""
    content = json.loads(document)
    said = content.get("messages") or [content.get("prompt"), content.get("completion")]
    return "\n\n".join(text for text in _strings(said) if text not in ROLES)


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for inside in value.values() if isinstance(value, dict) else value:
            yield from _strings(inside)


def _without_nulls(value: Any) -> Any:
    """Tables have null for the keys that a row has not."""
    if isinstance(value, dict):
        return {key: _without_nulls(one) for key, one in value.items() if one is not None}
    return [_without_nulls(one) for one in value] if isinstance(value, list) else value


def _tools(tools: Any) -> list[Any]:
    if isinstance(tools, str):
        try:
            tools = json.loads(tools)
        except ValueError as error:
            raise NoTextError(f": 'tools' is not JSON: {error}") from None
    if not (isinstance(tools, list) and all(isinstance(tool, dict) for tool in tools)):
        raise NoTextError(": 'tools' is no list of objects")
    return tools


# --- the three forms ------------------------------------------------------------------------------


def _of_messages(row: dict[str, Any], train_on: str) -> dict[str, Any]:
    messages = _checked(row["messages"], "messages")
    _require_one_system(messages, "messages")
    if train_on == ASSISTANT and not any(one["role"] == ASSISTANT for one in messages):
        raise NoTextError(": 'messages' has no turn of the assistant", "add one")
    return {"messages": messages}


def _of_shared(row: dict[str, Any], train_on: str) -> dict[str, Any]:
    return _of_messages({"messages": row["conversations"]}, train_on)


def _of_pair(row: dict[str, Any], train_on: str) -> dict[str, Any]:
    prompt, completion = row["prompt"], row["completion"]
    if isinstance(prompt, str) and isinstance(completion, str):
        if not completion.strip():
            raise NoTextError(": 'completion' is empty", "fill it")
        return {"prompt": prompt, "completion": completion}
    for name in PAIR:
        if isinstance(row[name], str):
            other = PAIR[name == "prompt"]
            found = f": '{name}' is a text and '{other}' is {type(row[other]).__name__}"
            raise NoTextError(found, "give texts for both, or lists of messages")
    before, after = _checked(prompt, "prompt"), _checked(completion, "completion")
    _require_one_system([*before, *after], "prompt' and 'completion")
    if not any(one["role"] == ASSISTANT for one in after):
        raise NoTextError(": 'completion' has no turn of the assistant", "add one")
    return {"prompt": before, "completion": after}


def _of_alpaca(row: dict[str, Any], train_on: str) -> dict[str, Any]:
    asked = [row["instruction"], row.get("input", "")]
    for name in ("instruction", "input", "output"):
        if not isinstance(value := row.get(name, ""), str):
            raise NoTextError(f": '{name}' is {type(value).__name__}, expected a text")
    for name in ALPACA:
        if not row[name].strip():
            raise NoTextError(f": '{name}' is empty", "fill it")
    question = "\n\n".join(text for text in asked if text.strip())
    turns = [("user", question), (ASSISTANT, row["output"])]
    return {"messages": [{"role": role, "content": content} for role, content in turns]}


def _checked(messages: Any, name: str) -> list[dict[str, Any]]:
    """Messages of known roles with something in each. Raises NoTextError."""
    if isinstance(messages, str):  # a CSV file has no lists
        with contextlib.suppress(ValueError):
            messages = json.loads(messages)
    if not isinstance(messages, list) or not messages:
        what = "an empty list" if messages == [] else type(messages).__name__
        raise NoTextError(f": '{name}' is {what}, expected a list of messages (role, content)")
    return [_message(one, f"{name}[{place}]") for place, one in enumerate(messages)]


def _message(message: Any, where: str) -> dict[str, Any]:
    if isinstance(message, dict) and {"from", "value"} <= message.keys():
        role, content = message["from"], message["value"]
        others = {key: one for key, one in message.items() if key not in ("from", "value")}
        role = OTHER_ROLES.get(role, role) if isinstance(role, str) else role
        message = {"role": role, "content": content, **others}
    if not isinstance(message, dict) or "role" not in message:
        has = found_names(map(str, message)) if isinstance(message, dict) else repr(message)[:60]
        found = f": {where} is no message with 'role' and 'content': found {has}"
        raise NoTextError(found, "call them so")
    role = message["role"]
    if role not in ROLES:
        fix = f"call it '{OTHER_ROLES[role]}'" if role in [*OTHER_ROLES] else "call it one of these"
        raise NoTextError(f": {where} has the unknown role {role!r}, not {', '.join(ROLES)}", fix)
    content = _content(message.get("content", ""), where)
    if not content.strip() and role == ASSISTANT and not any(map(message.get, HAS_WORDS)):
        raise NoTextError(f": {where} is an empty turn of the assistant", "fill it")
    others = {key: one for key, one in message.items() if key not in ("role", "content")}
    return {"role": role, "content": content, **others}


def _content(content: Any, where: str) -> str:
    """A text, or the texts of the parts of which it is made."""
    parts = content if isinstance(content, list) else [{"type": "text", "text": content}]
    found = [part.get("text") if isinstance(part, dict) else None for part in parts]
    texts = [text for text in found if isinstance(text, str)]
    if len(texts) < len(parts):
        kind = "a list of parts that are not all text" if parts is content else type(content)
        kind = kind if isinstance(kind, str) else kind.__name__
        raise NoTextError(f": the content of {where} is {kind}, expected a text")
    return "".join(texts)


def _require_one_system(messages: list[dict[str, Any]], name: str) -> None:
    count = sum(one["role"] == "system" for one in messages)
    if count > 1:
        raise NoTextError(f": '{name}' has {count} system messages", "join them to one, at first")
