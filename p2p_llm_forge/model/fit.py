"""Whether a causal language model and the text that it is to read fit each other."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Collection, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.limits import free_memory
from p2p_llm_forge.model.sizes import one_line, size_of, sizes_in

# Bytes a parameter takes in training: itself, gradient and AdamW's two moments in float32.
TRAINING_BYTES_PER_PARAMETER = 16

QUIET = 2e-3  # root mean square of a matrix that may not show what it does; families draw 2e-2


@dataclass(frozen=True)
class TextSpec:
    """What a model must know of the text that it reads."""

    vocab_size: int
    eos_token_id: int  # ends every document
    sequence_length: int  # tokens in a block
    tokenizer_dir: Path
    is_chat: bool = False  # made of conversations, by the tokenizer's chat template


class BlockTooLong(ForgeError):
    """A model takes short texts, and no block."""


@contextlib.contextmanager
def in_evaluation(model: torch.nn.Module) -> Iterator[None]:
    """Try a model without dropout and gradients; afterwards it trains, if it did."""
    was_training = model.training
    model.eval()
    try:
        with torch.no_grad():
            yield
    finally:
        model.train(was_training)


@contextlib.contextmanager
def in_trial(model: torch.nn.Module) -> Iterator[None]:
    """Try a model as `in_evaluation`, with random numbers in matrices that are (almost) zero.

    A layer that adds nothing yet, as all do that start at zero, shows nothing of what it will do.
    Afterwards the weights are what they were.
    """
    matrices = (p for p in model.parameters() if p.dim() >= 2)
    with in_evaluation(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        kept = [(p, p.clone()) for p in matrices if p.square().mean() < QUIET**2]
        for parameter, _ in kept:
            values = torch.randn(parameter.shape) / parameter.shape[-1] ** 0.5
            parameter.copy_(values)
        try:
            yield
        finally:
            for parameter, before in kept:
                parameter.copy_(before)


def positions_of(model_config: Any) -> int | None:
    """The longest sequence that a model can take; None where its family sets no limit."""
    names = ("max_position_embeddings", "n_positions", "max_seq_len", "seq_length")
    limits = (size_of(model_config.get_text_config(decoder=True), name) for name in names)
    return next((one for one in limits if isinstance(one, int) and one > 0), None)


def require_positions(model_config: Any, what: str, text: TextSpec) -> None:
    """Raise ForgeError unless the model can take a block."""
    limit = positions_of(model_config)
    if limit is not None and text.sequence_length > limit:
        raise ForgeError(
            f"the data has blocks of {text.sequence_length} tokens, {what} takes at most {limit}",
            f"prepare the data with --sequence-length {limit} or less",
        )


def require_all_weights(model: Any, name: str, missing: Collection[str]) -> None:
    """Raise ForgeError if any weights were missing: transformers draws them at random.

    missing: of the loading info, in which what is tied, or made by the model itself, is not.
    """
    if not missing:
        return
    few = ", ".join(sorted(missing)[:3]) + (", ..." if len(missing) > 3 else "")
    raise ForgeError(
        f"--model-name {name} lacks {len(missing)} of the weights of a {type(model).__name__}"
        f" ({few}), which would be drawn at random",
        "give a folder that holds them all, as AutoModelForCausalLM's save_pretrained writes it: a"
        " base model without its head, or one for another task, is none",
    )


def require_same_words(model: Any, name: str, text: TextSpec, trust_remote_code: bool) -> None:
    """Raise ForgeError unless the model knows the data's tokens, and means the same by them."""
    fix = f"prepare the data with the model's own tokenizer: prepare_data.py --tokenizer {name} ..."
    size = model.get_input_embeddings().num_embeddings
    if size < text.vocab_size:
        raise ForgeError(
            f"the data has a vocabulary of {text.vocab_size} tokens, model {name} has {size}", fix
        )
    try:
        theirs = AutoTokenizer.from_pretrained(name, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError):
        return  # a model without a tokenizer beside it: sizes are all there is to compare
    if {*theirs.get_vocab()} <= {*theirs.all_special_tokens}:
        return  # what transformers (5.23) makes up for some families where no tokenizer lies
    ours = AutoTokenizer.from_pretrained(text.tokenizer_dir, trust_remote_code=trust_remote_code)
    if theirs.get_vocab() != ours.get_vocab():
        raise ForgeError(
            f"the data was tokenized with another tokenizer than that of model {name}, so its "
            "numbers mean other words",
            fix,
        )


def require_causal(
    model: Any, what: str, length: int, fix_of_length: str, fix_of_failure: str
) -> None:
    """Raise ForgeError unless the model takes a block, and predicts each token from those before.

    Tried, since families that can be either (BERT, XLNet, ...) do not all say which they are.
    length: tokens in a block; fix_of_length: what to do where the model takes fewer, and
    fix_of_failure where it takes none.
    """
    tokens = torch.arange(length).remainder(model.get_input_embeddings().num_embeddings)
    changed = tokens.clone()
    changed[-1] = tokens[0]
    try:
        one, other = (logits_of(model, ids)[:-1] for ids in (tokens, changed))
    except Exception as error:  # whatever a family raises
        reason = one_line(error)
        try:
            logits_of(model, tokens[:2])
        except Exception:
            found = f"{what} fails in transformers ({reason})"
            raise ForgeError(found, fix_of_failure) from error
        found = f"{what} cannot take a block of {length} tokens ({reason})"
        raise BlockTooLong(found, fix_of_length) from error
    if one.isnan().any():
        raise ForgeError(f"{what} predicts nothing: its logits are no numbers", fix_of_failure)
    if not are_alike(one, other) and sees_ahead(model, tokens, changed):
        raise ForgeError(
            f"{what} sees the tokens that it should predict, so it is not a causal language model",
            "choose another family, such as gpt2, llama or qwen3",
        )


def are_alike(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether logits differ by rounding alone."""
    return torch.allclose(one, other, rtol=1e-4, atol=1e-5)


def sees_ahead(model: Any, tokens: torch.Tensor, changed: torch.Tensor) -> bool:
    """Whether it is seen once more, in float64, that another last token changes earlier logits.

    On a busy machine two forwards in float32 have been seen to differ that should not.
    """
    exact = copy.deepcopy(model).double()
    try:
        one, other = (logits_of(exact, ids)[:-1] for ids in (tokens, changed))
    except Exception:  # whatever a family raises that computes in float32 alone
        return True
    return not are_alike(one, other)


def logits_of(model: Any, tokens: torch.Tensor) -> torch.Tensor:
    """The model's logits for one text, (tokens, vocabulary); what it draws is always the same."""
    with in_trial(model), torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        logits: torch.Tensor = model(input_ids=tokens.unsqueeze(0), use_cache=False).logits
        return logits[0]


def require_memory(model_config: Any, processes_here: int) -> None:
    """Raise ForgeError when so many processes cannot train the model in this machine's memory."""
    if torch.accelerator.is_available():
        return  # the accelerator's own allocator reports this best
    try:
        with torch.device("meta"):
            parameters = AutoModelForCausalLM.from_config(model_config).num_parameters()
    except Exception:  # whatever a family raises
        return  # the build itself reports what cannot be built
    needed = parameters * TRAINING_BYTES_PER_PARAMETER * processes_here
    available = free_memory()
    if needed > available:
        raise ForgeError(
            f"a {model_config.model_type} of {parameters / 1e6:,.0f} M parameters needs about "
            f"{needed / 1e9:.1f} GB to train on this machine, {available / 1e9:.1f} GB are free",
            f"make it smaller with --depth or --config-overrides; it has {sizes_in(model_config)}",
        )
