"""Let a trained model write: load it, read the prompt, print the text as it comes.

python generate.py artifacts/demo --prompt "The ferry"
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from p2p_llm_forge.config import GenerateConfig, name_first, parse
from p2p_llm_forge.errors import ForgeError, plain, run_script

if TYPE_CHECKING:  # heavy libraries are imported where they are used: --help answers at once
    from p2p_llm_forge.model.chat import Message
    from p2p_llm_forge.using.loading import LanguageModel


def generate(config: GenerateConfig) -> None:
    """Print what the model makes of the prompt, or of each one that is typed.

    Raises ForgeError where there is no whole model, or a prompt that it cannot read.
    """
    config.problems().raise_any()
    import torch

    from p2p_llm_forge.model.chat import ends_of_answers
    from p2p_llm_forge.training.newest import newest_model
    from p2p_llm_forge.using.loading import load

    name = config.model_name
    if Path(name).is_dir():
        name = str(newest_model(Path(name)))
    if name != config.model_name:
        note(f"the newest model is {name}")
    device = torch.accelerator.current_accelerator(check_available=True) or torch.device("cpu")
    model = load(name, device)
    torch.manual_seed(torch.seed() if config.seed is None else config.seed)
    chats = is_conversation(config, Path(name), model)
    speak = answer if chats else continue_text
    if chats:
        model = replace(model, ends=ends_of_answers(model.tokenizer, model.ends))
    messages: list[Message] = []
    for prompt in prompts(config):
        try:
            speak(model, prompt, config, messages)
        except (KeyboardInterrupt, ForgeError) as error:
            if not config.interactive:
                raise
            note(f"\n{error}")  # ends this text, not the conversation


def is_conversation(config: GenerateConfig, folder: Path, model: LanguageModel) -> bool:
    """Whether prompts are what a user says, and not texts to continue. Raises ForgeError."""
    from p2p_llm_forge.training.newest import was_trained_to_chat

    has_template = bool(model.tokenizer.chat_template)
    if config.chat == "on" and not has_template:
        raise ForgeError(
            f"--chat: the tokenizer of {model.name} has no chat template",
            "leave --chat out: then the model continues the prompt",
        )
    trained = was_trained_to_chat(folder) if config.chat == "auto" else None
    is_asked = trained is not False if config.chat == "auto" else config.chat == "on"
    return has_template and is_asked


def prompts(config: GenerateConfig) -> Iterator[str | None]:
    """The prompt of the command line, then, if it is asked for, each line that is typed."""
    if config.prompt is not None or not config.interactive:
        yield config.prompt
    sign = "> " if sys.stdin.isatty() else ""
    while config.interactive:
        try:
            # What is no UTF-8 came in as surrogates, which no tokenizer takes.
            yield input(sign).encode("utf-8", "surrogateescape").decode("utf-8", "replace")
        except EOFError:
            break


def continue_text(
    model: LanguageModel, prompt: str | None, config: GenerateConfig, _: list[Message]
) -> None:
    """Print the prompt and how the model goes on from there."""
    from p2p_llm_forge.using.prompts import note_of_window, tokens_of_text
    from p2p_llm_forge.using.writing import write

    tokens = tokens_of_text(model, prompt or "")
    if long := note_of_window(len(tokens), config.max_new_tokens, model.context):
        note(long)
    show(prompt or "")
    write(model, tokens, config, show)
    show("\n")


def answer(
    model: LanguageModel, prompt: str | None, config: GenerateConfig, messages: list[Message]
) -> None:
    """Print the model's answer in a conversation, to which question and answer are added."""
    from p2p_llm_forge.model.chat import STORY
    from p2p_llm_forge.using.prompts import tokens_of_chat
    from p2p_llm_forge.using.writing import write

    asked = [*messages, {"role": "user", "content": prompt or STORY}]
    tokens = tokens_of_chat(model, asked)
    if forgotten := len(messages) + 1 - len(asked):
        note(f"the conversation is too long: its first {forgotten} messages are left out")
    new = write(model, tokens, config, show)
    show("\n")
    text = model.tokenizer.decode(new, skip_special_tokens=True)
    messages[:] = [*asked, {"role": "assistant", "content": text}]


def show(text: str) -> None:
    """Print a piece of what a model has written, which no terminal takes for commands."""
    print(plain(text, len(text)), end="", flush=True)


def note(text: str) -> None:
    """Print a line that is no part of the text."""
    print(text, file=sys.stderr, flush=True)


def main() -> int:
    """The command line."""
    generate(parse(GenerateConfig, name_first(sys.argv[1:]), "generate.py"))
    return 0


if __name__ == "__main__":
    run_script(main)
