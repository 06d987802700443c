"""Build or load the causal language model, its optimizer and its learning-rate schedule."""

from __future__ import annotations

import ast
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import StrictDataclassError

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.errors import ForgeError, nearest

# Sizes of the model that is built when nothing is asked for: about 3 million parameters and the
# vocabulary's embedding.
SMALL_GPT2 = {
    **{"n_layer": 4, "n_head": 4, "n_embd": 256},
    **{"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0},
}

# Bytes a parameter takes in training: itself, gradient and AdamW's two moments in float32.
TRAINING_BYTES_PER_PARAMETER = 16


def without_progress_bars() -> None:
    """transformers draws a bar for every file it reads or writes, on every rank."""
    from transformers.utils import logging

    logging.disable_progress_bar()


def check_names(config: TrainConfig) -> None:
    """Raise ForgeError for a model family, size or schedule that does not exist."""
    learning_rate_factor(config, total_steps=1)
    if config.model_type or config.config_overrides:
        parse_overrides(config.config_overrides or "", family_defaults(config))


def family_defaults(config: TrainConfig) -> Any:
    """transformers' own configuration of the family that `--model-type` names."""
    from transformers import AutoConfig
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    family = config.model_type or "gpt2"
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ForgeError(
            f"unknown model type '{family}': {nearest(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)}"
        )
    return AutoConfig.for_model(family)


def build_model(config: TrainConfig, data: PreparedDataset) -> Any:
    """The causal LM that the run trains, in float32, on the CPU.

    Loaded from `--model-name`, or built from scratch with the data's vocabulary and context
    length; weights from scratch depend on the seed alone. Raises ForgeError where the model and
    the data do not fit each other.
    """
    if config.model_name:
        return load_model(config.model_name, data, config.trust_remote_code)
    from transformers import AutoModelForCausalLM

    model_config = new_model_config(config, data)
    _refuse_too_large(model_config)
    torch.manual_seed(config.seed)
    try:
        model = AutoModelForCausalLM.from_config(model_config)
    except (ValueError, TypeError, AssertionError, RuntimeError) as error:
        raise ForgeError(
            f"transformers cannot build this {model_config.model_type}: {error}. Change"
            " --config-overrides"
        ) from error
    model = model.float()
    _require_causal(
        model, f"a {model_config.model_type} from scratch", data.manifest.sequence_length
    )
    return model


def load_model(name: str, data: PreparedDataset, trust_remote_code: bool = False) -> Any:
    """The model `name` (a folder or a name of the Hub) with its weights, if it fits the data."""
    from transformers import AutoModelForCausalLM

    if looks_like_path(name) and not Path(name).is_dir():
        raise ForgeError(f"--model-name {name}: no such folder")
    try:
        # transformers 5 keeps the dtype of the file unless told: training wants float32 weights.
        model = AutoModelForCausalLM.from_pretrained(
            name, dtype=torch.float32, trust_remote_code=trust_remote_code
        )
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).strip().splitlines()[0]
        raise ForgeError(
            f"--model-name {name} could not be loaded: {reason}\n"
            "  Check the name and the connection to the Hub; without one, download the model on "
            "another machine and give its folder"
        ) from error
    _check_fits(model, name, data, trust_remote_code)
    _require_causal(model, f"model {name}", data.manifest.sequence_length)
    return model


def looks_like_path(name: str) -> bool:
    """Whether a model's or tokenizer's name can only be a folder."""
    return name.startswith((".", "/", "~")) or name.count("/") > 1


