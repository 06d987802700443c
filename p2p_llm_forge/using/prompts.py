"""From a prompt to the tokens that a model reads, however long it is."""

from __future__ import annotations

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.chat import Message, tokens_of_conversation
from p2p_llm_forge.using.loading import LanguageModel


def tokens_of_text(model: LanguageModel, prompt: str) -> list[int]:
    """The prompt's tokens, as the tokenizer begins a text; without a prompt, a document's start.

    Raises ForgeError where the tokenizer knows no token to begin with.
    """
    tokens: list[int] = model.tokenizer(prompt)["input_ids"] if prompt else []
    if tokens:
        return tokens
    starts = [model.tokenizer.bos_token_id, *model.ends]
    start = next((token for token in starts if token is not None), None)
    if start is None:
        raise ForgeError(f"{model.name} names no token that begins a text", "give a --prompt")
    return [start]


def window(tokens: list[int], context: int | None) -> list[int]:
    """The end of a text, where the model cannot read it all and write one more token.

    Half of what it can read: so that it need not begin again after every token.
    """
    if context is None or len(tokens) < context:
        return tokens
    return tokens[-max(1, context // 2) :]


def note_of_window(prompt: int, new: int, context: int | None) -> str | None:
    """What to say where prompt and text (in tokens) together are longer than the context."""
    if context is None or prompt + new <= context:
        return None
    if prompt < context:
        return f"after {context} tokens the model no longer sees the beginning of the text"
    read = max(1, context // 2)
    return (
        f"the prompt has {prompt} tokens, the model reads at most {context}: it continues the last"
        f" {read} and does not see the first {prompt - read}"
    )


def tokens_of_chat(model: LanguageModel, messages: list[Message]) -> list[int]:
    """The tokens of a conversation; removes its oldest messages while it is too long to answer.

    Raises ForgeError where the last message alone is, or the template does not take it.
    """
    while True:
        tokens = tokens_of_conversation(model.tokenizer, messages, model.name)
        if model.context is None or len(tokens) < model.context:
            return tokens
        if len(messages) == 1:
            raise ForgeError(
                f"the prompt has {len(tokens)} tokens with the chat template, {model.name} reads"
                f" and writes at most {model.context}",
                "shorten the prompt, or give --no-chat to continue the end of it",
            )
        del messages[:2]  # a question and its answer
