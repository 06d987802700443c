"""The chunked loss equals the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.model import loss as losses
from tests.model.families import FAMILIES, model_of


def plain_nats(hidden, weight, bias, targets):
    """The oracle: all logits at once, in float64."""
    logits = hidden.double() @ weight.double().T
    if bias is not None:
        logits = logits + bias.double()
    return torch.nn.functional.cross_entropy(logits, targets, reduction="sum")


@pytest.mark.parametrize("with_bias", [False, True])
def test_value_and_gradients_are_those_of_cross_entropy(small_chunks, with_bias):
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(40, 16, requires_grad=True)
    bias = torch.randn(40, requires_grad=True) if with_bias else None
    targets = torch.randint(40, (50,))
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    ours = losses.chunked_nats(hidden, weight, bias, targets)
    expected = plain_nats(hidden, weight, bias, targets)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-6)
    got = torch.autograd.grad(ours * 0.37, inputs)
    want = torch.autograd.grad(expected * 0.37, inputs)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b.to(a.dtype), rtol=1e-5, atol=1e-6)


def test_bf16_autocast_stays_within_bf16_rounding(small_chunks):
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64, requires_grad=True), torch.randn(40, 64) / 8
    targets = torch.randint(40, (50,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses.chunked_nats(hidden, weight, None, targets)
    assert ours.dtype == torch.float32
    expected = plain_nats(hidden, weight, None, targets)
    assert ours.item() == pytest.approx(expected.item(), rel=5e-3)
    (got,), (want,) = torch.autograd.grad(ours, hidden), torch.autograd.grad(expected, hidden)
    assert (got - want).norm() / want.norm() < 1e-2


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_gets_the_loss_and_gradient_of_its_own_logits(small_chunks, family):
    sizes, is_linear = FAMILIES[family]
    lm = model_of(family, **sizes)
    module = losses.NextTokenLoss(lm)
    assert module.chunked is is_linear
    inputs, targets = torch.randint(64, (3, 16)), torch.randint(64, (3, 16))
    nats, correct = module(inputs, targets, count_correct=True)
    nats.backward()
    got = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    logits = lm(input_ids=inputs, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    expected.backward()
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    assert correct.item() == (logits.argmax(-1) == targets).sum().item()
    assert got
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


def test_a_loss_that_learns_nothing_keeps_no_gradient():
    with torch.no_grad():
        nats = losses.chunked_nats(torch.randn(5, 4), torch.randn(9, 4), None, torch.arange(5))
    assert not nats.requires_grad
