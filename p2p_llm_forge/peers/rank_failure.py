"""What ends one rank without being the user's mistake: a lost peer, too little memory, a disk."""

from __future__ import annotations

import platform

import torch
import torch.distributed as dist

from p2p_llm_forge.errors import ForgeError

# What RuntimeErrors of gloo and NCCL contain when a peer is gone (torch 2.13).
LOST_PEER = (
    *("onnection closed", "onnection reset", "onnection refused", "imed out", "NCCL"),
    *("onnect timeout", "timeout caused pair closure", "connectFullMesh"),  # as groups are opened
)
SEE_THE_OTHER = "see what that process printed as it ended, then continue with --resume auto"


class RankFailure(ForgeError):
    """The end of this rank, of which the others know nothing; every rank prints its own."""

    status = 1
    is_of_this_rank = True


def explain(error: BaseException, rank: int) -> ForgeError | None:
    """What a library or the machine raised as a message of this rank; None if it is a bug."""
    if isinstance(error, ForgeError):
        return error
    if not isinstance(error, RuntimeError | OSError | MemoryError):
        return None
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        found = f"out of memory ({reason})"
        fix = "lower --micro-batch-size (the batch stays the same), or add --gradient-checkpointing"
    elif isinstance(error, dist.DistError) or any(part in text for part in LOST_PEER):
        found = f"lost a peer: it ended, or no exchange came about within --peer-timeout ({reason})"
        fix = "see what the others printed as they ended, then continue with --resume auto"
    elif isinstance(error, OSError):
        found = f"could not read or write: {error}"
        fix = (
            "make it possible (disk, permissions, network share), then continue with --resume auto"
        )
    else:
        return None
    return RankFailure(found, fix, where=f"rank {rank} ({platform.node()})")
