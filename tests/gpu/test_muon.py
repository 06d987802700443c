"""Muon's choice of a dtype on a GPU."""

from __future__ import annotations

import torch

from p2p_llm_forge.model.muon import orthogonalised, prefers_bfloat16
from tests.gpu.devices import DEVICE, IS_REHEARSAL, ON_A_GPU

pytestmark = ON_A_GPU


def test_a_card_with_units_for_bfloat16_multiplies_in_it():
    has_units = not IS_REHEARSAL and torch.cuda.is_bf16_supported(including_emulation=False)
    assert prefers_bfloat16(torch.device(DEVICE)) or not has_units


def test_steps_are_orthogonal_in_both_dtypes():
    draw = torch.Generator().manual_seed(0)
    stack = torch.randn(3, 64, 256, generator=draw).to(DEVICE)
    for dtype in (torch.float32, torch.bfloat16):
        values = torch.linalg.svdvals(orthogonalised(stack, dtype).double().cpu())
        assert values.min() > 0.5 and values.max() < 1.3
