"""Convolutions inside documents are those of each document alone."""

from __future__ import annotations

import copy

import pytest
import torch

from p2p_llm_forge.model.short_convolution import convolved, keep_inside_documents
from tests.model.families import FAMILIES, model_of

LENGTHS = [4, 1, 2, 7, 3]


@pytest.mark.parametrize("size", [1, 2, 3, 5, 20])
@pytest.mark.parametrize("has_bias", [False, True])
def test_a_block_is_convolved_as_torch_does_each_document(size, has_bias):
    draw = torch.Generator().manual_seed(size)
    values = torch.randn(2, sum(LENGTHS), 6, generator=draw, dtype=torch.float64)
    values.requires_grad_()
    conv = torch.nn.Conv1d(6, 6, size, groups=6, padding=size - 1, bias=has_bias).double()
    numbers = torch.repeat_interleave(torch.arange(len(LENGTHS)), torch.tensor(LENGTHS))
    documents = torch.stack([numbers, numbers.flip(0)])
    found = convolved(values, conv.weight.squeeze(1), conv.bias, documents)
    lengths = [LENGTHS, LENGTHS[::-1]]
    expected = torch.stack(
        [
            torch.cat(
                [
                    conv(document.T.unsqueeze(0))[0, :, : len(document)].T
                    for document in block.split(of_block)
                ]
            )
            for block, of_block in zip(values, lengths, strict=True)
        ]
    )
    torch.testing.assert_close(found, expected)
    inputs = [values, *conv.parameters()]
    grown = torch.autograd.grad(found.square().sum(), inputs)
    torch.testing.assert_close(grown, torch.autograd.grad(expected.square().sum(), inputs))


def test_without_documents_the_model_is_what_it_was():
    lm = model_of("lfm2", **FAMILIES["lfm2"][0]).eval()
    usual = copy.deepcopy(lm)
    assert keep_inside_documents(lm)
    tokens = torch.randint(64, (2, 16))
    prompt = {"inputs": tokens, "max_new_tokens": 4, "do_sample": False}
    with torch.no_grad():
        assert torch.equal(lm(tokens).logits, usual(tokens).logits)
        assert torch.equal(lm.generate(**prompt), usual.generate(**prompt))
        own = copy.deepcopy(lm)  # which must not lead back to the first one's weights
        own.model.layers[0].conv.conv.weight.zero_()
        assert not torch.equal(own(tokens).logits, usual(tokens).logits)
        assert torch.equal(lm(tokens).logits, usual(tokens).logits)


def test_families_without_them_have_none():
    assert not keep_inside_documents(model_of("llama", **FAMILIES["llama"][0]))
