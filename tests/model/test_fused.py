"""Steps that are fused compute what transformers' own do, and keep less for the backward."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from p2p_llm_forge.model.fused import fuse_activations, is_gelu_by_tanh
from tests.model.families import FAMILIES, SIZES, model_of

BY_TANH = {
    "gpt2": FAMILIES["gpt2"][0],
    "bloom": {**SIZES, "n_layer": 2, "n_head": 2},
    "gpt_neo": {
        **{"hidden_size": 32, "num_layers": 2, "num_heads": 2, "vocab_size": 64},
        **{"attention_types": [[["global"], 2]], "activation_function": "gelu_new"},
        **{"resid_dropout": 0.0, "embed_dropout": 0.0, "attention_dropout": 0.0},
    },
    "gptj": {**SIZES, "n_embd": 32, "n_layer": 2, "n_head": 2, "rotary_dim": 8},
    "phi": {**FAMILIES["llama"][0], "resid_pdrop": 0.0, "hidden_act": "gelu_fast"},
}
TOKENS = torch.arange(60).view(3, 20)


def gradients(lm):
    """The loss and the gradients of a model, as its own forward computes them, and their names."""
    loss = lm(TOKENS, labels=TOKENS).loss
    loss.backward()
    return loss, {name: weight.grad for name, weight in lm.named_parameters()}


@pytest.mark.parametrize("family", BY_TANH)
def test_a_fused_gelu_changes_neither_loss_nor_gradients(family):
    usual = model_of(family, **BY_TANH[family]).double()
    fused = copy.deepcopy(usual)
    fuse_activations(fused)
    found = [type(module) for module in fused.modules() if type(module) is nn.GELU]
    assert len(found) == 2  # one in each layer
    (expected, of_usual), (loss, of_fused) = gradients(usual), gradients(fused)
    torch.testing.assert_close(loss, expected, rtol=1e-9, atol=0)
    assert list(of_fused) == list(of_usual)
    torch.testing.assert_close(of_fused, of_usual, rtol=1e-7, atol=1e-10)
    assert fused.state_dict().keys() == usual.state_dict().keys()


def test_less_is_kept_for_the_backward():
    def kept(lm):
        found: dict[int, int] = {}

        def pack(tensor):
            found[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = lm(TOKENS, labels=TOKENS).loss
        return sum(found.values()), loss

    lm = model_of("gpt2", **FAMILIES["gpt2"][0])
    before, _ = kept(lm)
    fuse_activations(lm)
    after, _ = kept(lm)
    # Three tensors less of what the feed-forward has between its two products, 4 x 32 wide.
    per_layer = 3 * TOKENS.numel() * 4 * 32 * 4
    assert before - after == 2 * per_layer


class Halves(nn.Module):
    """A gate that is a GELU, of a name like those."""

    def forward(self, x):
        a, b = x.chunk(2, -1)
        return nn.functional.gelu(a, approximate="tanh") * b


class GeluOfTwo(nn.Module):
    def forward(self, x, y):
        return nn.functional.gelu(x, approximate="tanh") * y


@pytest.mark.parametrize(
    ("name", "is_fused"),
    [
        ("gelu_new", True),
        ("gelu_fast", True),
        ("gelu_python_tanh", True),
        ("gelu", False),
        ("gelu_10", False),
        ("gelu_python", False),
        ("quick_gelu", False),
        ("silu", False),
        ("relu2", False),
    ],
)
def test_only_that_approximation_is_replaced(name, is_fused):
    from transformers.activations import ACT2FN

    if name not in ACT2FN:
        pytest.skip(f"this transformers has no {name}")
    assert is_gelu_by_tanh(ACT2FN[name]) == is_fused


@pytest.mark.parametrize("module", [Halves(), GeluOfTwo(), nn.GELU("tanh"), nn.GELU()])
def test_others_of_such_names_stay(module):
    assert not is_gelu_by_tanh(module)
