"""The chunked loss on a GPU is the loss over all logits, in every precision that one trains in."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.model.loss import chunked_nats
from tests.gpu.devices import DEVICE, IS_REHEARSAL, ON_A_GPU

pytestmark = ON_A_GPU
# Several chunks, of which the last is not full. A CPU is slow in half precision.
TOKENS, WIDTH, VOCABULARY = (400, 8, 50_257) if IS_REHEARSAL else (3_000, 64, 50_257)
# The largest error of the gradients' norm, by dtype: what rounding the operands leaves of it.
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 2e-2, torch.float16: 1e-2}


@pytest.mark.parametrize("dtype", BOUNDS, ids=str)
def test_value_and_gradients_are_those_of_float64(dtype):
    draw = torch.Generator().manual_seed(0)
    hidden = torch.randn(TOKENS, WIDTH, generator=draw)
    weight = 0.3 * torch.randn(VOCABULARY, WIDTH, generator=draw)
    targets = torch.randint(VOCABULARY, (TOKENS,), generator=draw)

    exact = [one.double().requires_grad_() for one in (hidden, weight)]
    expected = torch.nn.functional.cross_entropy(exact[0] @ exact[1].T, targets, reduction="sum")
    expected.backward()

    own = [one.to(DEVICE).requires_grad_() for one in (hidden, weight)]
    with torch.autocast(DEVICE, dtype, enabled=dtype != torch.float32):
        nats = chunked_nats(*own, None, targets.to(DEVICE))
    (2.0 * nats).backward()

    assert nats.device.type == DEVICE and nats.dtype == torch.float32
    assert nats.item() == pytest.approx(expected.item(), rel=BOUNDS[dtype] / 10)
    for ours, theirs in zip(own, exact, strict=True):
        difference = ours.grad.cpu().double() / 2 - theirs.grad
        assert difference.norm() < BOUNDS[dtype] * theirs.grad.norm()
