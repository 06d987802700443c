"""A model as a GGUF file: the format of llama.cpp, which ollama and LM Studio read, too.

Sources: the specification (ggml/docs/gguf.md) and what llama.cpp's src/llama-model.cpp and
src/llama-vocab.cpp expect of each family. Four families and one kind of tokenizer, those that are
trained here, and compared with llama.cpp itself in tests; anything else is refused.
"""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch

from p2p_llm_forge.errors import ForgeError, Problems
from p2p_llm_forge.using.loading import LanguageModel

ROTARY = {"hidden_act": "silu", "attention_bias": False}
# What llama.cpp takes for granted in each family.
FIXED: dict[str, dict[str, Any]] = {
    "llama": {**ROTARY, "mlp_bias": False},
    "qwen3": {**ROTARY, "use_sliding_window": False},
    "lfm2": {},  # _require_lfm2
    "gpt2": {
        **{"activation_function": "gelu_new", "scale_attn_weights": True},
        **{"scale_attn_by_inverse_layer_idx": False, "add_cross_attention": False},
    },
}
BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "use_regex": True}
OTHERWISE = "convert it by convert_hf_to_gguf.py of llama.cpp, which knows many more"
LARGEST_F16 = 65504.0
ALWAYS_F32 = ".shortconv.conv.weight"  # llama.cpp convolves in float32 only


def write_gguf(model: LanguageModel, file: Path, title: str, as_f16: bool) -> None:
    """Write the model, in float32 on the CPU, and its tokenizer. as_f16: matrices take two bytes.

    Raises ForgeError for a family, tokenizer or weight that cannot be expressed.
    """
    config, rules = model.lm.config, json.loads(model.tokenizer.backend_tokenizer.to_str())
    problems = Problems()
    _require_family(config, problems)
    _require_byte_level(rules, problems)
    problems.raise_any()
    writer = gguf.GGUFWriter(file, config.model_type)
    writer.add_name(title)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_F16 if as_f16 else gguf.LlamaFileType.ALL_F32)
    _add_sizes(writer, model.lm)
    _add_tokenizer(writer, model, rules)
    for name, tensor in _tensors(model.lm):
        if as_f16 and tensor.ndim > 1 and not name.endswith(ALWAYS_F32):
            _require_f16(name, tensor)
            tensor = tensor.astype(np.float16)
        writer.add_tensor(name, tensor)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


# --- what cannot be expressed ---------------------------------------------------------------------


def require_exportable_family(config: Any) -> None:
    """Raise ForgeError unless models of this configuration can be written as GGUF."""
    problems = Problems()
    _require_family(config, problems)
    problems.raise_any()


def _require_family(config: Any, problems: Problems) -> None:
    family = config.model_type
    known = ", ".join(FIXED)
    problems.require(family in FIXED, f"the export knows {known}, this is a {family}", OTHERWISE)
    for name, value in FIXED.get(family, {}).items():
        found = getattr(config, name, value)
        problems.require(found == value, f"the {family} has {name}={found}", OTHERWISE)
    if family == "lfm2":
        _require_lfm2(config, problems)
    if family in ("llama", "qwen3", "lfm2"):
        rope = config.rope_parameters
        kind, share = rope.get("rope_type"), rope.get("partial_rotary_factor") or 1.0
        what = f"the {family} has rotary positions of type {kind} on {share:.0%} of a head"
        problems.require(kind == "default" and share == 1, what, OTHERWISE)


def _require_lfm2(config: Any, problems: Problems) -> None:
    """What llama.cpp fails to load or aborts on, whoever writes the file."""
    fix = "llama.cpp runs none such: train one by --model-type lfm2 --config-overrides"
    width, together = config.hidden_size, config.num_attention_heads * _head_width(config)
    kinds = {*config.layer_types}
    what = f"the lfm2 has layers of {' and '.join(sorted(kinds))} only"
    both = "llama.cpp runs none such: train one of both kinds by --depth 3"
    problems.require(kinds == {"conv", "full_attention"}, what, both)
    what = f"the lfm2 has conv_bias={config.conv_bias}"
    problems.require(not config.conv_bias, what, f"{fix} conv_bias=false")
    what = f"the lfm2 has conv_L_cache={config.conv_L_cache}"
    problems.require(config.conv_L_cache > 1, what, f"{fix} conv_L_cache=3")
    what = f"the lfm2 has hidden_size={width}, and heads of {together} together"
    problems.require(together == width, what, f"{fix} hidden_size={together}")


def _require_byte_level(rules: dict[str, Any], problems: Problems) -> None:
    """The tokenizer must be byte-level BPE with GPT-2's words, as prepare_data.py trains it."""
    bpe, words, after = rules["model"], rules["pre_tokenizer"] or {}, rules["post_processor"] or {}
    odd = [
        name for name in ("dropout", "unk_token", "byte_fallback", "ignore_merges") if bpe.get(name)
    ]
    odd += [name for name in ("continuing_subword_prefix", "end_of_word_suffix") if bpe.get(name)]
    odd += ["normalizer"] if rules["normalizer"] else []
    odd += ["post_processor"] if after.get("special_tokens") else []
    odd += ["pre_tokenizer"] if {**words, **BYTE_LEVEL} != words else []
    odd += ["added tokens"] if not all(one["special"] for one in rules["added_tokens"]) else []
    odd = ["model"] if bpe["type"] != "BPE" else odd
    found = f"the tokenizer is not a byte-level BPE as prepare_data.py trains it: {', '.join(odd)}"
    problems.require(not odd, found, OTHERWISE)


