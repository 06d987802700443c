"""An adapted layer computes what peft's own does, with the gradients of all three inputs."""

from __future__ import annotations

import contextlib

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from transformers.pytorch_utils import Conv1D

from p2p_llm_forge.model.low_rank import LowRank, take_less_memory

ROWS, IN, OUT = 6, 10, 14
KINDS = {
    "linear": lambda: torch.nn.Linear(IN, OUT),
    "without bias": lambda: torch.nn.Linear(IN, OUT, bias=False),
    "Conv1D": lambda: Conv1D(OUT, IN),
}


def adapted(layer, dropout=0.0):
    """A layer, in a model, with an adapter that is not zero."""
    torch.manual_seed(1)
    model = torch.nn.ModuleDict({"layer": layer})
    settings = LoraConfig(r=3, lora_alpha=5, lora_dropout=dropout, target_modules=["layer"])
    inject_adapter_in_model(settings, model)
    torch.nn.init.normal_(model["layer"].lora_B["default"].weight)
    return model


def output_and_gradients(model, autocast=None):
    """Of one fixed input of three axes: y, and what x, A and B get."""
    layer = model["layer"]
    model.zero_grad()
    torch.manual_seed(2)
    x = torch.randn(2, ROWS // 2, IN, dtype=layer.lora_A["default"].weight.dtype)
    x.requires_grad_(True)
    context = torch.autocast("cpu", autocast) if autocast else contextlib.nullcontext()
    with context:
        y = layer(x)
    (y.float() ** 2).sum().backward()
    weights = [layer.lora_A["default"].weight, layer.lora_B["default"].weight]
    return [y.detach(), x.grad, *(one.grad.clone() for one in weights)]


@pytest.mark.parametrize("kind", KINDS)
def test_it_computes_what_peft_computes(kind):
    model = adapted(KINDS[kind]()).double()
    by_peft = output_and_gradients(model)
    take_less_memory(model, "default")
    assert (
        "LowRank"
        in type(model["layer"](torch.ones(1, IN).double()).grad_fn.next_functions[0][0]).__name__
    )
    for ours, theirs in zip(output_and_gradients(model), by_peft, strict=True):
        assert ours.shape == theirs.shape and theirs.abs().max() > 0.1
        torch.testing.assert_close(ours, theirs)


def test_its_gradients_are_those_of_differences():
    torch.manual_seed(3)
    x, a, b = (torch.randn(*shape).double() for shape in ((ROWS, IN), (3, IN), (OUT, 3)))
    base = (torch.randn(OUT, IN).double(), torch.randn(OUT).double())
    inputs = [one.requires_grad_(True) for one in (x, a, b)]
    assert torch.autograd.gradcheck(lambda x, a, b: LowRank.apply(x, base, a, b, 0.7), inputs)


def test_under_autocast_it_computes_in_its_dtype_as_peft_does():
    model = adapted(KINDS["linear"]())
    by_peft = output_and_gradients(model, torch.bfloat16)
    take_less_memory(model, "default")
    for ours, theirs in zip(output_and_gradients(model, torch.bfloat16), by_peft, strict=True):
        assert ours.dtype == theirs.dtype
        torch.testing.assert_close(ours, theirs, rtol=0.03, atol=0.5)


def test_other_layers_compute_as_peft_does():
    with_dropout = adapted(KINDS["linear"](), dropout=0.5)
    take_less_memory(with_dropout, "default")
    assert "forward" not in vars(with_dropout["layer"])
    in_bf16 = adapted(KINDS["linear"]())
    in_bf16["layer"].base_layer.bfloat16()  # beside adapters that compute in float32
    x = torch.ones(1, IN, dtype=torch.bfloat16)
    by_peft = in_bf16["layer"](x)
    take_less_memory(in_bf16, "default")
    assert torch.equal(in_bf16["layer"](x), by_peft)


def test_nothing_of_the_outputs_size_is_kept_for_the_backward():
    model = adapted(torch.nn.Linear(64, 64, bias=False))
    take_less_memory(model, "default")
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda one: kept.append(one) or one, lambda x: x):
        model["layer"](torch.ones(8, 64, requires_grad=True))
    assert sorted(tuple(one.shape) for one in kept) == [(3, 64), (8, 3), (8, 64), (64, 3)]
