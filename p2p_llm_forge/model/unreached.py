"""What a text never reaches in a model: the part that sees pictures, a layer that sums texts up."""

from __future__ import annotations

import torch

from p2p_llm_forge.model.loss import NextTokenLoss


def freeze_unreached(model: NextTokenLoss, length: int) -> int:
    """Freeze the parameters that get no gradient from a block; returns how many numbers they hold.

    Found by trial, before an optimizer and DDP take parameters up: DDP waits for the gradient of
    every one that it knows, in vain. length: tokens in a block. Source: "Expected to have finished
    reduction in the prior iteration", of torch's DDP.
    """
    was_training, device = model.training, next(model.parameters()).device
    vocabulary = model.lm.get_input_embeddings().num_embeddings
    tokens = torch.arange(length, device=device).remainder(vocabulary).unsqueeze(0)
    devices = [device] if device.type == "cuda" else []
    for in_training in (False, True):  # in evaluation no layer is dropped, but reformer refuses
        model.train(in_training)
        try:
            with torch.random.fork_rng(devices=devices):
                torch.manual_seed(0)
                model(tokens, tokens)[0].backward()
            break
        except AssertionError:
            if in_training:
                raise
    model.train(was_training)
    frozen = [p for p in model.parameters() if p.requires_grad and p.grad is None]
    model.zero_grad()
    for parameter in frozen:
        parameter.requires_grad_(False)
    return sum(parameter.numel() for parameter in frozen)
