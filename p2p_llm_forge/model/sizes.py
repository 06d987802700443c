"""What a model from scratch is asked to be: its family, and sizes other than the family's own."""

from __future__ import annotations

import ast
import re
from typing import Any

from transformers import AutoConfig
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, Problems, nearest
from p2p_llm_forge.model.shape import (
    DEPTH,
    FAMILY,
    WITHOUT_CONVOLUTIONS,
    shape_of,
    sizes_of_family,
)

# A string in quotes (the group), or a word without.
WORD = re.compile(r"""('[^']*'|"[^"]*")|(?<![\w.])[A-Za-z_][\w-]*""")
# The sizes that every family has, and the largest that can be meant.
MOST = {
    **{"num_hidden_layers": 10_000, "num_attention_heads": 2**20, "num_key_value_heads": 2**20},
    **{"hidden_size": 2**31, "vocab_size": 2**31, "max_position_embeddings": 2**31},
}
# What no override changes, and what to do instead: each makes another kind of model or training.
TYPE = "leave it out; --model-type llama, for example, takes another family"
DTYPE = "leave it out; --mixed-precision bf16 computes with fewer bits"
CAUSAL = "leave it out: a causal language model is trained"
NO_SIZES = {
    **{"model_type": TYPE, "architectures": TYPE, "torch_dtype": DTYPE, "dtype": DTYPE},
    **dict.fromkeys(("is_encoder_decoder", "add_cross_attention", "problem_type"), CAUSAL),
}
SPECIAL = ("pad_token_id", "bos_token_id", "eos_token_id")
KINDS_OF_LAYERS = ("layer_types", "full_attn_idxs")
WORDS = {"true": "True", "false": "False", "none": "None", "null": "None"}


def sizes_asked_for(config: TrainConfig) -> tuple[Any, dict[str, Any]]:
    """The family's own configuration, and what `--config-overrides` changes of it.

    Of a family that reads more than text, both are of its text part; `text_config.hidden_size` and
    `hidden_size` mean the same there. Sizes deeper inside are dictionaries in dictionaries. Raises
    ForgeError for a family or size that does not exist.
    """
    family = config.model_type or FAMILY
    if family not in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        fix = nearest(family, MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)
        raise ForgeError(f"--model-type {family}: no such family of models", fix)
    part, defaults = text_part(family)
    overrides: dict[str, Any] = {}
    seen: set[str] = set()
    problems = Problems()
    for pair in pairs_in(config.config_overrides or ""):
        key, _, value = map(str.strip, pair.partition("="))
        if not value:
            found = f"--config-overrides: '{pair}' is not KEY=VALUE"
            problems.require(False, found, "write it like hidden_size=64,num_hidden_layers=2")
            continue
        path = key.removeprefix(f"{part}.").split(".")
        found = f"--config-overrides: {key}={value} is no size of a {family}"
        problems.require(path[-1] not in NO_SIZES, found, NO_SIZES.get(path[-1], ""))
        if path[-1] in NO_SIZES:
            continue
        name = ".".join([getattr(defaults, "attribute_map", {}).get(path[0], path[0]), *path[1:]])
        found = f"--config-overrides: {key} is given twice"
        problems.require(name not in seen, found, "give it once (some sizes have two names)")
        seen.add(name)
        own, known = default_at(defaults, path)
        found = f"--config-overrides: a {family} has no '{key}'"
        fix = nearest(path[-1], known) if known else f"{path[0]} holds no sizes: leave it out"
        fix = fix_of_gpt2(key, value, known) or fix
        if family == FAMILY and path[-1] in names_in(AutoConfig.for_model(WITHOUT_CONVOLUTIONS)):
            depth = config.depth or DEPTH
            fix += f"; or take a Qwen3, which has it: --model-type qwen3 --depth {depth}"
        size = value_of(value)
        is_known = path[-1] in known or (len(path) == 1 and is_read(defaults, key, size))
        problems.require(is_known, found, fix)
        is_number = isinstance(size, int | float) or not isinstance(own, int | float)
        found = f"--config-overrides: {key} is '{value}'"
        fix = "give true or false" if isinstance(own, bool) else f"give a number like {own}"
        problems.require(is_number, found, fix)
        merge(overrides, path, size)
    problems.raise_any()
    return defaults, overrides


def is_size_given(config: TrainConfig) -> bool:
    """Whether the user has chosen how large the model is.

    By a model to load, a family with sizes of its own, a depth, or some of what else would follow
    from the depth.
    """
    from_depth = {*shape_of(DEPTH), *KINDS_OF_LAYERS}
    if config.model_name or config.model_type or config.depth:
        return True
    return not sizes_asked_for(config)[1].keys().isdisjoint(from_depth)


