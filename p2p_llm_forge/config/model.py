"""Which model is trained."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from p2p_llm_forge.config.fields import Options, flag
from p2p_llm_forge.errors import Problems


@dataclass
class ModelOptions(Options):
    """Which model is trained."""

    _argument_group_name = "model"
    PER_RANK: ClassVar[tuple[str, ...]] = ("model_name", "gradient_checkpointing", "compile")

    model_name: str | None = flag(
        None, "model to fine-tune: a folder or a name of the Hub", "--model_name_or_path"
    )
    model_type: str | None = flag(
        None, "family of a model trained from scratch, such as llama; without it a small GPT-2"
    )
    config_overrides: str | None = flag(
        None, "sizes of a model trained from scratch", metavar="KEY=VALUE,..."
    )
    trust_remote_code: bool = flag(
        False, "run the Python code that the model's author ships with it"
    )
    document_mask: bool = flag(
        False, "keep attention inside documents, in training and in evaluation"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in backward: less memory, slower"
    )
    compile: bool = flag(False, "compile the model with torch.compile")

    def check(self, problems: Problems) -> None:
        problems.require(
            not (self.model_name and (self.model_type or self.config_overrides)),
            "--model-name loads a model with its own sizes; --model-type and --config-overrides"
            " build a new one",
            "give one or the other",
        )
