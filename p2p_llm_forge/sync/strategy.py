"""Builds the strategy that a run asks for; refuses launches, models and checkpoints without it."""

from __future__ import annotations

import hashlib
import platform
from typing import Any

import torch

from p2p_llm_forge.config import TrainConfig, multiples_near
from p2p_llm_forge.errors import ForgeError, Problems
from p2p_llm_forge.files import fingerprint
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.sync.base import Replica, SavedSync, Sync
from p2p_llm_forge.sync.compress import CODECS
from p2p_llm_forge.sync.ddp import GradientAveraging, PowerSGD
from p2p_llm_forge.sync.diloco import DiLoCo
from p2p_llm_forge.sync.forecast import as_flags


def build_strategy(config: TrainConfig, cluster: Cluster, replica: Replica) -> Sync:
    """The strategy that is asked for. Raises ForgeError where the model is too small for it."""
    if config.sync == "diloco":
        return DiLoCo(config, cluster, replica)
    if config.compress == "powersgd":
        return PowerSGD(cluster, replica.model, config.powersgd_rank or 4)
    return GradientAveraging(cluster, replica.model, CODECS[config.compress])


def refuse_elastic(config: TrainConfig, cluster: Cluster) -> None:
    """Raise ForgeError where peers come and go, but could not between this strategy's rounds."""
    if not cluster.launch.is_elastic or config.sync != "diloco":
        return
    if config.fragments > 1:
        raise ForgeError(
            f"--fragments {config.fragments} leaves no moment at which the round ends for the whole"
            " model, so no peer could join or leave an elastic launch",
            "leave --fragments out, or launch with a fixed number of peers",
        )
    if config.save_every % (length := config.round_length()):
        raise ForgeError(
            f"--save-every {config.save_every} is not a multiple of --sync-every {length}, and only"
            " where a round ends can peers join or leave",
            f"use {multiples_near(config.save_every, length)}",
        )


def refuse_unfinished_round(saved: SavedSync, sync: Sync, world_size: int, step: int) -> None:
    """Raise ForgeError if this run cannot resume the round in whose middle the other was saved.

    world_size: ranks of this run; step: updates done in the checkpoint.
    """
    if saved.is_agreed:
        return
    before, now = saved.facts["settings"], sync.settings()
    if before == now and saved.world_size == world_size:
        return
    if saved.is_of(sync) and all(saved.facts["lands_at"]) and {*saved.facts["sent_at"]} == {step}:
        return  # a round has ended; its pseudo-gradients are on their way
    if before["fragments"] > 1:
        other = "change when the run has ended (--max-steps), as all ranks agree then"
    elif before["overlap_steps"] and not saved.is_of(sync):
        other = "change after a round without --overlap-steps, when no pseudo-gradient travels"
    else:
        other = "resume from a checkpoint of the end of a round by --resume FOLDER"
    raise ForgeError(
        f"the checkpoint of step {step} holds a round of {saved.world_size} process(es)"
        f" ({as_flags(before)}) that has not been agreed on, and this run has"
        f" {world_size} ({as_flags(now)})",
        f"resume with {saved.world_size} process(es) and {as_flags(before)}, or {other}",
    )


def refuse_to_end_in_a_round(saved: SavedSync, step: int, total_steps: int) -> None:
    """Raise ForgeError if the run would end with a checkpoint in the middle of a round."""
    if step == total_steps and not saved.is_agreed:
        raise ForgeError(
            f"the run was asked to end after {step} updates, but the checkpoint of step {step} was"
            " saved before its round was agreed on, and its model lacks what the ranks did in it",
            f"take at least one more update with --max-steps {step + 1}",
        )


def refuse_different_models(cluster: Cluster, lm: Any, is_loaded: bool) -> None:
    """Raise ForgeError, naming the ranks, if their models are not the same as rank 0's.

    is_loaded: from files, whose weights must be equal too; weights from scratch are made by the
    seed and may differ in their last bits between kinds of CPUs: rank 0's are taken.
    """
    shapes = {name: list(parameter.shape) for name, parameter in lm.named_parameters()}
    weights = hashlib.sha256()
    if is_loaded:
        parameters = list(lm.parameters())
        # Of a model with adapters, what stays: rank 0's adapters are sent to all.
        frozen = [one for one in parameters if not one.requires_grad]
        for parameter in frozen or parameters:
            weights.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    facts = {"shapes": fingerprint(shapes), "weights": weights.hexdigest()}
    by_rank = cluster.gather_facts({**facts, "host": platform.node()})
    problems = Problems()
    if any(other["shapes"] != by_rank[0]["shapes"] for other in by_rank):
        by_rank = cluster.gather_facts({"shapes": shapes, "host": platform.node()})
    first = by_rank[0]
    for rank, other in enumerate(by_rank):
        where, here, there = f"rank {rank} ({other['host']})", other["shapes"], first["shapes"]
        if here != there:
            name = next(n for n in sorted({*here, *there}) if here.get(n) != there.get(n))
            shape, expected = (one.get(name, "missing") for one in (here, there))
            found = f"has another model than rank 0: {name} is {shape}, not {expected}"
            fix = "give all ranks the same --model-name, --model-type and --config-overrides"
            problems.add(ForgeError(found, fix, where=where))
        elif other.get("weights") != first.get("weights"):
            fix = "copy the model's folder from rank 0 to it"
            problems.add(ForgeError("has loaded other weights than rank 0", fix, where=where))
    problems.raise_any()
