"""One dial: every depth gives sizes that go together, and models that transformers alone runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.model.document_mask import by_documents, document_mask_for
from p2p_llm_forge.model.fit import require_causal
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.model.shape import learning_rate_of, shape_of
from p2p_llm_forge.model.sizes import is_size_given
from p2p_llm_forge.model.unreached import freeze_unreached
from p2p_llm_forge.training.settle import settle
from tests.model.families import model_of

STRANGER = Path(__file__).with_name("stranger_logits.py")


@pytest.mark.parametrize("depth", range(1, 65))
def test_sizes_of_every_depth_go_together(depth):
    sizes, deeper = shape_of(depth), shape_of(depth + 1)
    assert sizes["num_hidden_layers"] == depth
    heads = sizes["num_attention_heads"]
    assert heads * sizes["head_dim"] == sizes["hidden_size"] and sizes["head_dim"] % 16 == 0
    assert heads % sizes["num_key_value_heads"] == 0
    assert 2 * sizes["hidden_size"] < sizes["intermediate_size"] < 5 * sizes["hidden_size"]
    assert deeper["hidden_size"] >= sizes["hidden_size"]
    for optimizer in ("adamw", "muon"):
        assert learning_rate_of(optimizer, depth + 1) <= learning_rate_of(optimizer, depth)
        assert 0 < learning_rate_of(optimizer, depth) < 0.1


def test_a_depth_is_all_that_a_model_needs(text):
    lm = build_model(TrainConfig(depth=4), text)
    config, wanted = lm.config, shape_of(4)
    assert config.model_type == "lfm2"
    head = wanted.pop("head_dim")
    assert config.hidden_size // config.num_attention_heads == head
    assert {name: getattr(config, name) for name in wanted} == wanted
    assert lm.model.layers[0].feed_forward.w1.out_features == wanted["intermediate_size"]


def test_the_first_token_of_a_vocabulary_is_learnt_like_others(text):
    """The family calls it padding: its embedding would stay zero."""
    embedding = build_model(TrainConfig(depth=1), text).get_input_embeddings()
    assert embedding.padding_idx is None and embedding.weight[0].any()


@pytest.mark.parametrize(
    ("depth", "kinds"), [(1, "a"), (2, "ca"), (3, "cca"), (4, "ccaa"), (8, "ccaccaca")]
)
def test_convolutions_come_before_attention(text, depth, kinds):
    config = build_model(TrainConfig(depth=depth, config_overrides="hidden_size=32"), text).config
    letters = {"conv": "c", "full_attention": "a"}
    assert "".join(letters[kind] for kind in config.layer_types) == kinds
    overrides = f"num_hidden_layers={depth},hidden_size=32"
    assert build_model(TrainConfig(config_overrides=overrides), text).config == config


@pytest.mark.parametrize(("width", "heads"), [(96, 3), (100, 2), (80, 2), (200, 2), (30, 1)])
def test_heads_share_any_even_width(text, width, heads):
    overrides = f"hidden_size={width}"
    config = build_model(TrainConfig(depth=1, config_overrides=overrides), text).config
    assert (config.hidden_size, config.num_attention_heads) == (width, heads)
    assert config.num_key_value_heads == heads


def test_layers_are_of_the_kinds_that_were_asked_for(text):
    """By either of the family's two names for it."""
    for overrides in ("full_attn_idxs=[0]", "layer_types=[full_attention,conv]"):
        asked = TrainConfig(depth=2, config_overrides=f"hidden_size=32,{overrides}")
        assert build_model(asked, text).config.layer_types == ["full_attention", "conv"]
        assert is_size_given(TrainConfig(config_overrides=overrides))


def test_a_size_that_the_default_has_no_more_names_the_family_that_has(text):
    with pytest.raises(
        ForgeError, match=r"'rms_norm_eps'\n.*norm_eps.*; or take a Qwen3"
    ) as raised:
        build_model(TrainConfig(depth=2, config_overrides="rms_norm_eps=0.5"), text)
    words = str(raised.value).partition("which has it: ")[2].split()
    fixed = TrainConfig(
        model_type=words[1], depth=int(words[3]), config_overrides="rms_norm_eps=0.5"
    )
    assert build_model(fixed, text).config.rms_norm_eps == 0.5


def test_the_default_keeps_its_convolutions_inside_documents_too(text):
    lm = build_model(TrainConfig(depth=2), text)
    assert document_mask_for(lm, text.eos_token_id).func is by_documents


def test_a_single_layer_that_has_no_room_for_both_kinds_is_one_of_a_qwen3(text):
    assert settle(TrainConfig(depth=1)).model_type == "qwen3"
    sizes = TrainConfig(depth=1, config_overrides="norm_eps=1e-6")  # a name of the other's
    assert settle(sizes).model_type == "lfm2"
    assert settle(TrainConfig(depth=2)).model_type == settle(TrainConfig()).model_type == "lfm2"
    config = build_model(TrainConfig(depth=2, model_type="qwen3"), text).config
    wanted = shape_of(2)
    assert {name: getattr(config, name) for name in wanted} == wanted


