"""What --config-overrides asks for: nested, in lists, of the text part, with what follows."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import build_model, new_model_config
from p2p_llm_forge.model.sizes import is_size_given, pairs_in, sizes_asked_for, value_of

SMALL = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}


def asked(family, **sizes):
    pairs = ",".join(f"{name}={size}" for name, size in sizes.items())
    return TrainConfig(model_type=family, config_overrides=pairs)


def test_commas_in_brackets_do_not_part():
    text = "a=1, b=[[x,y],2],c={p: 1,q: [2,3]},,d=(1,2)"
    assert pairs_in(text) == ["a=1", "b=[[x,y],2]", "c={p: 1,q: [2,3]}", "d=(1,2)"]
    assert pairs_in("a=],b=1") == ["a=]", "b=1"]


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("64", 64),
        ("1e-5", 1e-5),
        ("-1", -1),
        ("true", True),
        ("None", None),
        ("gelu", "gelu"),
        ("[full_attention,linear-attention]", ["full_attention", "linear-attention"]),
        ("[[[global,local],12]]", [[["global", "local"], 12]]),
        ("['a', null, false]", ["a", None, False]),
        ("{rope_type: default, rope_theta: 1e4}", {"rope_type": "default", "rope_theta": 1e4}),
        ("[1,2", "[1,2"),
    ],
)
def test_values_are_numbers_lists_dictionaries_or_words(text, value):
    assert value_of(text) == value


@pytest.mark.parametrize(
    ("given", "is_given"),
    [
        ({}, False),
        ({"config_overrides": "tie_word_embeddings=true, norm_eps=1e-6"}, False),
        ({"config_overrides": "hidden_size=64"}, True),
        ({"config_overrides": "tie_word_embeddings=true,num_key_value_heads=1"}, True),
        ({"depth": 2}, True),
        ({"model_type": "gpt2"}, True),
        ({"model_name": "gpt2"}, True),
    ],
)
def test_sizes_are_what_follows_from_the_depth(given, is_given):
    assert is_size_given(TrainConfig(**given)) is is_given


@pytest.mark.parametrize("family", ["gemma3", "llama4", "qwen3_5"])
def test_of_a_family_that_sees_too_the_text_part_is_built_by_either_name(text, family):
    sizes = {**SMALL, "intermediate_size": 48, "head_dim": 16}
    if family == "qwen3_5":
        sizes |= {"linear_num_key_heads": 2, "linear_num_value_heads": 2}
        sizes |= {"linear_key_head_dim": 8, "linear_value_head_dim": 8}
    if family == "llama4":
        sizes |= {"intermediate_size_mlp": 48, "num_local_experts": 2}
    bare = build_model(asked(family, **sizes), text)
    nested = {f"text_config.{name}": size for name, size in sizes.items()}
    assert bare.config.model_type == f"{family}_text"
    assert (bare.config.hidden_size, bare.config.num_hidden_layers) == (32, 2)
    same = build_model(asked(family, **nested), text)
    assert all(
        torch.equal(one, other)
        for one, other in zip(bare.parameters(), same.parameters(), strict=True)
    )


def test_what_is_deeper_inside_changes_alone(text):
    nested = asked("llama", **SMALL, **{"rope_parameters.rope_theta": 500})
    rope = new_model_config(nested, text).rope_parameters
    assert rope == {"rope_theta": 500, "rope_type": "default"}
    as_value = asked("llama", **SMALL, rope_parameters="{rope_theta: 500}")
    assert new_model_config(as_value, text).rope_parameters == rope


def test_a_part_that_is_a_configuration_takes_sizes_of_its_own(text):
    sizes = {"d_model": 32, "n_layers": 2, "n_heads": 2, "attn_config.clip_qkv": 6.5}
    config = new_model_config(asked("mpt", **sizes), text)
    assert config.attn_config.clip_qkv == 6.5 and config.d_model == 32


def test_a_list_has_an_item_for_every_layer(text):
    sizes = {"hidden_size": 32, "num_layers": 2, "num_heads": 2}
    sizes["attention_types"] = "[[[global,local],1]]"
    lm = build_model(asked("gpt_neo", **sizes), text)
    assert lm.config.attention_layers == ["global", "local"]


@pytest.mark.parametrize(("heads", "groups"), [(4, 1), (8, 2), (12, 3), (6, 1), (16, 8), (1, 1)])
def test_keys_are_shared_among_as_many_heads_as_there_are(text, heads, groups):
    """mistral has 32 heads of 8 groups by default."""
    sizes = {"hidden_size": 16 * heads, "num_attention_heads": heads}
    config = new_model_config(asked("mistral", **sizes), text)
    assert config.num_key_value_heads == groups
    given = asked("mistral", **sizes, num_key_value_heads=1)
    assert new_model_config(given, text).num_key_value_heads == 1


def test_layers_that_differ_are_no_number(text):
    """gemma4 and others have sizes that cannot be read of the whole (transformers 5)."""
    lm = build_model(asked("gemma4", **SMALL, intermediate_size=48, head_dim=16), text)
    assert lm.config.model_type == "gemma4_text"


@pytest.mark.parametrize(
    ("family", "overrides", "found", "fix"),
    [
        ("gemma3", "text_config.hiden_size=3", "a gemma3 has no 'text_config.hiden", "hidden_size"),
        ("gemma3", "vision_config.hidden_size=3", "has no 'vision_config.hidden_size'", ""),
        ("gemma3", "text_config.hidden_size=many", "is 'many'", "a number like 2304"),
        ("llama", "hidden_size.more=3", "a llama has no 'hidden_size.more'", ""),
        ("llama", "nothing.more=3", "a llama has no 'nothing.more'", ""),
        ("mllama", None, "transformers saves its text part as a mllama_text_model", "gpt2"),
        ("gemma4_assistant", None, "transformers has no configuration of its own", "gpt2"),
    ],
)
def test_what_is_not_there_is_refused_with_the_fix(family, overrides, found, fix):
    with pytest.raises(ForgeError) as error:
        sizes_asked_for(TrainConfig(model_type=family, config_overrides=overrides))
    (problem,) = error.value.problems
    assert found in problem.found and fix in problem.fix


def test_every_vocabulary_is_that_of_the_text(text):
    """A table for each layer of gemma4 has 262144 rows otherwise, and blt's parts 260 bytes."""
    assert new_model_config(asked("gemma4"), text).vocab_size_per_layer_input == 300
    blt = new_model_config(asked("blt", **{"patcher_config.intermediate_size": 64}), text)
    assert blt.patcher_config.vocab_size == blt.encoder_config.vocab_size == 300
    assert blt.patcher_config.intermediate_size == 64


