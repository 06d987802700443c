"""Models from scratch have the sizes that were asked for; loaded ones must fit the data."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model import shape
from p2p_llm_forge.model.build import build_model, load_model
from p2p_llm_forge.model.sizes import sizes_asked_for
from tests.runs import TINY


def test_the_default_is_a_small_lfm2_that_fits_the_text(text):
    lm = build_model(TrainConfig(), text)
    assert lm.config.model_type == "lfm2"
    assert lm.config.num_hidden_layers == shape.DEPTH
    assert lm.config.vocab_size == 300
    assert lm.config.max_position_embeddings == 32
    assert lm.config.eos_token_id == text.eos_token_id
    assert {p.dtype for p in lm.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", ["llama", "qwen3", "gpt_neox", "opt"])
def test_families_are_built_with_the_sizes_that_were_asked_for(text, family):
    overrides = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2"
    if family in ("llama", "qwen3"):
        overrides += ",intermediate_size=48,num_key_value_heads=1"
    if family == "opt":
        overrides += ",ffn_dim=48,word_embed_proj_dim=32"
    lm = build_model(TrainConfig(model_type=family, config_overrides=overrides), text)
    assert lm.config.model_type == family
    assert (lm.config.hidden_size, lm.config.num_hidden_layers) == (32, 2)
    assert lm.get_input_embeddings().num_embeddings == 300
    tokens = torch.zeros(1, text.sequence_length, dtype=torch.int64)
    assert lm(input_ids=tokens).logits.shape[-1] == 300


def test_initial_weights_depend_on_the_seed_alone(text):
    def weights(seed):
        torch.rand(seed + 1)
        lm = build_model(TrainConfig(**TINY, seed=seed), text)
        return torch.cat([p.flatten() for p in lm.parameters()])

    assert torch.equal(weights(1), weights(1))
    assert not torch.equal(weights(1), weights(2))


def test_no_pickle_is_read_of_a_checkpoint(text, tmp_path):
    lm = build_model(TrainConfig(**TINY), text)
    lm.save_pretrained(tmp_path)
    assert load_model(str(tmp_path), text, is_ours=True)
    (tmp_path / "model.safetensors").rename(tmp_path / "model-x.safetensors")
    torch.save(lm.state_dict(), tmp_path / "pytorch_model.bin")
    assert load_model(str(tmp_path), text), "the user's own may be pickled"
    with pytest.raises(ForgeError, match="no file named model.safetensors"):
        load_model(str(tmp_path), text, is_ours=True)


@pytest.mark.parametrize(
    ("settings", "found", "fix"),
    [
        ({"model_type": "lama"}, "--model-type lama: no such family", "did you mean llama"),
        ({"config_overrides": "n_layers=2"}, "has no 'n_layers'", "did you mean n_layer"),
        ({"config_overrides": "n_layer=two"}, "n_layer is 'two'", "give a number like 12"),
        ({"config_overrides": "n_layer"}, "'n_layer' is not KEY=VALUE", "hidden_size=64"),
        ({"config_overrides": "n_embd=10,n_head=3"}, "cannot build this gpt2", "change"),
        ({"config_overrides": "n_inner=0"}, "n_inner=0 fails", "give n_inner a size of 1 or more"),
        ({"config_overrides": "n_layer=1,n_inner=-5"}, "cannot build", "or leave n_inner out"),
        (
            {"config_overrides": "n_head=2,pad_token_id=word"},
            "'word'",
            "value for pad_token_id, or",
        ),
        ({"config_overrides": "vocab_size=10"}, "the data has 300 tokens", "leave vocab_size out"),
        ({"config_overrides": "n_positions=16"}, "takes at most 16", "--sequence-length 16"),
        (
            {"model_type": "llama", "config_overrides": "hidden_size=200000"},
            "are free",
            "make it smaller with --depth or --config-overrides",
        ),
    ],
)
def test_what_cannot_be_built_is_refused_with_the_fix(text, settings, found, fix):
    with pytest.raises(ForgeError) as error:
        build_model(TrainConfig(**{"model_type": "gpt2", **settings}), text)
    (problem,) = error.value.problems
    assert found in problem.found and fix in problem.fix


@pytest.mark.parametrize("fixed", ["n_layer=1,n_inner=1", "n_layer=1", "n_layer=1,pad_token_id=7"])
def test_what_the_fix_of_a_wrong_size_says_is_built(text, fixed):
    assert (
        build_model(TrainConfig(model_type="gpt2", config_overrides=fixed), text).num_parameters()
        > 0
    )


@pytest.mark.parametrize(
    ("name", "found", "fix"),
    [
        ("no-such-org/no-such-model", "could not be loaded", "connection to the Hub"),
        ("./nowhere", "no such folder", "the folder of a model"),
    ],
)
def test_a_name_that_leads_nowhere_is_refused(text, name, found, fix):
    with pytest.raises(ForgeError) as error:
        load_model(name, text)
    (problem,) = error.value.problems
    assert problem.found.startswith(f"--model-name {name}") and found in problem.found
    assert fix in problem.fix


def save(folder, tokenizer_dir=None, **sizes):
    from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel

    GPT2LMHeadModel(GPT2Config(n_layer=1, n_head=2, n_embd=32, **sizes)).save_pretrained(folder)
    if tokenizer_dir:
        AutoTokenizer.from_pretrained(tokenizer_dir).save_pretrained(folder)


def test_a_saved_model_is_loaded_in_float32(text, tmp_path):
    save(tmp_path, text.tokenizer_dir, vocab_size=300, n_positions=64, dtype="bfloat16")
    lm = load_model(str(tmp_path), text)
    assert {p.dtype for p in lm.parameters()} == {torch.float32}


@pytest.mark.parametrize(
    ("sizes", "found", "fix"),
    [
        (
            {"vocab_size": 200, "n_positions": 64},
            "the data has a vocabulary of 300 tokens",
            "prepare_data.py --tokenizer",
        ),
        (
            {"vocab_size": 300, "n_positions": 16},
            "takes at most 16",
            "--sequence-length 16 or less",
        ),
    ],
)
def test_a_model_that_is_too_small_for_the_data_is_refused(text, tmp_path, sizes, found, fix):
    save(tmp_path, **sizes)
    with pytest.raises(ForgeError) as error:
        load_model(str(tmp_path), text)
    (problem,) = error.value.problems
    assert found in problem.found and fix in problem.fix


def a_llama(**sizes):
    from transformers import LlamaConfig, LlamaForCausalLM

    small = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**small, intermediate_size=48, vocab_size=300, **sizes))


def drop(folder, *names):
    """Take tensors out of the file of weights, as a stranger's tool might."""
    from safetensors.torch import load_file, save_file

    file = folder / "model.safetensors"
    tensors = load_file(file)
    save_file({key: tensors[key] for key in tensors if key not in names}, file, {"format": "pt"})
    assert len(load_file(file)) == len(tensors) - len(names)


