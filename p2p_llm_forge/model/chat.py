"""A conversation by the chat template of a tokenizer: what is read, and what ends an answer."""

from __future__ import annotations

from typing import Any

from p2p_llm_forge.errors import ForgeError

STORY = "Tell me a short story."  # what a chat model is asked where nothing else is

Message = dict[str, str]  # role and content, as chat templates take them


def tokens_of_conversation(tokenizer: Any, messages: list[Message], name: str) -> list[int]:
    """The tokens after which the assistant answers. name: of the model, for an error.

    Raises ForgeError where the template does not take the messages.
    """
    how: dict[str, Any] = {"add_generation_prompt": True, "return_dict": False}
    try:
        tokens: list[int] = tokenizer.apply_chat_template(messages, **how)
    except Exception as error:  # whatever a template raises
        found = f"the chat template of {name} fails: {error}"
        raise ForgeError(found, "give --no-chat") from error
    return tokens


def ends_of_answers(tokenizer: Any, ends: list[int]) -> list[int]:
    """The tokens after which nothing follows, with the one that the template puts after an answer.

    A base model's tokenizer may end documents by one token and turns by another, and only this one
    is seen in conversations (ChatML's <|im_end|>).
    """
    answer = "It does."
    talk = [{"role": "user", "content": STORY}, {"role": "assistant", "content": answer}]
    try:
        text = str(tokenizer.apply_chat_template(talk, tokenize=False))
    except Exception:  # of a template that takes no such talk, nothing is known
        return ends
    _, found, after = text.rpartition(answer)
    tokens = tokenizer(after.lstrip(), add_special_tokens=False)["input_ids"] if found else []
    control = {number for number, one in tokenizer.added_tokens_decoder.items() if one.special}
    return [*ends, *({*tokens[:1]} & control - {*ends})]
