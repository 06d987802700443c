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
    """An error of a library or of the machine as a message of this rank; None if it is a bug.

    A ForgeError is its own message.
    """
    if isinstance(error, ForgeError):
        return error
    if not isinstance(error, RuntimeError | OSError | MemoryError):
        return None
    where, text = f"rank {rank} ({platform.node()})", str(error).strip()
    first_line = text.splitlines()[0] if text else type(error).__name__
    if isinstance(error, MemoryError | torch.OutOfMemoryError) or "allocate memory" in text:
        return RankFailure(
            f"out of memory ({first_line})",
            "lower --micro-batch-size (the batch stays the same), or add --gradient-checkpointing",
            where=where,
        )
    if isinstance(error, dist.DistError) or any(part in text for part in LOST_PEER):
        return RankFailure(
            "lost a peer: it ended, or no exchange came about within --peer-timeout"
            f" ({first_line})",
            "see what the others printed as they ended, then continue with --resume auto",
            where=where,
        )
    if isinstance(error, OSError):
        return RankFailure(
            f"could not read or write: {error}",
            "make that possible (room on the disk, permissions, the network share), then continue"
            " with --resume auto",
            where=where,
        )
    return None
