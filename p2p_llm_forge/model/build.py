"""Build a causal language model from scratch, as `--model-type` and `--config-overrides` ask."""

from __future__ import annotations

import ast
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, nearest
from p2p_llm_forge.model.fit import (
    TextSpec,
    positions_of,
    require_causal,
    require_memory,
    require_positions,
)
from p2p_llm_forge.model.load import load_model

# Sizes of the model that is built when nothing is asked for: about 3 million parameters and the
# vocabulary's embedding.
SMALL_GPT2 = {
    **{"n_layer": 4, "n_head": 4, "n_embd": 256},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}


def check_names(config: TrainConfig) -> None:
    """Raise ForgeError for a model family or size that does not exist."""
    if config.model_type or config.config_overrides:
        parse_overrides(config.config_overrides or "", family_defaults(config.model_type))


def build_model(config: TrainConfig, text: TextSpec, processes_here: int = 1) -> Any:
    """The causal LM that the run trains, in float32, on the CPU.

    Loaded from `--model-name`, or built from scratch with the text's vocabulary and context
    length; weights from scratch depend on the seed alone. processes_here: on this machine, each
    with a model of its own. Raises ForgeError where model, text and machine do not fit together.
    """
    if config.model_name:
        return load_model(config.model_name, text, config.trust_remote_code)
    from transformers import AutoModelForCausalLM

    model_config = new_model_config(config, text)
    family, length = model_config.model_type, text.sequence_length
    require_memory(model_config, processes_here)
    torch.manual_seed(config.seed)
    try:
        model = AutoModelForCausalLM.from_config(model_config)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ForgeError(
            f"transformers cannot build this {family}: {error}", "change --config-overrides"
        ) from error
    model = model.float()
    # RoBERTa and its kin keep two positions for padding.
    more = f"give it more positions: --config-overrides max_position_embeddings={length + 2}"
    require_causal(model, f"a {family} from scratch", length, more)
    return model


def family_defaults(model_type: str | None) -> Any:
    """transformers' own configuration of a family. Raises ForgeError if it does not exist."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = model_type or "gpt2"
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ForgeError(
            f"--model-type {family}: no such family of models",
            nearest(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES),
        )
    return AutoConfig.for_model(family)


def new_model_config(config: TrainConfig, text: TextSpec) -> Any:
    """The transformers configuration of a model from scratch, fitted to the text.

    Raises ForgeError for an unknown family or size, and for sizes that contradict the text.
    """
    from transformers import AutoConfig

    defaults = family_defaults(config.model_type)
    overrides = parse_overrides(config.config_overrides or "", defaults)
    settings = _settings_of(text, defaults)
    if not config.model_type:
        settings |= SMALL_GPT2
    # GPT-2 calls max_position_embeddings n_positions, and so on: compare by the family's own names.
    own_name = getattr(defaults, "attribute_map", {})
    settings = {own_name.get(key, key): value for key, value in settings.items()}
    overrides = {own_name.get(key, key): value for key, value in overrides.items()}
    try:
        model_config = AutoConfig.for_model(defaults.model_type, **{**settings, **overrides})
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


def _settings_of(text: TextSpec, defaults: Any) -> dict[str, Any]:
    """What the text decides of a model's configuration."""
    settings: dict[str, Any] = {"vocab_size": text.vocab_size}
    settings |= {f"{end}_token_id": text.eos_token_id for end in ("bos", "eos")}
    padding = getattr(defaults, "pad_token_id", None)
    settings["pad_token_id"] = padding if (padding or 0) < text.vocab_size else None
    if hasattr(defaults, "is_decoder"):
        settings["is_decoder"] = True  # BERT and its kin look ahead otherwise
    if positions_of(defaults) is not None:
        settings["max_position_embeddings"] = text.sequence_length
    return settings


def parse_overrides(overrides: str, defaults: Any) -> dict[str, Any]:
    """`hidden_size=64,tie_word_embeddings=false` as a dict, each key one that the family has."""
    known = {*defaults.to_dict(), *getattr(defaults, "attribute_map", {})}
    parsed = {}
    for pair in filter(None, (part.strip() for part in overrides.split(","))):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals or not value:
            raise ForgeError(
                f"--config-overrides: '{pair}' is not KEY=VALUE",
                "write it like hidden_size=64,num_hidden_layers=2",
            )
        if key not in known:
            raise ForgeError(
                f"--config-overrides: a {defaults.model_type} has no '{key}'", nearest(key, known)
            )
        parsed[key] = _literal(value)
        default = getattr(defaults, key, None)
        if isinstance(default, int | float) and not isinstance(parsed[key], int | float):
            raise ForgeError(
                f"--config-overrides: {key} is '{value}'", f"give a number like {default}"
            )
    return parsed


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text
