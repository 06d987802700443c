"""What of a round survives in a checkpoint, and from which checkpoints a run may resume."""

from __future__ import annotations

from typing import Any

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.sync.base import SavedSync, Sync
from p2p_llm_forge.sync.compressed_allreduce import OF_SENDING, OF_SUM


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


def as_flags(settings: dict[str, Any]) -> str:
    """A strategy's settings as one types them."""
    return " ".join(f"--{name.replace('_', '-')} {value}" for name, value in settings.items())


def redistributed_residuals(
    saved: SavedSync, rank: int, world_size: int
) -> dict[str, torch.Tensor]:
    """The residuals of error feedback that rank `rank` of `world_size` resumes with, by parameter,
    where the vectors are now cut into other shards. The sum over all ranks stays the same."""
    residuals: dict[str, torch.Tensor] = {}
    for other in range(rank, saved.world_size, world_size):
        for key, residual in saved.own_of(other).items():
            if key.startswith((OF_SENDING, OF_SUM)):
                name = OF_SENDING + key.partition(".")[2]
                residuals[name] = residuals[name] + residual if name in residuals else residual
    return residuals
