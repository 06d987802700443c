"""The chunked loss equals the plain one, in value and gradient."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model import loss as losses


@pytest.fixture
def small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "chunk_tokens", lambda vocab_size: 7)


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


def model_of(family: str, **sizes):
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **sizes)).float().train()


SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2, "vocab_size": 64}
LLAMA = {**SIZES, "intermediate_size": 64, "num_key_value_heads": 2}
FAMILIES = {
    "gpt2": ({**SIZES, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}, True),
    "llama": (LLAMA, True),
    "gpt_neox": ({**SIZES, "intermediate_size": 64}, True),
    "gemma2": ({**LLAMA, "head_dim": 16, "final_logit_softcapping": 2.0}, False),  # capped logits
    "cohere": ({**LLAMA, "logit_scale": 0.1}, False),  # scaled logits
}


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


# --- attention inside documents -------------------------------------------------------------------

END = 3
FIRST, OTHER, SECOND = [5, 9, 20, 31, 8, 8], [40, 41, 7, 60, 61, 62], [11, 12, 50, 13, 9]


def test_positions_begin_anew_after_the_end_of_a_document():
    inputs = torch.tensor([[7, 8, END, 9, END, END, 4], [END, 1, 2, 4, 5, 6, END]])
    assert losses.positions_in_documents(inputs, END).tolist() == [
        [0, 1, 0, 1, 0, 0, 1],
        [0, 1, 2, 3, 4, 5, 0],
    ]


def logits_of(module, tokens):
    inputs = torch.tensor([tokens])
    mask = module.document_mask(inputs, END)
    return module.lm(input_ids=inputs, use_cache=False, **mask).logits[0]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_logits_of_a_document_do_not_change_with_its_neighbours(family):
    lm = model_of(family, **FAMILIES[family][0]).eval()
    module = losses.NextTokenLoss(lm, document_end=END)
    with torch.no_grad():
        alone = lm(input_ids=torch.tensor([[END, *SECOND]])).logits[0]
        place = slice(len(FIRST) + 1, len(FIRST) + 1 + len(alone))
        for neighbour in (FIRST, OTHER):
            packed = logits_of(module, [END, *neighbour, END, *SECOND, END, *neighbour])
            torch.testing.assert_close(packed[place], alone, rtol=1e-4, atol=1e-5)
        crossing = lm(input_ids=torch.tensor([[END, *FIRST, END, *SECOND]])).logits[0]
        assert not torch.allclose(crossing[place], alone, atol=1e-3), "else this shows nothing"
        shuffled = logits_of(module, [END, *FIRST, END, *SECOND[::-1]])
        assert not torch.allclose(shuffled[-1], alone[-1], atol=1e-3), "attention inside is kept"


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("in_training", [True, False])
def test_a_masked_loss_is_the_sum_over_the_documents_alone(small_chunks, family, in_training):
    module = losses.NextTokenLoss(model_of(family, **FAMILIES[family][0]), document_end=END)
    module.train(in_training)
    tokens = [END, *FIRST, END, *SECOND, END]
    nats, _ = module(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    alone = sum(
        torch.nn.functional.cross_entropy(
            module.lm(input_ids=torch.tensor([[END, *part]]), use_cache=False).logits[0],
            torch.tensor([*part, END]),
            reduction="sum",
        )
        for part in (FIRST, SECOND)
    )
    assert nats.item() == pytest.approx(alone.item(), rel=1e-4)


def test_a_family_whose_state_runs_through_documents_is_refused():
    lm = model_of("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(ForgeError, match="--document-mask: a mamba cannot keep attention inside"):
        losses.NextTokenLoss(lm, document_end=END)
