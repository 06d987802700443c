"""GenerateConfig: all that generate.py can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2p_llm_forge.config.fields import Options, flag, require_between
from p2p_llm_forge.config.other_names import all_of, answer, switch, values
from p2p_llm_forge.errors import Problems

# What the other keys of nanoGPT's sample.py mean.
OF_SAMPLE = {
    "init_from": values({"resume": ""}, "--model-name {value}"),
    "num_samples": answer("leave it out: each time it is started, it writes another text"),
    **all_of("device dtype compile", answer("leave it out: this machine's best is taken")),
}
# What the last word of a switch means, and what the flag was called once.
OF_CHAT = {
    **all_of("no_chat no_chat_template", switch("--chat off", "--chat on")),
    "chat_template": switch("--chat on", "--chat off"),
}
LONGEST_TEXT = 10**6  # tokens; more is a slip of the keys
MOST_SEEDS = 2**63


def name_first(argv: list[str]) -> list[str]:
    """The command line with a model's name that stands first, as in `generate.py artifacts/demo`,
    given to its flag."""
    if argv and not argv[0].startswith("-"):
        return ["--model_name", *argv]
    return argv


@dataclass
class ModelOptions(Options):
    """Which model is used."""

    heading = "model"
    COMMON = ["model_name", "config"]

    model_name: str = flag(
        "",
        "the folder of a run (its newest model is taken), of one checkpoint or of any other model,"
        " or a name of the Hub; may stand first, without the flag",
        "--model_name_or_path",
        "--out_dir",
    )
    config: str | None = flag(
        None, "recipe: a YAML file whose keys are these flags; the command line wins"
    )

    def check(self, problems: Problems) -> None:
        problems.require(
            bool(self.model_name),
            "no model given",
            "name the folder of a run or a model of the Hub, as in artifacts/demo",
        )


@dataclass
class PromptOptions(Options):
    """What the model continues or answers."""

    heading = "prompt"
    COMMON = ["prompt", "interactive", "chat"]

    prompt: str | None = flag(
        None,
        "text to continue, or what a user says to a chat model (default: the start of a document,"
        " and to a chat model a wish for a short story)",
        "--start",
    )
    interactive: bool = flag(
        False, "ask for one prompt after the other until the input ends (Ctrl-D)"
    )
    chat: Literal["auto", "on", "off"] = flag(
        "auto",
        "have a conversation by the chat template of the tokenizer, or continue the text (off, or"
        " --no-chat); alone: on; auto: as the model was trained",
        alone="on",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # YAML reads a bare on and off as true and false.
        switches = {"true": "on", "false": "off"}
        self.chat = switches.get(str(self.chat).lower(), self.chat)  # type: ignore[assignment]


@dataclass
class SamplingOptions(Options):
    """How the next token is chosen."""

    heading = "how it writes"
    COMMON = ["max_new_tokens", "temperature", "top_k", "top_p", "seed"]

    max_new_tokens: int = flag(200, "tokens to write at most", "--length")
    temperature: float = flag(
        0.8, "above 1 wilder, below 1 tamer; 0: always the most probable token"
    )
    top_k: int = flag(40, "choose among so many of the most probable tokens; 0: all", "--k")
    top_p: float = flag(
        1.0, "choose among the most probable tokens that together have this probability", "--p"
    )
    seed: int | None = flag(None, "the same seed gives the same text (default: another each time)")

    def check(self, problems: Problems) -> None:
        require_between((1, LONGEST_TEXT), self, problems, "max_new_tokens")
        require_between((0, LONGEST_TEXT), self, problems, "top_k")
        problems.require(
            self.temperature == 0 or 1e-3 <= self.temperature <= 1e3,
            f"--temperature is {self.temperature}",
            "use 0, or a number from 0.001 to 1000, such as 0.8",
        )
        problems.require(
            0 < self.top_p <= 1, f"--top-p is {self.top_p}", "use a number above 0, up to 1"
        )
        problems.require(
            self.seed is None or 0 <= self.seed < MOST_SEEDS,
            f"--seed is {self.seed}",
            f"use a number from 0 to {MOST_SEEDS - 1}",
        )


@dataclass
class GenerateConfig(SamplingOptions, PromptOptions, ModelOptions):
    """Let a model write: print how it continues a prompt, word by word."""

    GROUPS = [ModelOptions, PromptOptions, SamplingOptions]
    OTHER_NAMES = OF_SAMPLE | OF_CHAT
