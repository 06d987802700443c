"""What is said to be wrong with a model is fixed as it is said, to the letter; then it is built."""

from __future__ import annotations

import re
import shutil
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from transformers import (
    AutoTokenizer,
    GPT2Config,
    GPT2LMHeadModel,
    MambaConfig,
    MambaForCausalLM,
    RobertaConfig,
    RobertaForCausalLM,
)

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.tokenizer import train_tokenizer
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import build_model, load_model
from p2p_llm_forge.model.document_mask import document_mask_for
from p2p_llm_forge.model.dropout import add_dropout
from p2p_llm_forge.model.fit import require_memory
from p2p_llm_forge.model.optimizer import build_optimizer
from tests.runs import TINY

SMALL = "n_layer=1,n_head=2,n_embd=32"
CODEGEN = "n_embd=32,n_layer=2,n_head=4"
SMALL_LLAMA = "hidden_size=32,num_hidden_layers=1,intermediate_size=48"
# What was asked for, what the fix says, and what is asked for then.
ASKED = [
    ({"config_overrides": "n_embd=33,n_head=2"}, "value for n_embd or n_head,", SMALL),
    ({"config_overrides": "n_embd=33,n_head=2"}, "or leave it out", None),
    ({"config_overrides": "n_embd=33,n_head=2"}, "change its sizes with --config-ov", SMALL),
    ({"config_overrides": f"{SMALL},n_inner=0"}, "a size of 1 or more", f"{SMALL},n_inner=8"),
    (
        {"config_overrides": "activation_function=foo"},
        "give another value for activation_function, or leave it out",
        f"{SMALL},activation_function=relu",
    ),
    ({"config_overrides": "resid_pdrop=2"}, "another value for resid_pdrop", "resid_pdrop=0.2"),
    ({"config_overrides": "initializer_range=1e38"}, "or leave it out", SMALL),
    (
        {"model_type": "codegen", "config_overrides": CODEGEN},
        "it has n_embd=32, n_head=4, n_layer=2",
        f"{CODEGEN},rotary_dim=8",
    ),
    (
        {"model_type": "llama", "config_overrides": f"{SMALL_LLAMA},num_attention_heads=3"},
        "give another value for num_attention_heads, or leave num_attention_heads out",
        f"{SMALL_LLAMA},num_attention_heads=4",
    ),
    ({"config_overrides": "vocab_size=10"}, "leave vocab_size out, and it is taken", SMALL),
    ({"config_overrides": "n_embd"}, "write it like hidden_size=64,num_hidden_layers=2", SMALL),
    ({"config_overrides": f"{SMALL},dtype=foo"}, "leave it out; --mixed-precision bf16", SMALL),
    ({"config_overrides": f"{SMALL},hidden_size=32"}, "give it once", SMALL),
    ({"config_overrides": "n_emb=32"}, "did you mean n_embd?", SMALL),
    ({"config_overrides": "n_layer=one"}, "give a number like 12", "n_layer=12,n_embd=24"),
    (
        {"config_overrides": "tie_word_embeddings=maybe"},
        "give true or false",
        f"{SMALL},tie_word_embeddings=false",
    ),
    (
        {"config_overrides": f"{SMALL},bos_token_id=5000"},
        "leave bos_token_id out, or give one of 0 to 299",
        f"{SMALL},bos_token_id=299",
    ),
    ({"config_overrides": "n_layer=0"}, "(n_layer can be 1 to", "n_layer=1"),
]
FAMILIES = [
    ("gpt3", "did you mean gptj or gpt2 or"),
    ("mllama", "choose another family, such as gpt2, llama or qwen3"),
    ("gemma4_assistant", "choose another family, such as gpt2, llama or qwen3"),
    ("xlnet", "choose another family, such as gpt2, llama or qwen3"),
]


def fix_of(act, *of):
    with pytest.raises(ForgeError) as refused:
        act(*of)
    (problem,) = refused.value.problems
    return problem.fix


@pytest.mark.parametrize(("asked", "fix", "then"), ASKED, ids=range(len(ASKED)))
def test_the_fix_of_sizes_makes_a_model(text, asked, fix, then):
    asked = {"model_type": "gpt2", **asked}
    assert fix in fix_of(build_model, TrainConfig(**asked), text)
    assert build_model(TrainConfig(**{**asked, "config_overrides": then}), text)


def test_the_fix_of_muon_without_matrices_is_adamw(text):
    asked = TrainConfig(
        model_type="gpt2", config_overrides="n_layer=1,n_head=1,n_embd=1", optimizer="muon"
    )
    model = build_model(asked, text)
    assert fix_of(build_optimizer, asked, model) == "use --optimizer adamw"
    assert build_optimizer(replace(asked, optimizer="adamw"), model)


