"""All ranks orthogonalise in one dtype, and a resumed run in the one that it began with."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.model.optimizer import build_optimizer
from p2p_llm_forge.training import orthogonalising
from p2p_llm_forge.training.orthogonalising import facts_of, load_facts, settle_orthogonalising
from tests.model.families import LLAMA, model_of

ROUNDS = TrainConfig(optimizer="muon", sync="diloco")


@pytest.fixture
def optimizer():
    return build_optimizer(TrainConfig(optimizer="muon"), model_of("llama", **LLAMA))


def cluster(*of_others: bool, precision: str = "bf16") -> SimpleNamespace:
    """This rank's side of a launch with others that answer so."""
    others = [{"prefers_bfloat16": one} for one in of_others]
    return SimpleNamespace(
        device=torch.device("cpu"),
        gather_facts=lambda own: [own, *others],
        world_size=1 + len(others),
        accelerator=SimpleNamespace(mixed_precision=precision),
    )


@pytest.mark.parametrize(
    ("by_rank", "expected"),
    [
        ([True], torch.bfloat16),
        ([False], torch.float32),
        ([True, True], torch.bfloat16),
        ([True, False], torch.float32),
        ([False, True], torch.float32),
    ],
)
def test_it_is_bfloat16_only_where_that_is_faster_on_every_rank(
    monkeypatch, optimizer, by_rank, expected
):
    monkeypatch.setattr(orthogonalising, "prefers_bfloat16", lambda device: by_rank[0])
    settle_orthogonalising(ROUNDS, optimizer, cluster(*by_rank[1:]))
    assert optimizer.dtype is expected


def test_a_run_in_float32_is_all_in_float32(monkeypatch, optimizer):
    monkeypatch.setattr(orthogonalising, "prefers_bfloat16", lambda device: True)
    settle_orthogonalising(ROUNDS, optimizer, cluster(True, precision="no"))
    assert optimizer.dtype is torch.float32


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_resumed_run_orthogonalises_as_it_began(optimizer, dtype):
    optimizer.dtype = dtype
    facts = facts_of(optimizer)
    for other in (torch.float32, torch.bfloat16):
        optimizer.dtype = other
        load_facts(optimizer, facts)
        assert optimizer.dtype is dtype


def test_other_optimizers_have_no_part_in_it():
    adamw = build_optimizer(TrainConfig(), model_of("llama", **LLAMA))
    settle_orthogonalising(ROUNDS, adamw, SimpleNamespace())
    assert facts_of(adamw) is None
    load_facts(adamw, None)