def fix_of_gpt2(key: str, value: str, known: set[str]) -> str:
    """What to do about a size by GPT-2's name of it, which another family lacks; else nothing."""
    gpt2 = AutoConfig.for_model("gpt2")
    if key not in names_in(gpt2):
        return ""
    usual = next((name for name, own in gpt2.attribute_map.items() if own == key), None)
    here = f"write {usual}={value}, or " if usual in known else ""
    return f"{here}take GPT-2 with --model-type gpt2"


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


def require_tokens(overrides: dict[str, Any], vocab_size: int) -> None:
    """Raise ForgeError for a special token of `--config-overrides` outside the vocabulary."""
    problems = Problems()
    for name in SPECIAL:
        token = overrides.get(name)
        tokens = token if isinstance(token, list) else [token]  # some families end on several
        is_token = all(type(one) is int and 0 <= one < vocab_size for one in tokens)
        found = f"--config-overrides: {name} is {token}, the vocabulary has {vocab_size} tokens"
        fix = f"leave {name} out, or give one of 0 to {vocab_size - 1}"
        problems.require(token is None or is_token, found, fix)
    problems.raise_any()


def require_sizes(model_config: Any, where: str, fix: str) -> None:
    """Raise ForgeError unless the sizes that every family has can be those of a model at all.

    transformers builds models without layers or heads, and a hundred million layers for hours.
    """
    problems, text = Problems(), model_config.get_text_config(decoder=True)
    sizes = text.to_dict()  # xlnet has a property of -1 for its positions
    try:
        defaults = type(text)()  # where -1 or 0 may mean: no limit, or none of these
    except Exception:  # whatever a family raises that needs further sizes
        defaults = None
    for name, most in MOST.items():
        own = getattr(text, "attribute_map", {}).get(name, name)
        size = sizes.get(own)
        is_possible = not isinstance(size, int) or 0 < size <= most  # a list is for each layer
        is_possible = is_possible or size == size_of(defaults, name)
        can_be = f"{fix} ({own} can be 1 to {most:,})"
        problems.require(is_possible, f"{own} is {size} {where}", can_be)
    problems.raise_any()


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


def is_read(defaults: Any, name: str, size: Any) -> bool:
    """Whether a family reads a size that it does not keep, as gemma4 does with global_head_dim."""
    own = {key: value for key, value in defaults.to_dict().items() if key != name}
    for tried in (size, 2 * size) if isinstance(size, int) else (size,):
        try:
            changed = type(defaults)(**{name: tried}).to_dict()
        except Exception:  # whatever a family's own checks raise
            continue
        if {key: value for key, value in changed.items() if key != name} != own:
            return True
    return False


def refused_alone(defaults: Any, overrides: dict[str, Any]) -> list[str]:
    """The sizes that a family refuses, each for itself."""
    refused = []
    for name, size in overrides.items():
        try:
            type(defaults)(**{name: size})
        except Exception:  # whatever a family's own checks raise
            refused.append(name)
    return refused


def below_1(defaults: Any, overrides: dict[str, Any], prefix: str = "") -> list[str]:
    """The numbers below 1 that a family does not have by default, by the names that were typed."""
    found = []
    for name, size in overrides.items():
        own = size_of(defaults, name)
        if isinstance(size, dict):
            found += below_1(own, size, f"{prefix}{name}.")
        elif type(size) is int and size < 1 and size != own:
            found.append(f"{prefix}{name}")
    return found


def merge(sizes: dict[str, Any], path: list[str], size: Any) -> None:
    """Put a size at a path of names."""
    for name in path[:-1]:
        inside = sizes.setdefault(name, {})
        if not isinstance(inside, dict):
            inside = sizes[name] = {}
        sizes = inside
    sizes[path[-1]] = size


def vocabularies(defaults: Any, vocab_size: int) -> dict[str, int]:
    """The sizes that are to be those of the vocabulary."""
    names = [name for name in names_in(defaults) if name.startswith("vocab_size")]
    return dict.fromkeys(["vocab_size", *names], vocab_size)


def share_vocabulary(defaults: Any, model_config: Any) -> None:
    """Give the parts that read the same tokens as the model (by default) the same vocabulary."""
    own = size_of(defaults, "vocab_size")
    for name in model_config.sub_configs or {}:
        part = size_of(model_config, name)
        if own is not None and size_of(part, "vocab_size") == own:
            part.vocab_size = model_config.vocab_size


def padding(defaults: Any, vocab_size: int) -> int | None:
    """The family's token of padding where the vocabulary has it, else none.

    A family that must have one takes the last token: its embedding is not trained, and the last
    merge of a tokenizer is the rarest.
    """
    own = size_of(defaults, "pad_token_id")
    field = getattr(defaults, "__dataclass_fields__", {}).get("pad_token_id")
    if own is None or own < vocab_size or field is None:
        return own if (own or 0) < vocab_size else None
    return None if "None" in str(field.type) else vocab_size - 1