def test_sizes_that_are_too_large_are_named_by_what_changes_them(text, monkeypatch):
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=10**9))
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    with pytest.raises(ForgeError) as error:
        build_model(asked("blt"), text)
    (problem,) = error.value.problems
    assert "to train on this machine" in problem.found
    assert "encoder_config.hidden_size=1024" in problem.fix


@pytest.mark.parametrize(
    ("family", "own_sizes", "name", "follows"),
    [
        ("hunyuan_v1_dense", {}, "head_dim", 16),  # transformers raises it to a power
        ("nemotron", {}, "num_key_value_heads", 2),
        ("gemma3n_text", {"hidden_size_per_layer_input": 8}, "num_kv_shared_layers", 0),
    ],
)
def test_what_follows_from_the_sizes_is_not_asked_for(text, family, own_sizes, name, follows):
    lm = build_model(asked(family, **SMALL, intermediate_size=48, **own_sizes), text)
    assert getattr(lm.config, name) == follows
    given = {"head_dim": 8, "num_key_value_heads": 1, "num_kv_shared_layers": 1}[name]
    sizes = {**SMALL, name: given}
    assert getattr(new_model_config(asked(family, **sizes), text), name) == given


def test_sizes_without_a_number_are_shown_and_can_be_given(text):
    sizes = {**SMALL, "intermediate_size": 48, "moe_intermediate_size": 16}
    with pytest.raises(ForgeError) as error:
        build_model(asked("dots1", **sizes), text)
    missing = ("n_routed_experts", "n_shared_experts", "num_experts_per_tok")
    assert all(f"{name}=None" in error.value.problems[0].fix for name in missing)
    build_model(asked("dots1", **sizes, **dict(zip(missing, (4, 1, 2), strict=True))), text)


def test_a_size_that_a_family_reads_and_does_not_keep_is_known(text):
    """gemma4 puts global_head_dim, which its published files have, into its layers' own sizes."""
    sizes = {**SMALL, "intermediate_size": 48, "head_dim": 16, "num_hidden_layers": 6}
    for asked_for in (32, 512):  # 512 is what it is by default
        config = new_model_config(asked("gemma4", **sizes, global_head_dim=asked_for), text)
        assert config.per_layer_config[5].head_dim == asked_for
        assert config.per_layer_config[0].head_dim == 16
    with pytest.raises(ForgeError, match="a gemma4 has no 'globl_head_dim'"):
        sizes_asked_for(asked("gemma4", globl_head_dim=32))


def test_a_family_that_must_have_a_token_of_padding_takes_the_rarest(text):
    config = new_model_config(asked("modernbert-decoder", **SMALL), text)
    assert config.pad_token_id == 299
    assert new_model_config(asked("llama", **SMALL), text).pad_token_id is None


def test_usual_names_mean_the_decoder_where_only_that_is_built(text):
    """BART's num_hidden_layers is that of its encoder."""
    lm = build_model(asked("bart", **SMALL, decoder_ffn_dim=48), text)
    assert len(lm.model.decoder.layers) == 2 and lm.config.decoder_attention_heads == 2
    given = new_model_config(asked("bart", **SMALL, decoder_layers=3), text)
    assert (given.decoder_layers, given.encoder_layers) == (3, 2)
