"""Models and texts that do not fit each other are refused, with a fix that helps."""

from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import build_model, new_model_config
from p2p_llm_forge.model.fit import TRAINING_BYTES_PER_PARAMETER, require_causal, require_memory
from tests.runs import TINY_MODEL

ROBERTA = "hidden_size=32,num_hidden_layers=1,num_attention_heads=2,intermediate_size=32"


def test_a_family_that_keeps_positions_for_itself_needs_more_of_them_and_then_fits(text):
    config = TrainConfig(model_type="roberta", config_overrides=ROBERTA)
    with pytest.raises(ForgeError) as error:
        build_model(config, text)
    (problem,) = error.value.problems
    assert "cannot take a block of 32 tokens" in problem.found
    more = problem.fix.partition("--config-overrides ")[2]
    assert build_model(replace(config, config_overrides=f"{ROBERTA},{more}"), text)


def test_a_model_that_looks_ahead_is_refused():
    class LooksAhead(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.embedding = torch.nn.Embedding(9, 4)

        def get_input_embeddings(self):
            return self.embedding

        def forward(self, input_ids, use_cache):
            hidden = self.embedding(input_ids)
            return SimpleNamespace(logits=hidden + hidden.sum(1, keepdim=True))

    with pytest.raises(ForgeError) as error:
        require_causal(LooksAhead(), "this one", 8, "")
    (problem,) = error.value.problems
    assert "this one sees the tokens that it should predict" in problem.found
    assert "such as gpt2" in problem.fix


def test_the_memory_is_that_of_all_processes_on_the_machine(text, monkeypatch):
    config = TrainConfig(config_overrides=TINY_MODEL)
    model_config = new_model_config(config, text)
    size = sum(p.numel() for p in build_model(config, text).parameters())
    free = SimpleNamespace(available=int(2.5 * size * TRAINING_BYTES_PER_PARAMETER))
    monkeypatch.setattr("psutil.virtual_memory", lambda: free)
    monkeypatch.setattr("torch.accelerator.is_available", lambda: False)
    require_memory(model_config, processes_here=2)
    with pytest.raises(ForgeError, match="needs about .* GB to train on this machine"):
        require_memory(model_config, processes_here=3)