def _require_f16(name: str, tensor: np.ndarray) -> None:
    largest = float(np.abs(tensor).max())
    if not largest <= LARGEST_F16:
        raise ForgeError(
            f"{name} holds {largest:g}, which float16 cannot", "add --dtype f32 to the command"
        )


# --- what is written ------------------------------------------------------------------------------


def _add_sizes(writer: gguf.GGUFWriter, lm: Any) -> None:
    """The sizes of the model, by the names of GGUF."""
    config = lm.config
    heads, width = config.num_attention_heads, config.hidden_size
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(width)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_head_count(heads)
    writer.add_vocab_size(config.vocab_size)
    if config.model_type == "gpt2":
        writer.add_feed_forward_length(config.n_inner or 4 * width)
        writer.add_layer_norm_eps(config.layer_norm_epsilon)
        return
    if config.model_type == "lfm2":
        _add_sizes_of_lfm2(writer, lm)
    else:
        writer.add_feed_forward_length(config.intermediate_size)
        writer.add_head_count_kv(config.num_key_value_heads)
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    head = _head_width(config)
    writer.add_key_length(head)
    writer.add_value_length(head)
    writer.add_rope_dimension_count(head)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])


def _add_sizes_of_lfm2(writer: gguf.GGUFWriter, lm: Any) -> None:
    """Layers with no heads of keys are convolutions. block_auto_adjust_ff_dim may change a size."""
    config, inner = lm.config, lm.model.layers[0].feed_forward.w1
    heads = config.num_key_value_heads
    writer.add_feed_forward_length(inner.out_features)
    writer.add_head_count_kv([0 if kind == "conv" else heads for kind in config.layer_types])
    writer.add_layer_norm_rms_eps(config.norm_eps)
    writer.add_shortconv_l_cache(config.conv_L_cache)


def _head_width(config: Any) -> int:
    return getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads


def _add_tokenizer(writer: gguf.GGUFWriter, model: LanguageModel, rules: dict[str, Any]) -> None:
    """Words, merges and control tokens; rows of the embedding without a word are marked unused."""
    by_number = {number: word for word, number in model.tokenizer.get_vocab().items()}
    control = {one["id"] for one in rules["added_tokens"]}
    numbers = range(model.lm.config.vocab_size)
    kinds = gguf.TokenType

    def kind(number: int) -> gguf.TokenType:
        if number not in by_number:
            return kinds.UNUSED
        return kinds.CONTROL if number in control else kinds.NORMAL

    merges = rules["model"]["merges"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list([by_number.get(number, f"[PAD{number}]") for number in numbers])
    writer.add_token_types([kind(number) for number in numbers])
    writer.add_token_merges([m if isinstance(m, str) else " ".join(m) for m in merges])
    writer.add_add_bos_token(False)
    writer.add_add_eos_token(False)
    if model.tokenizer.bos_token_id is not None:
        writer.add_bos_token_id(model.tokenizer.bos_token_id)
    if model.ends:
        writer.add_eos_token_id(model.ends[0])
    if model.tokenizer.chat_template:
        writer.add_chat_template(model.tokenizer.chat_template)


def _tensors(lm: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Every weight by its name in GGUF, float32, laid out as llama.cpp computes with it."""
    config = lm.config
    architecture = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(architecture[config.model_type], config.num_hidden_layers)
    for name, tensor in lm.state_dict().items():
        if name == "lm_head.weight" and config.tie_word_embeddings:
            continue  # llama.cpp takes the embedding's
        known = names.get_name(name, try_suffixes=(".weight", ".bias"))
        if known is None:
            raise ForgeError(f"GGUF has no place for the weight {name}", OTHERWISE)
        yield known, _laid_out(name, tensor, config).contiguous().numpy()


def _laid_out(name: str, tensor: torch.Tensor, config: Any) -> torch.Tensor:
    layer = name.rpartition(".")[0].rpartition(".")[2]
    if config.model_type == "gpt2" and layer in ("c_attn", "c_proj", "c_fc") and tensor.dim() == 2:
        return tensor.T  # Conv1D of transformers: (inputs, outputs)
    if layer == "conv" and tensor.dim() == 3:
        return tensor.squeeze(1)  # one input for each output
    if config.model_type == "llama" and layer in ("q_proj", "k_proj"):
        heads = config.num_attention_heads if layer == "q_proj" else config.num_key_value_heads
        # transformers rotates the first half of a head with the second, llama.cpp neighbours.
        pairs = tensor.reshape(heads, 2, -1, tensor.shape[-1]).transpose(1, 2)
        return pairs.reshape(tensor.shape)
    return tensor
