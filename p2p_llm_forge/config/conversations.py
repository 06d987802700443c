"""What prepare_data.py can be asked about rows that hold conversations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2p_llm_forge.config.fields import Options, flag
from p2p_llm_forge.config.other_names import (
    all_of,
    answer,
    renamed,
    switch,
    unless_off,
    unless_on,
    values,
)
from p2p_llm_forge.errors import Problems

WHOLE = "leave it out: blocks are filled with whole conversations, as well as these fit"
ASSISTANT_OR_ALL = switch("--train-on assistant", "--train-on all")

# What TRL, axolotl and LitGPT call it.
OF_TUNING = {
    **all_of("assistant_only_loss completion_only_loss mask_prompt", ASSISTANT_OR_ALL),
    "train_on_inputs": switch("--train-on all", "--train-on assistant"),
    "roles_to_train": values(
        {"assistant": "--train-on assistant", "['assistant']": "--train-on assistant"},
        "fix: use --train-on assistant, or --train-on all",
    ),
    **all_of("packing sample_packing eval_packing eval_sample_packing", unless_on(WHOLE)),
    **all_of("padding_free group_by_length", unless_off(WHOLE)),
    "packing_strategy": values({"bfd": "", "bfd_split": ""}, f"fix: {WHOLE}"),
    "excess_length_strategy": values(
        {
            "drop": "--long-conversations skip",
            "truncate": "--long-conversations cut",
            "raise": "--long-conversations error",
        },
        "fix: use --long-conversations cut, skip or error",
    ),
    "truncation_mode": answer("use --long-conversations cut, skip or error"),
    **all_of("max_length max_seq_length sequence_len cutoff_len", renamed("--sequence-length")),
    "dataset_text_field": renamed("--text-column"),
    **all_of("dataset_num_proc dataset_processes", renamed("--num-workers")),
    "dataset_train_split": renamed("--dataset-split"),
}


@dataclass
class ConversationOptions(Options):
    """How rows that hold conversations become tokens, and which of them are trained."""

    heading = "conversations"
    OTHER_NAMES = OF_TUNING

    train_on: Literal["auto", "assistant", "all"] = flag(
        "auto",
        "which tokens of conversations (rows with messages; prompt and completion; or instruction"
        " and output) count in the loss: what the assistant says, or all; auto: what the assistant"
        " says, where rows have no text",
    )
    chat_template: str | None = flag(
        None,
        "template (Jinja) that makes text of a conversation (default: the tokenizer's own, or else"
        " a plain one)",
        "--chat_template_path",
        metavar="FILE",
    )
    long_conversations: Literal["cut", "skip", "error"] = flag(
        "cut",
        "a conversation that is longer than a block: cut it, each part in a block of its own; leave"
        " it out; or refuse it",
    )

    @property
    def asks_for_conversations(self) -> bool:
        """Whether rows are to be read as conversations, also where they have a text."""
        return self.train_on != "auto" or self.chat_template is not None

    @property
    def trained(self) -> str:
        """Which tokens of conversations are trained: `assistant` or `all`."""
        return "all" if self.train_on == "all" else "assistant"

    def check(self, problems: Problems) -> None:
        problems.require(
            self.chat_template != "",
            "--chat-template is empty",
            "give a file, or leave the flag out",
        )
