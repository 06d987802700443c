"""What a text does not reach stays as it is, and no rank waits for its gradient."""

from __future__ import annotations

import torch

from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.model.unreached import freeze_unreached
from tests.model.families import FAMILIES, SIZES, model_of

SEES = {
    **{"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2},
    **{"intermediate_size": 16, "image_size": 28, "patch_size": 14},
}


def reached(module):
    """The oracle: the names of the parameters that another text gives a gradient."""
    torch.manual_seed(5)
    module(torch.randint(64, (2, 12)), torch.randint(64, (2, 12)))[0].backward()
    names = {name for name, p in module.lm.named_parameters() if p.grad is not None}
    module.zero_grad()
    return names


def trained(module):
    return {name for name, p in module.lm.named_parameters() if p.requires_grad}


def test_the_part_that_sees_pictures_is_not_trained():
    sizes = {**SIZES, "intermediate_size": 48, "num_key_value_heads": 1, "head_dim": 16}
    lm = model_of("gemma3", text_config=sizes, vision_config=SEES, mm_tokens_per_image=4)
    module = NextTokenLoss(lm)
    expected = reached(module)
    frozen = freeze_unreached(module, length=12)
    assert trained(module) == expected
    assert not any("vision" in name for name in expected) and any("q_proj" in n for n in expected)
    assert frozen == sum(p.numel() for p in lm.parameters() if not p.requires_grad) > 0


def test_a_layer_that_sums_a_text_up_is_not_trained():
    module = NextTokenLoss(model_of("big_bird", **SIZES, intermediate_size=48))
    freeze_unreached(module, length=12)
    left = {name for name, _ in module.lm.named_parameters()} - trained(module)
    assert left and all("pooler" in name for name in left)


def test_a_model_that_a_text_reaches_everywhere_is_left_as_it_is():
    module = NextTokenLoss(model_of("gpt2", **FAMILIES["gpt2"][0])).train()
    generator = torch.get_rng_state()
    assert freeze_unreached(module, length=12) == 0
    assert module.training and torch.equal(torch.get_rng_state(), generator)
    assert all(p.requires_grad and p.grad is None for p in module.parameters())


def test_a_family_without_gradients_in_evaluation_is_tried_in_training():
    sizes = {**SIZES, "attention_head_size": 16, "feed_forward_size": 48, "is_decoder": True}
    sizes |= {"axial_pos_embds_dim": [8, 24], "axial_pos_shape": [4, 8]}
    module = NextTokenLoss(model_of("reformer", **sizes)).train()
    freeze_unreached(module, length=32)
    assert module.training
    left = {name for name, _ in module.lm.named_parameters()} - trained(module)
    assert left == {"lm_head.bias"}  # it makes one, and does not use it