def test_the_fix_of_a_dropout_is_the_familys_own(text):
    asked = TrainConfig(model_type="gpt2", config_overrides=SMALL)
    model = build_model(asked, text)
    fix = fix_of(add_dropout, model, 0.2)
    own = re.search(r"^leave it out; .*--config-overrides (\S+)$", fix)[1]
    add_dropout(model, 0)
    model = build_model(replace(asked, config_overrides=f"{SMALL},{own}"), text)
    assert [one.p for one in model.modules() if isinstance(one, torch.nn.Dropout)] == [0.2] * 4
    bare = build_model(
        TrainConfig(
            model_type="gpt_neox",
            config_overrides="hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=48",
        ),
        text,
    )
    assert fix_of(add_dropout, bare, 0.2).startswith("leave it out")


@pytest.mark.parametrize(("family", "fix"), FAMILIES, ids=str)
def test_the_fix_of_a_family_is_another_one(text, family, fix):
    small = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2"
    own = "d_model=32,n_layer=1,n_head=2,d_inner=64" if family == "xlnet" else None
    assert fix in fix_of(build_model, TrainConfig(model_type=family, config_overrides=own), text)
    for other in ("gpt2", "llama", "qwen3"):
        sizes = small + ("" if other == "gpt2" else ",intermediate_size=48,num_key_value_heads=1")
        assert build_model(TrainConfig(model_type=other, config_overrides=sizes), text)


def test_the_fix_of_a_block_that_is_too_long_is_a_shorter_one(text):
    asked = TrainConfig(model_type="gpt2", config_overrides=f"{SMALL},n_positions=16")
    (length,) = re.findall(
        r"^prepare the data with --sequence-length (\d+) or less", fix_of(build_model, asked, text)
    )
    assert build_model(asked, replace(text, sequence_length=int(length)))


def test_the_fix_of_too_little_memory_is_a_smaller_model(text, monkeypatch):
    """What is free comes from a stand-in, between what a small model needs and a large one."""
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=5_000_000))
    fix = fix_of(build_model, TrainConfig(), text)
    assert "make it smaller with --depth or --config-overrides" in fix
    model = build_model(TrainConfig(**TINY), text)
    require_memory(model.config, 1)


def saved(folder, tokenizer=None, **sizes):
    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "vocab_size": 300, "n_positions": 64, **sizes}
    GPT2LMHeadModel(GPT2Config(**sizes)).save_pretrained(folder)
    if tokenizer is not None:
        tokenizer.save_pretrained(folder)
    return str(folder)


def test_the_fixes_of_a_folder_that_is_no_whole_model_are_one_that_is(text, tmp_path):
    from safetensors.torch import load_file, save_file

    whole = saved(tmp_path / "whole")
    assert fix_of(load_model, "./nowhere", text) == "give the folder of a model"
    assert load_model(whole, text)
    damaged = tmp_path / "damaged"
    shutil.copytree(whole, damaged)
    file = damaged / "model.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    fix = fix_of(load_model, str(damaged), text)
    assert fix == "copy or download the whole model again: config.json and every file of weights"
    shutil.copytree(whole, damaged, dirs_exist_ok=True)
    assert load_model(str(damaged), text)
    tensors = load_file(file)
    del tensors["transformer.h.0.mlp.c_fc.weight"]
    save_file(tensors, file, {"format": "pt"})
    assert "give a folder that holds them all" in fix_of(load_model, str(damaged), text)


def test_the_fix_of_other_words_is_the_models_own_tokenizer(text, tmp_path):
    other = train_tokenizer(["other words entirely"] * 3, 280)
    for name, size in (("small", 280), ("same size", 300)):
        folder = saved(tmp_path / name, other, vocab_size=size)
        fix = fix_of(load_model, folder, text)
        (of_model,) = re.findall(r"own tokenizer: prepare_data.py --tokenizer (.*) \.\.\.", fix)
        words = AutoTokenizer.from_pretrained(of_model)
        assert load_model(folder, replace(text, vocab_size=len(words), tokenizer_dir=of_model))


def test_the_fix_of_a_loaded_model_with_few_positions_is_a_shorter_block(text, tmp_path):
    """RoBERTa keeps two positions for itself, which its configuration does not say."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "vocab_size": 300}
    few = RobertaConfig(**sizes, intermediate_size=48, max_position_embeddings=32, is_decoder=True)
    RobertaForCausalLM(few).save_pretrained(tmp_path)
    assert fix_of(load_model, str(tmp_path), text) == (
        "prepare the data with a smaller --sequence-length"
    )
    assert load_model(str(tmp_path), replace(text, sequence_length=30))


def test_the_fix_of_a_family_that_cannot_mask_documents_is_another_one():
    small = {"hidden_size": 32, "num_hidden_layers": 1, "vocab_size": 64}
    mamba = MambaForCausalLM(MambaConfig(**small, state_size=4))
    assert fix_of(document_mask_for, mamba, 1) == "leave the flag out, or train another family"
    assert document_mask_for(GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32)), 1)