UP = "model.layers.1.mlp.up_proj.weight"


@pytest.mark.parametrize("dropped", [(UP,), ("model.norm.weight",), ("lm_head.weight", UP)])
def test_a_folder_whose_weights_lack_a_layer_is_refused_by_its_name(text, tmp_path, dropped):
    a_llama().save_pretrained(tmp_path)
    load_model(str(tmp_path), text)
    drop(tmp_path, *dropped)
    with pytest.raises(ForgeError) as error:
        load_model(str(tmp_path), text)
    (problem,) = error.value.problems
    assert f"lacks {len(dropped)} of the weights of a LlamaForCausalLM" in problem.found
    assert all(name in problem.found for name in dropped)
    assert "AutoModelForCausalLM's save_pretrained" in problem.fix
    a_llama().save_pretrained(tmp_path)  # the fix
    load_model(str(tmp_path), text)


def test_a_missing_shard_is_refused_by_its_name(text, tmp_path):
    a_llama().save_pretrained(tmp_path, max_shard_size="50KB")
    load_model(str(tmp_path), text)
    shard = sorted(tmp_path.glob("model-*.safetensors"))[1]
    shard.unlink()
    with pytest.raises(ForgeError) as error:
        load_model(str(tmp_path), text)
    (problem,) = error.value.problems
    assert shard.name in problem.found and "every file of weights" in problem.fix


def test_a_base_model_is_enough_where_its_embeddings_are_the_head(text, tmp_path):
    tied, untied = a_llama(tie_word_embeddings=True), a_llama()
    tied.model.save_pretrained(tmp_path / "tied")
    lm = load_model(str(tmp_path / "tied"), text)
    assert torch.equal(lm.lm_head.weight, tied.model.embed_tokens.weight)
    untied.model.save_pretrained(tmp_path / "untied")
    with pytest.raises(ForgeError, match="lacks 1 of the weights .* \\(lm_head.weight\\)"):
        load_model(str(tmp_path / "untied"), text)


def test_a_model_with_another_tokenizer_is_refused(text, tmp_path):
    from p2p_llm_forge.data.tokenizer import train_tokenizer

    train_tokenizer(["other words entirely"] * 3, 280).save_pretrained(tmp_path)
    save(tmp_path, vocab_size=300, n_positions=64)
    with pytest.raises(ForgeError) as error:
        load_model(str(tmp_path), text)
    (problem,) = error.value.problems
    assert "another tokenizer" in problem.found
    assert f"prepare_data.py --tokenizer {tmp_path}" in problem.fix


def test_all_wrong_sizes_are_reported_at_once():
    config = TrainConfig(model_type="gpt2", config_overrides="n_layr=2,foo,n_head=many,n_embd=32")
    with pytest.raises(ForgeError) as error:
        sizes_asked_for(config)
    found = [problem.found for problem in error.value.problems]
    parts = ("has no 'n_layr'", "'foo' is not KEY=VALUE", "n_head is 'many'")
    assert [part in one for part, one in zip(parts, found, strict=True)] == [True] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is advised")
def test_a_cpu_is_not_advised_kernels_for_gpus():
    """In a process of its own: transformers says it once in each."""
    words = """if True:
        import torch
        from pathlib import Path
        from p2p_llm_forge.config import TrainConfig
        from p2p_llm_forge.model.build import build_model
        from p2p_llm_forge.model.fit import TextSpec

        lm = build_model(TrainConfig(depth=2), TextSpec(64, 1, 16, Path()))
        print(lm(torch.tensor([[1, 2]])).logits.shape)
    """
    done = subprocess.run([sys.executable, "-c", words], capture_output=True, text=True, check=True)
    assert "64" in done.stdout and "causal_conv1d" not in done.stderr
