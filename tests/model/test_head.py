"""How a family makes its logits is read off its configuration, and confirmed by its own forward."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.model.head import Head, head_of
from tests.model.families import CAPPED_OR_SCALED, LLAMA, model_of


@pytest.mark.parametrize("family", CAPPED_OR_SCALED)
def test_new_weights_are_enough_to_know_the_head_of_a_family(family):
    sizes, expected = CAPPED_OR_SCALED[family]
    lm = model_of(family, **sizes)
    assert head_of(lm) == expected
    with torch.no_grad():
        lm.get_output_embeddings().weight.zero_()  # as some begin; logits of 0 tell nothing
    assert head_of(lm) == expected


def test_trying_the_head_leaves_the_model_as_it_was():
    lm = model_of("gemma2", **CAPPED_OR_SCALED["gemma2"][0])
    inputs = torch.randint(64, (1, 8))
    before, generator = lm(input_ids=inputs, use_cache=False).logits, torch.get_rng_state()
    head_of(lm)
    assert lm.training and torch.equal(torch.get_rng_state(), generator)
    assert torch.equal(lm(input_ids=inputs, use_cache=False).logits, before)


def test_a_configuration_that_names_a_cap_without_having_one_is_not_believed():
    lm = model_of("llama", **LLAMA)
    lm.config.final_logit_softcapping = 30.0
    assert head_of(lm) == Head()


def after_head(lm, change):
    """The model with something done to its logits that no configuration names."""
    own = lm.forward

    def forward(**inputs):
        output = own(**inputs)
        output.logits = change(output.logits)
        return output

    lm.forward = forward
    return lm


@pytest.mark.parametrize(
    "change",
    [
        lambda logits: 50 * torch.tanh(logits / 50),
        lambda logits: logits.clamp(-500, 500),
        lambda logits: logits * 1.001,
        lambda logits: logits[..., :-1],
        lambda logits: logits.log_softmax(-1),
        lambda logits: logits - logits.mean(-1, keepdim=True),
    ],
)
def test_what_no_configuration_names_keeps_its_own_forward(change):
    assert head_of(after_head(model_of("llama", **LLAMA), change)) is None


def test_a_head_that_reads_another_layer_keeps_its_own_forward():
    lm = model_of("llama", **LLAMA)
    lm.lm_head.register_forward_pre_hook(lambda _, inputs: (inputs[0] * 1.01,))
    assert head_of(lm) is None
