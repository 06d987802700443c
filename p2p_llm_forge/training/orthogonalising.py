"""What the ranks of a run agree on before Muon's first step."""

from __future__ import annotations

from typing import Any

import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.model.muon import DTYPES, Muon, Team, prefers_bfloat16
from p2p_llm_forge.peers.cluster import Cluster


def settle_orthogonalising(
    config: TrainConfig, optimizer: torch.optim.Optimizer, cluster: Cluster
) -> None:
    """Choose in which dtype Muon orthogonalises, and with whom. All ranks must call.

    It is bfloat16 on all where that is faster on every rank's device, unless the run computes all
    in float32. A run that is resumed goes on in the dtype that it began with: see `load_facts`.
    Ranks of one machine share the work where their gradients are the same, which saves far more
    than the exchange costs; not GPUs that exchange by way of the CPU.
    """
    if not isinstance(optimizer, Muon):
        return
    is_mixed = cluster.accelerator.mixed_precision != "no"
    own = {
        "shares": cluster.device.type == "cpu" or not cluster.is_on_gloo,
        "prefers_bfloat16": is_mixed and prefers_bfloat16(cluster.device),
    }
    facts = cluster.gather_facts(own)  # ranks on CPUs and GPUs may train together
    if config.sync == "ddp" and all(fact["shares"] is True for fact in facts):
        optimizer.team = Team(*cluster.open_local_gather())
    if all(fact["prefers_bfloat16"] is True for fact in facts):
        optimizer.dtype = torch.bfloat16


def in_words(optimizer: torch.optim.Optimizer) -> str | None:
    """How it orthogonalises, for the person who watches; None where it does not."""
    if not isinstance(optimizer, Muon):
        return None
    count = sum(len(group["params"]) for group in optimizer.param_groups[:1])
    shared = f", shared by {optimizer.team.size} processes of a machine"
    return (
        f"muon      for {count} parameters inside the layers, in {dtype_of(optimizer)}"
        f"{shared if optimizer.team.size > 1 else ''}"
    )


def dtype_of(optimizer: Muon) -> str:
    """The name of what it orthogonalises in."""
    return str(optimizer.dtype).removeprefix("torch.")


def facts_of(optimizer: torch.optim.Optimizer) -> dict[str, Any] | None:
    """What a checkpoint holds of the optimizer beside its tensors: JSON, the same on all ranks."""
    if not isinstance(optimizer, Muon):
        return None
    return {"orthogonalised_in": dtype_of(optimizer)}


def load_facts(optimizer: torch.optim.Optimizer, facts: dict[str, Any] | None) -> None:
    """Put the optimizer where `facts_of` another was."""
    if isinstance(optimizer, Muon) and facts:
        optimizer.dtype = DTYPES[facts["orthogonalised_in"]]
