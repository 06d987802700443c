"""The chunked loss equals the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from p2p_llm_forge.model import loss as losses
from p2p_llm_forge.model.head import Head
from tests.model.families import CAPPED_OR_SCALED, FAMILIES, model_of

# Relative, of float64. These compute some of their layers in float32 all the same.
PRECISION = {"xlstm": 1e-5}


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


@pytest.mark.parametrize("cap", [None, 5.0])
@pytest.mark.parametrize("with_bias", [False, True])
def test_rows_that_stand_for_no_token_change_nothing(small_chunks, monkeypatch, with_bias, cap):
    """A GPU gets them in half precision (tests/gpu/test_loss.py)."""
    torch.manual_seed(0)
    hidden = torch.randn(50, 16, requires_grad=True)
    weight = torch.randn(41, 16, requires_grad=True)
    bias = torch.randn(41, requires_grad=True) if with_bias else None
    inputs = [tensor for tensor in (hidden, weight, bias) if tensor is not None]
    targets, head, found = torch.randint(41, (50,)), Head(cap=cap), []
    for multiple in (1, 64):
        monkeypatch.setattr(losses, "rows_multiple", lambda *_, multiple=multiple: multiple)
        nats = losses.chunked_nats(hidden, weight, bias, targets, head)
        found.append([nats, *torch.autograd.grad(nats, inputs)])
    for bare, filled in zip(*found, strict=True):
        torch.testing.assert_close(filled, bare, rtol=1e-6, atol=1e-6)


def test_a_gpu_gets_larger_chunks_and_even_rows_in_half_precision():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    assert [losses.chunk_tokens(50_257, device) for device in (gpu, cpu)] == [1335, 333]
    rows = [losses.rows_multiple(gpu, dtype) for dtype in (torch.bfloat16, torch.float16)]
    assert rows == [64, 64]
    assert (
        losses.rows_multiple(gpu, torch.float32) == losses.rows_multiple(cpu, torch.bfloat16) == 1
    )


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
    sizes, head = FAMILIES[family]
    lm = model_of(family, **sizes)
    module = losses.NextTokenLoss(lm)
    assert module.head == head
    inputs, targets = torch.randint(64, (3, 16)), torch.randint(64, (3, 16))
    nats, _ = module(inputs, targets)
    nats.backward()
    got = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    logits = lm(input_ids=inputs, use_cache=False).logits
    expected = torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )
    expected.backward()
    assert nats.item() == pytest.approx(expected.item(), rel=1e-5)
    require_blocks(module, inputs, targets, rel=1e-5)
    assert got
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-4)


def require_blocks(module, inputs, targets, rel):
    """Every block's loss and right guesses are those of transformers' own logits."""
    nats, correct = module(inputs, targets, by_block=True)
    assert nats.shape == correct.shape == (len(inputs),) and not nats.requires_grad
    with torch.no_grad():
        logits = module.lm(input_ids=inputs, use_cache=False).logits.double()
    expected = -logits.log_softmax(-1).gather(-1, targets.unsqueeze(-1)).squeeze(-1).sum(1)
    assert nats.tolist() == pytest.approx(expected.tolist(), rel=rel)
    assert correct.tolist() == (logits.argmax(-1) == targets).sum(1).tolist()


def labelled(count=3, length=16):
    """(inputs, targets, begins) of blocks of which less than half counts, and labels of Hugging
    Face's for the same: the token before the block, and its own."""
    torch.manual_seed(0)
    tokens = torch.randint(64, (count, length + 1))
    labels = tokens.masked_fill(torch.rand(tokens.shape) < 0.7, -100)
    labels[:, 0], labels[:, -1] = -100, tokens[:, -1]
    begins = torch.zeros(count, length, dtype=torch.bool)
    return (tokens[:, :-1], labels[:, 1:], begins), {"input_ids": tokens, "labels": labels}


@pytest.mark.parametrize("family", FAMILIES)
def test_what_counts_has_the_loss_and_gradient_that_transformers_makes_of_labels(
    small_chunks, family
):
    lm = model_of(family, **FAMILIES[family][0])
    batch, theirs = labelled()
    count = int((batch[1] >= 0).sum())
    assert 8 < count < batch[1].numel() / 2
    module = losses.NextTokenLoss(lm)
    nats, _ = module(*batch)
    (nats / count).backward()
    got = {name: p.grad.clone() for name, p in lm.named_parameters()}
    lm.zero_grad()
    expected = lm(**theirs, use_cache=False).loss
    expected.backward()
    assert nats.item() / count == pytest.approx(expected.item(), rel=1e-5)
    for name, parameter in lm.named_parameters():
        torch.testing.assert_close(got[name], parameter.grad, rtol=1e-4, atol=1e-6)
    of_blocks, correct = module(*batch, by_block=True)
    for number in range(3):
        row = {name: one[number : number + 1] for name, one in theirs.items()}
        with torch.no_grad():
            found = lm(**row, use_cache=False)
        labels = row["labels"][0, 1:]
        counts = labels >= 0
        assert of_blocks[number].item() == pytest.approx(
            found.loss.item() * int(counts.sum()), rel=1e-5
        )
        right = found.logits[0, :-1].argmax(-1)[counts] == labels[counts]
        assert correct[number] == right.sum()


def flops_of(call):
    """What a forward and backward multiply."""
    with FlopCounterMode(display=False) as counter:
        call().backward()
    return counter.get_total_flops()