def new_model_config(config: TrainConfig, data: PreparedDataset) -> Any:
    """The transformers configuration of a model from scratch, fitted to the data.

    Raises ForgeError for an unknown family or size, and for sizes that contradict the data.
    """
    from transformers import AutoConfig

    defaults = family_defaults(config)
    overrides = parse_overrides(config.config_overrides or "", defaults)
    manifest = data.manifest
    settings: dict[str, Any] = {"vocab_size": manifest.vocab_size}
    settings |= {f"{end}_token_id": manifest.eos_token_id for end in ("bos", "eos")}
    padding = getattr(defaults, "pad_token_id", None)
    settings["pad_token_id"] = padding if (padding or 0) < manifest.vocab_size else None
    if hasattr(defaults, "is_decoder"):
        settings["is_decoder"] = True  # BERT and its kin look ahead otherwise
    if not config.model_type:
        settings |= SMALL_GPT2
    if positions_of(defaults) is not None:
        settings["max_position_embeddings"] = manifest.sequence_length
    # GPT-2 calls max_position_embeddings n_positions, and so on: compare by the family's own names.
    own_name = getattr(defaults, "attribute_map", {})
    settings = {own_name.get(key, key): value for key, value in settings.items()}
    overrides = {own_name.get(key, key): value for key, value in overrides.items()}
    try:
        model_config = AutoConfig.for_model(defaults.model_type, **{**settings, **overrides})
    except (ValueError, TypeError, StrictDataclassError) as error:
        told = " ".join(str(error).split())
        raise ForgeError(f"--config-overrides {config.config_overrides}: {told}") from error
    model_config.use_cache = False
    if model_config.vocab_size < manifest.vocab_size:
        raise ForgeError(
            f"--config-overrides asks for a vocabulary of {model_config.vocab_size}, the data has "
            f"{manifest.vocab_size} tokens: leave vocab_size out, and it is taken from the data"
        )
    _check_positions(model_config, "the model that --config-overrides asks for", data)
    return model_config


def parse_overrides(text: str, defaults: Any) -> dict[str, Any]:
    """`hidden_size=64,tie_word_embeddings=false` as a dict, each key one that the family has."""
    known = {*defaults.to_dict(), *getattr(defaults, "attribute_map", {})}
    overrides = {}
    for pair in filter(None, (part.strip() for part in text.split(","))):
        key, equals, value = (piece.strip() for piece in pair.partition("="))
        if not equals or not value:
            raise ForgeError(f"--config-overrides: '{pair}' is not KEY=VALUE")
        if key not in known:
            raise ForgeError(
                f"--config-overrides: a {defaults.model_type} has no '{key}': {nearest(key, known)}"
            )
        overrides[key] = _literal(value)
        default = getattr(defaults, key, None)
        if isinstance(default, int | float) and not isinstance(overrides[key], int | float):
            raise ForgeError(
                f"--config-overrides: {key} is '{value}', expected a number like {default}"
            )
    return overrides


def _literal(text: str) -> Any:
    if text.lower() in ("true", "false", "none", "null"):
        return {"true": True, "false": False}.get(text.lower())
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return text


