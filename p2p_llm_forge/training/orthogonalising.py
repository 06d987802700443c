"""What the ranks of a run agree on before Muon's first step."""

from __future__ import annotations

from typing import Any

import torch

from p2p_llm_forge.model.muon import DTYPES, Muon, prefers_bfloat16
from p2p_llm_forge.peers.cluster import Cluster


def settle_orthogonalising(optimizer: torch.optim.Optimizer, cluster: Cluster) -> None:
    """Choose in which dtype Muon orthogonalises, the same on all ranks. All must call.

    It is bfloat16 where that is faster on every rank's device, unless the run computes all in
    float32. A run that is resumed goes on in the dtype that it began with: see `load_facts`.
    """
    if not isinstance(optimizer, Muon) or cluster.accelerator.mixed_precision == "no":
        return
    facts = cluster.gather_facts({"prefers_bfloat16": prefers_bfloat16(cluster.device)})
    if all(fact["prefers_bfloat16"] is True for fact in facts):
        optimizer.dtype = torch.bfloat16


def facts_of(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """What a checkpoint holds of the optimizer beside its tensors: JSON, the same on all ranks."""
    if not isinstance(optimizer, Muon):
        return None
    return {"orthogonalised_in": str(optimizer.dtype).removeprefix("torch.")}


def load_facts(optimizer: torch.optim.Optimizer, facts: dict[str, Any] | None) -> None:
    """Put the optimizer where `facts_of` another was."""
    if isinstance(optimizer, Muon) and facts:
        optimizer.dtype = DTYPES[facts["orthogonalised_in"]]
