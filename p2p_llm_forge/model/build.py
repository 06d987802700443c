"""Build the causal LM of a run: from scratch, as the flags ask, or loaded with its weights."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.utils.logging import disable_progress_bar

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.fit import (
    BlockTooLong,
    TextSpec,
    positions_of,
    require_all_weights,
    require_causal,
    require_memory,
    require_positions,
    require_same_words,
)
from p2p_llm_forge.model.lora import (
    add_adapters,
    base_of,
    is_adapter_folder,
    merge,
    read_adapters,
    settings_of,
)
from p2p_llm_forge.model.shape import DEPTH, STARTS_AT_ZERO, output_projections
from p2p_llm_forge.model.sizes import (
    below_1,
    combined,
    completed,
    one_line,
    padding,
    refused_alone,
    require_sizes,
    require_tokens,
    share_vocabulary,
    sizes_asked_for,
    sizes_by_depth,
    sizes_in,
    vocabularies,
)


def build_model(config: TrainConfig, text: TextSpec, processes_here: int = 1) -> Any:
    """The causal LM that the run trains, in float32, on the CPU.

    Loaded from `--model-name`, or built from scratch with the text's vocabulary and context
    length; weights from scratch depend on the seed alone. With `--lora-rank` it has adapters, and
    its own weights are in `--base-dtype`. processes_here: on this machine, each with a model of its
    own. Raises ForgeError where model, text and machine do not fit together.
    """
    if config.model_name and config.lora_rank:
        return load_base(config, text)
    if config.model_name:
        return load_model(config.model_name, text, config.trust_remote_code)
    quiet_transformers()
    try:
        return model_from_scratch(config, text, processes_here)
    except BlockTooLong:
        # RoBERTa and its kin keep two positions for padding.
        return model_from_scratch(config, text, processes_here, spare_positions=2)


def model_from_scratch(
    config: TrainConfig, text: TextSpec, processes_here: int, spare_positions: int = 0
) -> Any:
    """A new model. Raises ForgeError, BlockTooLong if it only lacks positions."""
    model_config = new_model_config(config, text, spare_positions)
    family = model_config.model_type
    require_sizes(model_config, f"in this {family}", "change it by --config-overrides")
    require_memory(model_config, processes_here)
    torch.manual_seed(config.seed)
    asked = f" by --config-overrides {config.config_overrides}" * bool(config.config_overrides)
    other_sizes = fix_of_sizes(config, model_config)
    try:
        model = AutoModelForCausalLM.from_config(model_config).float()
    except Exception as error:  # whatever a family raises for sizes that do not go together
        found = f"transformers cannot build this {family}{asked}: {one_line(error)}"
        raise ForgeError(found, other_sizes) from error
    what, fewer = f"a {family} from scratch{asked}", "prepare the data with a smaller"
    fewer += " --sequence-length"
    require_causal(model, what, text.sequence_length, fewer, other_sizes)
    if family in STARTS_AT_ZERO:
        start_at_zero(model)
    return model


def start_at_zero(model: Any) -> None:
    """Set to zero what adds a layer's output to the others': every block starts as the identity."""
    names = output_projections(model.config.model_type)
    for name, module in model.named_modules():
        if name.rpartition(".")[2] in names and isinstance(module, torch.nn.Linear):
            torch.nn.init.zeros_(module.weight)


def fix_of_sizes(config: TrainConfig, model_config: Any) -> str:
    """What to do where a model from scratch cannot be built, or computes nothing."""
    if below := below_1(*sizes_asked_for(config)):
        names = " and ".join(below)
        return f"give {names} a size of 1 or more, or leave {names} out"
    sizes = f"change its sizes with --config-overrides; it has {sizes_in(model_config)}"
    if asked := " or ".join(sizes_asked_for(config)[1]):  # need not be sizes
        sizes = f"give another value for {asked}, or leave it out; or {sizes}"
    return f"{sizes}; or take another family"


def load_base(config: TrainConfig, text: TextSpec) -> Any:
    """The model of `--model-name` with new adapters. Raises ForgeError."""
    name = config.model_name or ""
    if is_adapter_folder(Path(name)):
        raise ForgeError(
            f"--model-name {name} holds adapters, and new ones need the weights of a whole model",
            "give the model that they belong to, or the same run's with --merge-lora",
        )
    dtype = torch.bfloat16 if config.base_dtype == "bfloat16" else torch.float32
    lm = load_model(name, text, config.trust_remote_code, dtype)
    add_adapters(lm, config)
    return lm


def load_model(
    name: str,
    text: TextSpec,
    trust_remote_code: bool = False,
    dtype: torch.dtype = torch.float32,
    is_ours: bool = False,
) -> Any:
    """The model `name` (a folder or a name of the Hub) in float32, on the CPU.

    Of a folder of adapters, the model that they belong to, with them added to its weights. is_ours:
    a checkpoint, which no pickle is read of. Raises ForgeError where it cannot be read, or does not
    fit the text.
    """
    if is_adapter_folder(Path(name)):
        lm = load_model(base_of(Path(name)), text, trust_remote_code)
        lm = read_adapters(lm, Path(name))
        if settings_of(lm):
            merge(lm)
        return lm
    model, missing = read_model(name, trust_remote_code, dtype, is_ours)
    if settings_of(model):  # adapters of the Hub, which transformers has put into their base
        merge(model)
    model.config.get_text_config(decoder=True).use_cache = True  # of runs before it was published
    if model.generation_config is not None:
        model.generation_config.use_cache = True
    require_all_weights(model, name, missing)
    what, fewer = f"model {name}", "prepare the data with a smaller --sequence-length"
    require_positions(model.config, what, text)
    require_same_words(model, name, text, trust_remote_code)
    require_causal(
        *(model, what, text.sequence_length, fewer),
        "see that transformers alone runs it, or take another version of transformers",
    )
    return model


def read_model(
    name: str, trust_remote_code: bool, dtype: torch.dtype, is_ours: bool = False
) -> tuple[Any, Any]:
    """The model `name` as transformers reads it, and the names of weights that it lacks.

    is_ours: see `load_model`. Raises ForgeError.
    """
    quiet_transformers()
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if is_path and not Path(name).is_dir():
        raise ForgeError(f"--model-name {name}: no such folder", "give the folder of a model")
    fix = (
        "check the name and the connection to the Hub; without one, download the model on"
        " another machine and give its folder"
    )
    if Path(name).is_dir():
        fix = "copy or download the whole model again: config.json and every file of weights"
    try:
        known = AutoConfig.from_pretrained(name, trust_remote_code=trust_remote_code)
        require_sizes(known, f"in the config.json of {name}", fix)
        # transformers 5 keeps the file's dtype by default: what is trained wants float32.
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            name,
            dtype=dtype,
            trust_remote_code=trust_remote_code,
            output_loading_info=True,
            use_safetensors=is_ours or None,  # None: pickles too, where there is nothing else
        )
    except ForgeError:
        raise
    except Exception as error:  # whatever transformers and safetensors raise for damaged files
        found = f"--model-name {name} could not be loaded: {one_line(error)}"
        raise ForgeError(found, fix) from error
    model, loading = loaded
    return model, loading["missing_keys"]


def new_model_config(config: TrainConfig, text: TextSpec, spare_positions: int = 0) -> Any:
    """The transformers configuration of a model from scratch, fitted to the text.

    spare_positions: more than a block has. Raises ForgeError for an unknown family or size, and for
    sizes that contradict the text.
    """
    defaults, overrides = sizes_asked_for(config)
    settings: dict[str, Any] = {
        **vocabularies(defaults, text.vocab_size),
        "bos_token_id": text.eos_token_id,
        "eos_token_id": text.eos_token_id,
        "pad_token_id": padding(defaults, text.vocab_size),
    }
    if hasattr(defaults, "is_decoder"):
        settings["is_decoder"] = True  # BERT and its kin look ahead otherwise
    if positions_of(defaults) is not None:
        settings["max_position_embeddings"] = text.sequence_length + spare_positions
    depth = config.depth or (None if config.model_type else DEPTH)
    if depth is not None:
        settings |= sizes_by_depth(defaults, depth, overrides)
    # GPT-2 calls max_position_embeddings n_positions, and so on: compared by the family's names.
    settings = completed(defaults, combined(settings, overrides))
    try:
        model_config = type(defaults)(**settings)
    except Exception as error:  # whatever a family's own checks raise
        wrong = " and ".join(refused_alone(defaults, overrides) or overrides)
        raise ForgeError(
            f"--config-overrides {config.config_overrides}: {one_line(error)}",
            f"give another value for {wrong}, or leave {wrong} out",
        ) from error
    share_vocabulary(defaults, model_config)
    model_config.use_cache = True  # whoever generates wants it; training asks for none
    if model_config.vocab_size < text.vocab_size:
        raise ForgeError(
            f"--config-overrides asks for a vocabulary of {model_config.vocab_size}, the data has"
            f" {text.vocab_size} tokens",
            "leave vocab_size out, and it is taken from the data",
        )
    require_tokens(overrides, model_config.vocab_size)
    require_positions(model_config, "the model that --config-overrides asks for", text)
    return model_config


def quiet_transformers() -> None:
    """No bars, which it draws for every file on every rank, and no advice for GPUs alone."""
    disable_progress_bar()
    if not torch.cuda.is_available():  # where it advises kernels for short convolutions
        logging.getLogger("transformers.integrations.hub_kernels").setLevel(logging.ERROR)


def recompute_activations(lm: Any) -> None:
    """Have backward compute the layers' activations again: less memory, slower."""
    # transformers 5.22 and older, the newest for Python 3.10 among them, know only the older name.
    newer = getattr(lm, "activation_checkpointing_enable", None)
    (newer or lm.gradient_checkpointing_enable)({"use_reentrant": False})
