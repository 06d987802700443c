"""Build the causal LM of a run: from scratch, as the flags ask, or loaded with its weights."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
from transformers.utils.logging import disable_progress_bar

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, Problems, nearest
from p2p_llm_forge.model.fit import (
    TextSpec,
    positions_of,
    require_all_weights,
    require_causal,
    require_memory,
    require_positions,
    require_same_words,
)

# Sizes of the model that is built when nothing is asked for: about 3 million parameters and the
# vocabulary's embedding.
SMALL_GPT2 = {
    **{"n_layer": 4, "n_head": 4, "n_embd": 256},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}
LITERALS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def build_model(config: TrainConfig, text: TextSpec, processes_here: int = 1) -> Any:
    """The causal LM that the run trains, in float32, on the CPU.

    Loaded from `--model-name`, or built from scratch with the text's vocabulary and context
    length; weights from scratch depend on the seed alone. processes_here: on this machine, each
    with a model of its own. Raises ForgeError where model, text and machine do not fit together.
    """
    if config.model_name:
        return load_model(config.model_name, text, config.trust_remote_code)
    disable_progress_bar()
    model_config = new_model_config(config, text)
    family, length = model_config.model_type, text.sequence_length
    require_memory(model_config, processes_here)
    torch.manual_seed(config.seed)
    try:
        model = AutoModelForCausalLM.from_config(model_config).float()
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ForgeError(
            f"transformers cannot build this {family}: {error}", "change --config-overrides"
        ) from error
    # RoBERTa and its kin keep two positions for padding.
    more = f"give it more positions: --config-overrides max_position_embeddings={length + 2}"
    require_causal(model, f"a {family} from scratch", length, more)
    return model


def load_model(name: str, text: TextSpec, trust_remote_code: bool = False) -> Any:
    """The model `name` (a folder or a name of the Hub) in float32, on the CPU.

    Raises ForgeError where it cannot be read, or does not fit the text.
    """
    disable_progress_bar()  # transformers draws one for every file, on every rank
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ForgeError(f"--model-name {name}: no such folder", "give the folder of a model")
    try:
        # transformers 5 keeps the file's dtype by default: training wants float32 weights.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=torch.float32,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
        )
    except (OSError, ValueError, KeyError) as error:
        fix = (
            "check the name and the connection to the Hub; without one, download the model on"
            " another machine and give its folder"
        )
        if Path(name).is_dir():
            fix = "copy or download the whole model again: config.json and every file of weights"
        raise ForgeError(
            f"--model-name {name} could not be loaded: {str(error).strip().splitlines()[0]}", fix
        ) from error
    model, loading = loaded
    require_all_weights(model, name, loading["missing_keys"])
    what, fewer = f"model {name}", "prepare the data with a smaller --sequence-length"
    require_positions(model.config, what, text)
    require_same_words(model, name, text, trust_remote_code)
    require_causal(model, what, text.sequence_length, fewer)
    return model


def new_model_config(config: TrainConfig, text: TextSpec) -> Any:
    """The transformers configuration of a model from scratch, fitted to the text.

    Raises ForgeError for an unknown family or size, and for sizes that contradict the text.
    """
    defaults, overrides = sizes_asked_for(config)
    padding = getattr(defaults, "pad_token_id", None)
    settings: dict[str, Any] = {
        "vocab_size": text.vocab_size,
        "bos_token_id": text.eos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": padding if (padding or 0) < text.vocab_size else None,
    }
    if hasattr(defaults, "is_decoder"):
        settings["is_decoder"] = True  # BERT and its kin look ahead otherwise
    if positions_of(defaults) is not None:
        settings["max_position_embeddings"] = text.sequence_length
    if not config.model_type:
        settings |= SMALL_GPT2
    # GPT-2 calls max_position_embeddings n_positions, and so on: compare by the family's own names.
    own_name, items = (
        getattr(defaults, "attribute_map", {}),
        [*settings.items(), *overrides.items()],
    )
    settings = {own_name.get(key, key): value for key, value in items}
    try:
        model_config = AutoConfig.for_model(defaults.model_type, **settings)
    except (ValueError, TypeError, StrictDataclassError) as error:
        reason = " ".join(str(error).split())
        raise ForgeError(
            f"--config-overrides {config.config_overrides}: {reason}", "change these values"
        ) from error
    model_config.use_cache = False
    if model_config.vocab_size < text.vocab_size:
        raise ForgeError(
            f"--config-overrides asks for a vocabulary of {model_config.vocab_size}, the data has"
            f" {text.vocab_size} tokens",
            "leave vocab_size out, and it is taken from the data",
        )
    require_positions(model_config, "the model that --config-overrides asks for", text)
    return model_config


def sizes_asked_for(config: TrainConfig) -> tuple[Any, dict[str, Any]]:
    """transformers' own configuration of the family, and what `--config-overrides` changes of it.

    Raises ForgeError for a family or size that does not exist.
    """
    family = config.model_type or "gpt2"
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fix = nearest(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ForgeError(f"--model-type {family}: no such family of models", fix)
    defaults = AutoConfig.for_model(family)
    known = {*defaults.to_dict(), *getattr(defaults, "attribute_map", {})}
    overrides: dict[str, Any] = {}
    problems = Problems()
    for pair in filter(None, map(str.strip, (config.config_overrides or "").split(","))):
        key, _, value = map(str.strip, pair.partition("="))
        if not value:
            found = f"--config-overrides: '{pair}' is not KEY=VALUE"
            problems.require(False, found, "write it like hidden_size=64,num_hidden_layers=2")
            continue
        found = f"--config-overrides: a {family} has no '{key}'"
        problems.require(key in known, found, nearest(key, known))
        overrides[key] = value
        with contextlib.suppress(ValueError, SyntaxError):  # else it is a word, such as gelu
            overrides[key] = ast.literal_eval(LITERALS.get(value.lower(), value))
        default = getattr(defaults, key, None)
        is_number = isinstance(overrides[key], int | float) or not isinstance(default, int | float)
        found = f"--config-overrides: {key} is '{value}'"
        problems.require(is_number, found, f"give a number like {default}")
    problems.raise_any()
    return defaults, overrides