@pytest.mark.parametrize(
    "family", ["gpt2", "llama", "gpt_neox", "mistral", "gemma3_text", "nanochat", "opt", "phi"]
)
def test_a_depth_gives_other_families_their_sizes(text, family):
    lm = build_model(TrainConfig(depth=1, model_type=family), text)
    config = lm.config
    sizes = (config.num_hidden_layers, config.hidden_size, config.num_attention_heads)
    assert (config.model_type, *sizes) == (family, 1, 128, 2)
    assert sum(p.numel() for p in lm.parameters()) < 2_000_000


def test_single_sizes_win_over_the_depth_and_the_others_follow_them(text):
    overrides = "hidden_size=96,tie_word_embeddings=true"
    config = build_model(TrainConfig(depth=3, config_overrides=overrides), text).config
    assert (config.num_hidden_layers, config.hidden_size) == (3, 96)
    assert config.num_attention_heads == 3
    assert config.intermediate_size < 5 * 96 and config.tie_word_embeddings
    two = build_model(TrainConfig(depth=1, config_overrides="num_attention_heads=2"), text).config
    assert (two.num_attention_heads, two.num_key_value_heads) == (2, 2)


def test_names_of_gpt2_are_refused_with_a_fix_that_works(text):
    with pytest.raises(ForgeError) as refused:
        build_model(TrainConfig(config_overrides="n_layer=1,resid_pdrop=0.1"), text)
    layers, dropout = (problem.fix for problem in refused.value.problems)
    assert layers == "write num_hidden_layers=1, or take GPT-2 with --model-type gpt2"
    assert dropout == "take GPT-2 with --model-type gpt2"
    lm = build_model(TrainConfig(config_overrides="num_hidden_layers=1"), text)
    assert lm.config.num_hidden_layers == 1
    gpt2 = TrainConfig(model_type="gpt2", config_overrides="n_layer=1,resid_pdrop=0.1")
    assert build_model(gpt2, text).config.resid_pdrop == 0.1


def test_a_model_that_starts_at_zero_learns_in_all_its_parameters(text):
    """At first a layer adds nothing; no parameter is taken for one that no text reaches."""
    lm = build_model(TrainConfig(depth=2), text)
    zero = {name for name, p in lm.named_parameters() if p.dim() == 2 and not p.any()}
    parts = ("0.conv.out_proj", "0.feed_forward.w2", "1.self_attn.out_proj", "1.feed_forward.w2")
    assert zero == {f"model.layers.{part}.weight" for part in parts}
    start = {name: p.detach().clone() for name, p in lm.named_parameters()}
    loss = NextTokenLoss(lm).train()
    assert loss.head is not None  # its logits come in chunks
    assert freeze_unreached(loss, text.sequence_length) == 0
    optimizer = torch.optim.SGD(lm.parameters(), lr=1.0)
    draw = torch.Generator().manual_seed(1)
    for _ in range(3):
        tokens = torch.randint(300, (4, 33), generator=draw)
        nats, _ = loss(tokens[:, :-1], tokens[:, 1:])
        (nats / 128).backward()
        optimizer.step()
        optimizer.zero_grad()
    still = [name for name, p in lm.named_parameters() if torch.equal(p, start[name])]
    assert still == []


def test_how_attention_stays_inside_documents_is_found_with_weights_at_zero():
    """The logits of a model whose attention adds nothing do not show it."""
    lm = model_of("gpt2", hidden_size=32, num_hidden_layers=2, num_attention_heads=2, vocab_size=64)
    usual = document_mask_for(lm, 1)
    with torch.no_grad():
        for name, parameter in lm.named_parameters():
            if "attn.c_proj" in name:
                parameter.zero_()
    assert document_mask_for(lm, 1).func is usual.func


def test_a_model_that_sees_what_it_predicts_is_found_with_weights_at_zero():
    bert = model_of(
        **{"family": "bert", "hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64},
        **{"num_attention_heads": 2, "intermediate_size": 48, "is_decoder": False},
    )
    with torch.no_grad():
        for name, parameter in bert.named_parameters():
            if "attention.output.dense" in name:
                parameter.zero_()
    with pytest.raises(ForgeError, match="sees the tokens that it should predict"):
        require_causal(bert, "a bert", 16, "", "")


def test_transformers_alone_loads_what_is_saved_and_computes_the_same(text, tmp_path):
    lm = build_model(TrainConfig(depth=2), text).eval()
    with torch.no_grad():
        for parameter in lm.parameters():  # as if trained
            parameter.add_(0.02 * torch.randn(parameter.shape))
    tokens = torch.arange(32).unsqueeze(0)
    lm.save_pretrained(tmp_path / "model")
    subprocess.run([sys.executable, STRANGER, tmp_path / "model", tmp_path / "logits"], check=True)
    with torch.no_grad():
        own = lm(input_ids=tokens).logits
    assert own.std() > 0.01 and torch.equal(own, load_file(tmp_path / "logits")["logits"])
