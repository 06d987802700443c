"""Models and texts that do not fit each other are refused, with a fix that helps."""

from __future__ import annotations

import contextlib
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model import fit
from p2p_llm_forge.model.build import build_model, new_model_config
from p2p_llm_forge.model.fit import TRAINING_BYTES_PER_PARAMETER, require_memory
from tests.runs import TINY, TINY_SIZES

ENCODER = "hidden_size=32,num_hidden_layers=2,num_attention_heads=2,intermediate_size=48"
XLNET = "d_model=32,n_layer=2,n_head=2,d_inner=48"


def test_families_that_can_look_ahead_are_built_so_that_they_do_not(text):
    lm = build_model(TrainConfig(model_type="bert", config_overrides=ENCODER), text).eval()
    tokens = torch.arange(32).unsqueeze(0)
    changed = tokens.clone()
    changed[0, -1] = 0
    with torch.no_grad():
        before, after = lm(input_ids=tokens).logits, lm(input_ids=changed).logits
    torch.testing.assert_close(before[:, :-1], after[:, :-1])
    assert not torch.allclose(before[:, -1], after[:, -1])


def test_a_model_that_looks_ahead_is_refused(text):
    with pytest.raises(ForgeError) as error:
        build_model(TrainConfig(model_type="xlnet", config_overrides=XLNET), text)
    (problem,) = error.value.problems
    assert "sees the tokens that it should predict, so it is not a causal" in problem.found
    assert "such as gpt2" in problem.fix


@pytest.mark.parametrize(("family", "sizes"), [("gpt2", TINY_SIZES), ("xlnet", XLNET)])
def test_forwards_in_float32_that_differ_are_looked_at_again(text, monkeypatch, family, sizes):
    """As on a busy machine: only who looks ahead in float64 too is refused."""
    right, calls = fit.logits_of, []

    def noisy(model, tokens):
        calls.append(tokens)
        logits = right(model, tokens)
        return logits + 1e-3 * len(calls) * (logits.dtype == torch.float32)

    monkeypatch.setattr(fit, "logits_of", noisy)
    refused = pytest.raises(ForgeError, match="sees the tokens that it should predict")
    with refused if family == "xlnet" else contextlib.nullcontext():
        build_model(TrainConfig(model_type=family, config_overrides=sizes), text)
    assert len(calls) == 4


def test_a_family_that_keeps_positions_for_itself_gets_more_of_them(text):
    """RoBERTa counts its positions from 2."""
    config = TrainConfig(model_type="roberta", config_overrides=ENCODER)
    assert build_model(config, text).config.max_position_embeddings == 34
    too_few = replace(config, config_overrides=f"{ENCODER},max_position_embeddings=32")
    with pytest.raises(ForgeError) as error:
        build_model(too_few, text)
    (problem,) = error.value.problems
    assert "cannot take a block of 32 tokens" in problem.found
    assert problem.fix == "prepare the data with a smaller --sequence-length"
    assert build_model(too_few, replace(text, sequence_length=30))


def test_sizes_that_do_not_go_together_are_no_matter_of_length(text):
    """The head size is 8, and positions are turned in 64 of its values."""
    small = "n_embd=32,n_layer=2,n_head=4"
    with pytest.raises(ForgeError) as error:
        build_model(TrainConfig(model_type="codegen", config_overrides=small), text)
    (problem,) = error.value.problems
    assert problem.found.startswith(f"a codegen from scratch by --config-overrides {small} fails")
    assert "in transformers (The size " in problem.found
    assert "position" not in problem.fix and "length" not in problem.fix
    assert "n_head=4" in problem.fix and "rotary_dim=64" in problem.fix
    fixed = TrainConfig(model_type="codegen", config_overrides=f"{small},rotary_dim=8")
    assert build_model(fixed, text)


def test_the_memory_is_that_of_all_processes_on_the_machine(text, monkeypatch):
    config = TrainConfig(**TINY)
    model_config = new_model_config(config, text)
    size = sum(p.numel() for p in build_model(config, text).parameters())
    free = SimpleNamespace(available=int(2.5 * size * TRAINING_BYTES_PER_PARAMETER))
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    require_memory(model_config, processes_here=2)
    with pytest.raises(ForgeError, match="needs about .* GB to train on this machine"):
        require_memory(model_config, processes_here=3)
