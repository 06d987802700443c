"""Load a causal language model with its weights, if it fits the data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.fit import (
    TextSpec,
    require_causal,
    require_positions,
    require_same_words,
)


def without_progress_bars() -> None:
    """transformers draws a bar for every file it reads or writes, on every rank."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def load_model(name: str, text: TextSpec, trust_remote_code: bool = False) -> Any:
    """The model `name` (a folder or a name of the Hub) in float32, on the CPU.

    Raises ForgeError where it cannot be read, or does not fit the text.
    """
    from transformers import AutoModelForCausalLM

    if is_path(name) and not Path(name).is_dir():
        raise ForgeError(f"--model-name {name}: no such folder", "give the folder of a model")
    try:
        # transformers 5 keeps the file's dtype by default: training wants float32 weights.
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ForgeError(
            f"--model-name {name} could not be loaded: {reason}",
            "check the name and the connection to the Hub; without one, download the model on"
            " another machine and give its folder",
        ) from error
    require_positions(model.config, f"model {name}", text)
    require_same_words(model, name, text, trust_remote_code)
    require_causal(
        model,
        f"model {name}",
        text.sequence_length,
        "prepare the data with a smaller --sequence-length",
    )
    return model


def is_path(name: str) -> bool:
    """Whether a model's name can only be a folder."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1