def sizes_by_depth(defaults: Any, depth: int, overrides: dict[str, Any]) -> dict[str, Any]:
    """The sizes that follow from `--depth`, as far as the family has them.

    Heads and feed-forward follow from the width, also from one in `overrides`.
    """
    own, asked = getattr(defaults, "attribute_map", {}), by_own_names(defaults, overrides)

    def given(name: str) -> int | None:
        size = asked.get(own.get(name, name))
        return size if type(size) is int and size > 0 else None

    shape = shape_of(depth, given("hidden_size"), given("num_attention_heads"))
    layers = given("num_hidden_layers") or depth
    shape |= sizes_of_family(defaults.model_type, shape, layers)
    if not asked.keys().isdisjoint(KINDS_OF_LAYERS):
        shape.pop(KINDS_OF_LAYERS[0], None)
    return {name: size for name, size in shape.items() if name in names_in(defaults)}


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

    Dictionaries keep what is not changed in them. Where heads or layers share more than were asked
    for, it is shared among those; a head size that the family leaves open is width over heads.
    """
    own_name = getattr(defaults, "attribute_map", {})
    sizes = by_own_names(defaults, sizes)
    for name, size in sizes.items():
        default = size_of(defaults, name)
        if isinstance(size, dict) and isinstance(default, dict):
            sizes[name] = combined(default, size)

    def number(name: str) -> int:
        """0 where there is none."""
        size = sizes.get(own_name.get(name, name), size_of(defaults, name))
        return size if type(size) is int and size > 0 else 0

    names, heads = names_in(defaults), number("num_attention_heads")
    groups = own_name.get("num_key_value_heads", "num_key_value_heads")
    if groups in names - {*sizes} and heads:
        sizes[groups] = groups_of(heads, size_of(defaults, groups), default_heads(defaults))
    if "head_dim" in names - {*sizes} and size_of(defaults, "head_dim") is None and heads:
        width = number("hidden_size")
        sizes |= {"head_dim": width // heads} if width and width % heads == 0 else {}
    if "num_kv_shared_layers" in names - {*sizes} and number("num_hidden_layers"):
        part = number("num_kv_shared_layers") / size_of(defaults, "num_hidden_layers")
        sizes["num_kv_shared_layers"] = int(part * number("num_hidden_layers"))
    return sizes


def by_own_names(defaults: Any, sizes: dict[str, Any]) -> dict[str, Any]:
    """The sizes by the family's own names.

    BART and its kin take the usual names for their encoder's: their decoder, which is built, has
    those sizes too.
    """
    own_name, names, result = getattr(defaults, "attribute_map", {}), names_in(defaults), {}
    for name, size in sizes.items():
        own = own_name.get(name, name)
        of_decoder = own.replace("encoder", "decoder")
        if own not in (name, of_decoder) and of_decoder in names - {*sizes}:
            result[of_decoder] = size
        result[own] = size
    return result


def default_heads(defaults: Any) -> int:
    heads = size_of(defaults, "num_attention_heads")
    return heads if type(heads) is int else 0


def groups_of(heads: int, default: Any, default_heads: int) -> int:
    """How many keys and values the heads share: as the family has it, else in its proportion."""
    if type(default) is not int or default < 1:
        return heads
    if heads > default and heads % default == 0:
        return default
    most = max(1, heads * default // max(default, default_heads))
    return next(groups for groups in range(most, 0, -1) if heads % groups == 0)


def sizes_in(model_config: Any) -> str:
    """The sizes of which some are too large or do not go together, for a person to look through."""
    return ", ".join(f"{name}={size}" for name, size in sorted(sizes_of(model_config.to_dict())))


def sizes_of(settings: dict[str, Any], prefix: str = "") -> list[tuple[str, int | None]]:
    """The sizes in a configuration and its parts, by the names that --config-overrides takes."""
    is_size = re.compile("size|dim|rank|head|layer|group|experts|top_?k|expand|width|embd|(^|_)d_")
    sizes = []
    for name, value in settings.items():
        if isinstance(value, dict):
            sizes += sizes_of(value, f"{prefix}{name}.")
        elif is_size.search(str(name)) and (value is None or (type(value) is int and value > 1)):
            sizes.append((f"{prefix}{name}", value))
    return sizes


def one_line(error: BaseException) -> str:
    """What an error of a library says, on one line that is not too long."""
    text = " ".join(str(error).split())
    if " " not in text:  # the key of a KeyError
        text = f"{type(error).__name__}: {text}"
    return text if len(text) <= 300 else f"{text[:300]}..."
