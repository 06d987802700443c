"""What a model from scratch is asked to be: its family, and sizes other than the family's own."""

from __future__ import annotations

import ast
import re
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, Problems, nearest

# A string in quotes (the group), or a word without.
WORD = re.compile(r"""('[^']*'|"[^"]*")|(?<![\w.])[A-Za-z_][\w-]*""")
WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def sizes_asked_for(config: TrainConfig) -> tuple[Any, dict[str, Any]]:
    """The family's own configuration, and what `--config-overrides` changes of it.

    Of a family that reads more than text, both are of its text part; `text_config.hidden_size` and
    `hidden_size` mean the same there. Sizes deeper inside are dictionaries in dictionaries. Raises
    ForgeError for a family or size that does not exist.
    """
    family = config.model_type or "gpt2"
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fix = nearest(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ForgeError(f"--model-type {family}: no such family of models", fix)
    part, defaults = text_part(family)
    overrides: dict[str, Any] = {}
    problems = Problems()
    for pair in pairs_in(config.config_overrides or ""):
        key, _, value = map(str.strip, pair.partition("="))
        if not value:
            found = f"--config-overrides: '{pair}' is not KEY=VALUE"
            problems.require(False, found, "write it like hidden_size=64,num_hidden_layers=2")
            continue
        path = key.removeprefix(f"{part}.").split(".")
        own, known = default_at(defaults, path)
        found = f"--config-overrides: a {family} has no '{key}'"
        fix = nearest(path[-1], known) if known else f"{path[0]} holds no sizes: leave it out"
        problems.require(path[-1] in known, found, fix)
        size = value_of(value)
        is_number = isinstance(size, int | float) or not isinstance(own, int | float)
        found = f"--config-overrides: {key} is '{value}'"
        problems.require(is_number, found, f"give a number like {own}")
        merge(overrides, path, size)
    problems.raise_any()
    return defaults, overrides


def text_part(family: str) -> tuple[str, Any]:
    """The name and the default configuration of the part that is the causal language model.

    The name is empty where that is all of it. Raises ForgeError where there is no such part.
    """
    fix = "choose another family, such as gpt2, llama or qwen3"
    try:
        whole = AutoConfig.for_model(family)
    except Exception as error:  # whatever a family's own checks raise
        found = f"--model-type {family}: transformers has no configuration of its own for it"
        raise ForgeError(f"{found} ({one_line(error)})", fix) from error
    text = whole.get_text_config(decoder=True)
    name = next((name for name in whole.sub_configs if getattr(whole, name, None) is text), "")
    if not name:
        return "", whole
    if text.model_type not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        raise ForgeError(
            f"--model-type {family}: transformers saves its text part as a {text.model_type}, and"
            " loads no causal language model of that type",
            fix,
        )
    return name, text


def pairs_in(text: str) -> list[str]:
    """The pieces between the commas, but for commas in brackets; empty ones left out."""
    depth, pairs = 0, [""]
    for letter in text:
        depth += (letter in "[{(") - (letter in "]})")
        if letter == "," and depth <= 0:
            pairs.append("")
        else:
            pairs[-1] += letter
    return [pair.strip() for pair in pairs if pair.strip()]


def value_of(text: str) -> Any:
    """The number, list, dictionary or word that is written; words in lists may go unquoted."""
    quoted = text
    if text[:1] in tuple("[{("):
        quoted = WORD.sub(lambda w: w[1] or WORDS.get(w[0].lower(), repr(w[0])), text)
    for literal in (WORDS.get(text.lower(), text), quoted):
        try:
            return ast.literal_eval(literal)
        except (ValueError, SyntaxError):
            continue
    return text


def names_in(part: Any) -> set[str]:
    """The sizes that a configuration has, also by their usual names."""
    if isinstance(part, dict):
        return {*part}
    return {*part.to_dict(), *getattr(part, "attribute_map", {})}


def size_of(part: Any, name: str) -> Any:
    """The size by this name in a configuration; None without one."""
    if isinstance(part, dict):
        return part.get(name)
    try:
        return getattr(part, name, None)
    except RuntimeError:  # AmbiguousGlobalPerLayerAttributeError: some layers have their own
        return part.to_dict().get(name)


def default_at(defaults: Any, path: list[str]) -> tuple[Any, set[str]]:
    """What stands at a path of names, and which names there are beside it."""
    part = defaults
    for name in path[:-1]:
        inside = size_of(part, name)
        if inside is None and not isinstance(part, dict) and name not in names_in(part):
            return None, set()
        part = {} if inside is None else inside
    if isinstance(part, dict):  # may hold more than it does by default
        return part.get(path[-1]), {*part, path[-1]}
    if not hasattr(part, "to_dict"):
        return None, set()
    return size_of(part, path[-1]), names_in(part)


def merge(sizes: dict[str, Any], path: list[str], size: Any) -> None:
    """Put a size at a path of names."""
    for name in path[:-1]:
        inside = sizes.setdefault(name, {})
        if not isinstance(inside, dict):
            inside = sizes[name] = {}
        sizes = inside
    sizes[path[-1]] = size


def vocabularies(defaults: Any, vocab_size: int) -> dict[str, Any]:
    """The sizes that are to be those of the vocabulary, in parts too that read the same tokens."""
    sizes: dict[str, Any] = {"vocab_size": vocab_size}
    sizes |= {name: vocab_size for name in names_in(defaults) if name.startswith("vocab_size")}
    own = size_of(defaults, "vocab_size")
    for name in defaults.sub_configs or {}:
        if own is not None and size_of(size_of(defaults, name), "vocab_size") == own:
            sizes[name] = {"vocab_size": vocab_size}
    return sizes


def combined(sizes: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    """The sizes with what changes of them; dictionaries in dictionaries alike."""
    result = {**sizes}
    for name, size in changes.items():
        before = sizes.get(name)
        is_inside = isinstance(size, dict) and isinstance(before, dict)
        result[name] = combined(before, size) if is_inside and before is not None else size
    return result


def completed(defaults: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """`sizes` by the family's own names, with what follows from them.

    Dictionaries keep what is not changed in them. Where the family shares keys among so many heads
    that they cannot be those that were asked for, as many as can.
    """
    own_name = getattr(defaults, "attribute_map", {})
    sizes = {own_name.get(name, name): size for name, size in sizes.items()}
    for name, size in sizes.items():
        default = size_of(defaults, name)
        if isinstance(size, dict) and isinstance(default, dict):
            sizes[name] = combined(default, size)
    shared = own_name.get("num_key_value_heads", "num_key_value_heads")
    heads = sizes.get(own_name.get("num_attention_heads", "num_attention_heads"))
    groups = size_of(defaults, shared)
    if shared not in sizes and isinstance(heads, int) and isinstance(groups, int) and heads > 0:
        sizes[shared] = next(n for n in range(min(heads, max(1, groups)), 0, -1) if heads % n == 0)
    return sizes


def sizes_in(model_config: Any) -> str:
    """The sizes of which some are too large or do not go together, for a person to look through."""
    return ", ".join(f"{name}={size}" for name, size in sorted(sizes_of(model_config.to_dict())))


def sizes_of(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, int]]:
    """The sizes in a configuration and its parts, by the names that --config-overrides takes."""
    is_size = re.compile("size|dim|rank|head|layer|group|experts|top_?k|expand|width|embd|(^|_)d_")
    sizes = []
    for name, value in settings.items():
        if isinstance(value, dict):
            sizes += sizes_of(value, f"{prefix}{name}.")
        elif type(value) is int and value > 1 and is_size.search(name):
            sizes.append((f"{prefix}{name}", value))
    return sizes


def one_line(error: BaseException) -> str:
    """What an error of a library says, on one line that is not too long."""
    text = " ".join(str(error).split())
    if " " not in text:  # the key of a KeyError
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:300]}..."