def positions_of(model_config: Any) -> int | None:
    """The longest sequence that a model can take; None where its family sets no limit."""
    for name in ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length"):
        limit = getattr(model_config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def _check_positions(model_config: Any, what: str, data: PreparedDataset) -> None:
    limit = positions_of(model_config)
    if limit is not None and data.manifest.sequence_length > limit:
        raise ForgeError(
            f"the data has blocks of {data.manifest.sequence_length} tokens, {what} takes at most "
            f"{limit}: prepare the data with --sequence-length {limit} or less"
        )


def _check_fits(model: Any, name: str, data: PreparedDataset, trust_remote_code: bool) -> None:
    """Raise ForgeError unless the model can read the data's tokens, and means the same by them."""
    _check_positions(model.config, f"model {name}", data)
    mend = (
        f"prepare the data with the model's own tokenizer: prepare_data.py --tokenizer {name} ..."
    )
    size = model.get_input_embeddings().num_embeddings
    if size < data.manifest.vocab_size:
        raise ForgeError(
            f"the data has a vocabulary of {data.manifest.vocab_size} tokens, model {name} has"
            f" {size}: {mend}"
        )
    from transformers import AutoTokenizer

    try:
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return  # a model without a tokenizer beside it: sizes are all there is to compare
    ours = AutoTokenizer.from_pretrained(data.tokenizer_dir, trust_remote_code=trust_remote_code)
    if theirs.get_vocab() != ours.get_vocab():
        raise ForgeError(
            f"the data was tokenized with another tokenizer than that of model {name}, so its "
            f"numbers mean other words: {mend}"
        )


@torch.no_grad()
def _require_causal(model: Any, what: str, length: int) -> None:
    """Raise ForgeError unless the model takes a block, and predicts each token from those before.

    Tried, since families that can be either (BERT, XLNet, ...) do not all say which they are.
    length: tokens in a block.
    """
    was_training = model.training
    model.eval()
    tokens = torch.arange(length).remainder(model.get_input_embeddings().num_embeddings)
    changed = tokens.clone()
    changed[-1] = tokens[0]
    try:
        with torch.random.fork_rng(devices=[]):
            one, other = (
                model(input_ids=ids.unsqueeze(0), use_cache=False).logits[:, :-1]
                for ids in (tokens, changed)
            )
    except (IndexError, RuntimeError) as error:
        raise ForgeError(
            f"{what} cannot take a block of {length} tokens ({error}): build it with more positions"
            f" (--config-overrides max_position_embeddings={length + 2}), or prepare shorter blocks"
        ) from error
    model.train(was_training)
    if not torch.allclose(one, other, rtol=1e-4, atol=1e-5):
        raise ForgeError(
            f"{what} sees the tokens that it should predict, so it is not a causal language model:"
            " choose another family, such as gpt2, llama or qwen3"
        )


def _refuse_too_large(model_config: Any) -> None:
    """Raise ForgeError when the weights and optimizer could not fit into this machine's memory."""
    import psutil
    from transformers import AutoModelForCausalLM

    if torch.accelerator.is_available():
        return  # the accelerator's own allocator reports this best
    with torch.device("meta"):
        try:
            parameters = sum(
                p.numel() for p in AutoModelForCausalLM.from_config(model_config).parameters()
            )
        except (ValueError, TypeError, AssertionError, RuntimeError):
            return  # what cannot be built is told by the build itself
    needed = (
        parameters * TRAINING_BYTES_PER_PARAMETER * int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    )
    available = psutil.virtual_memory().available
    if needed > available:
        raise ForgeError(
            f"a {model_config.model_type} of {parameters / 1e6:,.0f} M parameters needs about "
            f"{needed / 1e9:.1f} GB to train on this machine, {available / 1e9:.1f} GB are free: "
            "make it smaller with --config-overrides (hidden_size, num_hidden_layers, ...)"
        )


def build_optimizer(config: TrainConfig, model: torch.nn.Module) -> torch.optim.Optimizer:
    """The optimizer, with weight decay on matrices only (biases, norms and such go free)."""
    parameters = [p for p in model.parameters() if p.requires_grad]
    groups = [
        {"params": [p for p in parameters if p.dim() >= 2], "weight_decay": config.weight_decay},
        {"params": [p for p in parameters if p.dim() < 2], "weight_decay": 0.0},
    ]
    groups = [group for group in groups if group["params"]]
    if config.optimizer == "sgd":
        return torch.optim.SGD(groups, lr=config.learning_rate)
    if config.optimizer == "adafactor":
        return torch.optim.Adafactor(groups, lr=config.learning_rate)
    fused = all(p.device.type in ("cpu", "cuda") for p in parameters)
    return torch.optim.AdamW(groups, lr=config.learning_rate, betas=(0.9, 0.95), fused=fused)


def learning_rate_factor(config: TrainConfig, total_steps: int) -> Callable[[int], float]:
    """The share of the peak learning rate at an update (counted from 0): a function of it alone.

    The shapes are transformers' own; because they depend on nothing but the step, no scheduler
    state is kept, saved or stepped.
    """
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType

    short = {"wsd": "warmup_stable_decay", "constant": "constant_with_warmup"}
    names = {kind.value for kind in SchedulerType}
    name = short.get(config.lr_scheduler, config.lr_scheduler)
    if name not in names:
        raise ForgeError(
            f"unknown schedule '{config.lr_scheduler}':"
            f" {nearest(config.lr_scheduler, names | {*short})}"
        )
    # WSD decays over the last fifth, as its authors do for short runs (arXiv 2404.06395).
    special = {"num_decay_steps": max(1, total_steps // 5)} if name == "warmup_stable_decay" else {}
    unused = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
    try:
        schedule = get_scheduler(
            name, unused, config.warmup_steps, total_steps, scheduler_specific_kwargs=special
        )
        return schedule.lr_lambdas[0]
    except (AttributeError, TypeError, ValueError) as error:
        raise ForgeError(
            f"schedule '{config.lr_scheduler}' is no function of the step alone, which exact "
            "resuming needs: use linear, cosine, constant or wsd"
        ) from error
