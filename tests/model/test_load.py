"""Models are loaded in float32, and only if they fit the data."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.load import load_model


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


def test_a_model_with_another_tokenizer_is_refused(text, tmp_path):
    from p2p_llm_forge.data.tokenizer import train_tokenizer

    train_tokenizer(["other words entirely"] * 3, 280).save_pretrained(tmp_path)
    save(tmp_path, vocab_size=300, n_positions=64)
    with pytest.raises(ForgeError) as error:
        load_model(str(tmp_path), text)
    (problem,) = error.value.problems
    assert "another tokenizer" in problem.found
    assert f"prepare_data.py --tokenizer {tmp_path}" in problem.fix
