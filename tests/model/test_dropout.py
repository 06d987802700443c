"""Dropout of the stream: what is dropped, what is not, and that nothing of it is kept."""

from __future__ import annotations

import re

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.dropout import add_dropout, dropped
from tests.model.families import LLAMA, SIZES, model_of

IDS = torch.arange(64).view(2, 32)


@pytest.mark.parametrize("place", ["embedding", "o_proj", "down_proj"])
def test_a_share_of_what_enters_the_stream_is_dropped_and_the_rest_is_scaled_up(place):
    plain, dropping = model_of("llama", **LLAMA), model_of("llama", **LLAMA)
    add_dropout(dropping, 0.25)
    whole, dropped = (_output(lm, place) for lm in (plain, dropping))
    is_left = dropped != 0
    # 40 forwards of 2,048 values, of which 0.25 +- 4 * sqrt(.25 * .75 / 81,920) are dropped.
    assert abs(float(is_left.float().mean()) - 0.75) < 0.0061
    torch.testing.assert_close(dropped[is_left], (whole / 0.75)[is_left])


def _output(lm, place: str) -> torch.Tensor:
    """What 40 forwards in training add to the stream at a place of the first layer."""
    layer = lm.model.layers[0]
    if place == "embedding":
        return torch.stack([lm.get_input_embeddings()(IDS) for _ in range(40)])
    module = layer.self_attn.o_proj if place == "o_proj" else layer.mlp.down_proj
    stream = torch.linspace(1, 2, 64 * module.in_features).view(64, -1)
    return torch.stack([module(stream) for _ in range(40)])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("shape", [(3, 5, 7), (1,), (0, 4), (2**20,)])
def test_what_is_left_and_its_gradient_are_scaled_by_the_same(shape, dtype):
    values = (1 + torch.rand(shape, dtype=dtype)).requires_grad_()
    kept = dropped(values, 0.1)
    kept.sum().backward()
    is_left = kept != 0
    assert kept.shape == values.shape and kept.dtype == dtype
    assert torch.equal(values.grad != 0, is_left)
    torch.testing.assert_close(kept[is_left], (values.detach() / 0.9)[is_left])
    if len(is_left) == 2**20:
        # As torch's own: 0.1 +- 4 * sqrt(.1 * .9 / 2**20); neighbours have nothing in common.
        assert abs(float((~is_left).float().mean()) - 0.1) < 0.0012
        together = ~is_left.view(-1, 4)
        pairs = (together[:, 0] & together[:, 3]).float().mean()
        assert abs(float(pairs) - 0.01) < 0.0008


def test_evaluation_weights_and_configuration_know_nothing_of_it():
    plain, dropping = model_of("llama", **LLAMA), model_of("llama", **LLAMA)
    add_dropout(dropping, 0.5)
    assert torch.equal(plain.eval()(IDS).logits, dropping.eval()(IDS).logits)
    assert list(plain.state_dict()) == list(dropping.state_dict())
    assert plain.config.to_dict() == dropping.config.to_dict()


def test_the_same_seed_drops_the_same():
    lm = model_of("llama", **LLAMA)
    add_dropout(lm, 0.5)

    def logits(seed: int) -> torch.Tensor:
        torch.manual_seed(seed)
        return lm(IDS).logits

    assert torch.equal(logits(1), logits(1)) and not torch.equal(logits(1), logits(2))


def test_a_family_with_places_of_its_own_is_refused_with_what_it_has_itself():
    with pytest.raises(ForgeError) as refused:
        add_dropout(model_of("gpt2", **SIZES), 0.2)
    overrides = re.search(r"--config-overrides (\S+)", refused.value.problems[0].fix)
    given = dict(pair.split("=") for pair in overrides[1].split(","))
    assert given == dict.fromkeys(("resid_pdrop", "embd_pdrop", "attn_pdrop"), "0.2")
    add_dropout(model_of("gpt2", **SIZES), 0)


def test_what_an_adapter_adds_is_dropped_with_what_it_is_added_to():
    lm = model_of("llama", **LLAMA)
    settings = LoraConfig(r=4, target_modules=["o_proj"], init_lora_weights=False)
    inject_adapter_in_model(settings, lm)
    add_dropout(lm, 0.25)
    is_left = _output(lm, "o_proj") != 0
    assert abs(float(is_left.float().mean()) - 0.75) < 0.0061