@pytest.mark.parametrize("with_bias", [False, True])
@pytest.mark.parametrize("cap", [None, 2.0])
def test_a_frozen_head_passes_the_gradient_on_and_costs_a_third_less(small_chunks, with_bias, cap):
    torch.manual_seed(0)
    hidden, weight, targets = torch.randn(50, 16), torch.randn(40, 16), torch.randint(40, (50,))
    bias, found, work, kept = torch.randn(40) if with_bias else None, [], [], []
    for learns in (True, False):
        own = hidden.clone().requires_grad_()
        head = [None if one is None else one.clone() for one in (weight, bias)]
        head = [None if one is None else one.requires_grad_(learns) for one in head]

        def nats(own=own, head=head):
            return losses.chunked_nats(own, *head, targets, Head(cap=cap))

        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda one, sizes=sizes: sizes.append(one.numel()) or one, lambda one: one
        ):
            work.append(flops_of(nats))
        kept.append(sum(sizes))
        found.append(own.grad)
        assert all((one.grad is not None) == learns for one in head if one is not None)
    assert torch.equal(*found)
    assert work[1] == work[0] * 2 / 3
    assert kept[1] == hidden.numel() < kept[0], "nothing in the size of the head"


@pytest.mark.parametrize("family", ["llama", "gemma2"])
def test_what_does_not_count_costs_nothing_from_the_head_on(small_chunks, family):
    lm = model_of(family, **FAMILIES[family][0])
    module, (inputs, _, begins) = losses.NextTokenLoss(lm), labelled()[0]
    work = {}
    for share in (1.0, 0.5, 0.25):
        few = inputs.masked_fill(torch.arange(inputs.shape[1]) >= share * inputs.shape[1], -100)
        work[share] = flops_of(lambda few=few: module(inputs, few, begins)[0])
    head = lm.lm_head.weight.numel() * inputs.numel() * 3 * 2
    assert work[1.0] - work[0.5] == head / 2 and work[1.0] - work[0.25] == head * 3 / 4


def own_nats(lm, inputs, targets):
    """The oracle: what transformers' own forward comes to."""
    logits = lm(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )


@pytest.mark.parametrize("family", CAPPED_OR_SCALED)
def test_a_head_that_a_new_model_does_not_show_has_its_own_loss_in_float64(small_chunks, family):
    """A cap of 30 leaves the logits of new weights as they are; those of a trained model not."""
    lm = model_of(family, **CAPPED_OR_SCALED[family][0]).double().eval()
    module = losses.NextTokenLoss(lm)  # decides on new weights
    with torch.no_grad():
        lm.get_output_embeddings().weight *= 100
    inputs, targets = torch.randint(64, (3, 16)), torch.randint(64, (3, 16))
    expected = own_nats(lm, inputs, targets)
    expected.backward()
    want = {name: p.grad.clone() for name, p in lm.named_parameters() if p.grad is not None}
    lm.zero_grad()
    nats, _ = module(inputs, targets)
    nats.backward()
    assert nats.dtype == torch.float64
    assert nats.item() == pytest.approx(expected.item(), rel=PRECISION.get(family, 1e-12))
    require_blocks(module, inputs, targets, rel=PRECISION.get(family, 1e-12))
    assert want
    largest = max(gradient.abs().max() for gradient in want.values())
    for name, gradient in want.items():
        distance = (lm.get_parameter(name).grad - gradient).abs().max()
        assert distance <= PRECISION.get(family, 1e-12) * largest, name


@pytest.mark.parametrize("head", [Head(0.3, -2.0, 4.0), Head(2.0, 0.5, None), Head(cap=1.5)])
def test_scales_and_a_cap_around_a_head_with_a_bias_equal_autograd(small_chunks, head):
    torch.manual_seed(0)
    inputs = [torch.randn(*shape, dtype=torch.float64) for shape in ((50, 16), (40, 16), (40,))]
    hidden, weight, bias = (tensor.requires_grad_() for tensor in inputs)
    targets = torch.randint(40, (50,))
    product = head.scale * (head.before * hidden @ weight.T + bias)
    logits = product if head.cap is None else head.cap * torch.tanh(product / head.cap)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    ours = losses.chunked_nats(hidden, weight, bias, targets, head)
    assert ours.item() == pytest.approx(expected.item(), rel=1e-12)
    got = torch.autograd.grad(ours * 0.37, inputs)
    for a, b in zip(got, torch.autograd.grad(expected * 0.37, inputs), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-10)


def test_a_capped_head_in_bf16_stays_within_bf16_rounding(small_chunks):
    torch.manual_seed(0)
    hidden, weight = torch.randn(50, 64, requires_grad=True), torch.randn(40, 64) * 2
    targets = torch.randint(40, (50,))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours = losses.chunked_nats(hidden, weight, None, targets, Head(cap=15.0))
    logits = 15 * torch.tanh(hidden.double() @ weight.double().T / 15)
    expected = torch.nn.functional.cross_entropy(logits, targets, reduction="sum")
    assert ours.item() == pytest.approx(expected.item(), rel=5e-3)
    (got,), (want,) = torch.autograd.grad(ours, hidden), torch.autograd.grad(expected, hidden)
    assert (got - want).norm() / want.norm() < 3e-2


def test_a_loss_that_learns_nothing_keeps_no_gradient():
    with torch.no_grad():
        nats = losses.chunked_nats(torch.randn(5, 4), torch.randn(9, 4), None, torch.arange(5))
    assert not nats.requires_grad
