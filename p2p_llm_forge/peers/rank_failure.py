"""What ends one rank without being the user's mistake: a lost peer, too little memory, a disk.

torch is imported where it is used: launch/elastic.py answers at once.
"""

from __future__ import annotations

import platform

from p2p_llm_forge.errors import ForgeError

NOT_MET = 3  # exit status of a rank of an elastic launch that could not meet the others
SEE_THE_OTHER = "see what that process printed as it ended, then continue with --resume auto"
SEE_THE_NETWORK = "python check_cluster.py names who cannot reach whom; continue with --resume auto"


class RankFailure(ForgeError):
    """The end of this rank, of which the others know nothing; every rank prints its own."""

    status = 1
    is_of_this_rank = True


class LostPeer(RankFailure):
    """A peer is gone, and so is the run. ranks: which, as far as heartbeats show."""

    leaves_threads = True

    def __init__(self, rank: int, found: str, ranks: list[int]) -> None:
        """rank: the one that found it."""
        where = f"rank {rank} ({platform.node()})"
        super().__init__(found, SEE_THE_OTHER if ranks else SEE_THE_NETWORK, where=where)
        self.ranks = ranks


def is_out_of_memory(error: BaseException) -> bool:
    """Whether a process or a GPU has no memory left."""
    import torch

    is_named = isinstance(error, MemoryError | torch.OutOfMemoryError)
    return is_named or "allocate memory" in str(error)


def explain(error: BaseException, rank: int) -> ForgeError | None:
    """What a library or the machine raised as a message of this rank; None if it is a bug."""
    import torch.distributed as dist

    if isinstance(error, ForgeError):
        return error
    if not isinstance(error, RuntimeError | OSError | MemoryError):
        return None
    text = str(error).strip()
    reason = text.splitlines()[0] if text else type(error).__name__
    if is_out_of_memory(error):
        found = f"out of memory ({reason})"
        fix = "lower --micro-batch-size (the batch stays the same), or add --gradient-checkpointing"
    elif isinstance(error, dist.DistError):  # NCCL's, which carries DDP's gradients by itself
        return LostPeer(rank, f"lost a peer: an exchange broke off ({reason})", [])
    elif isinstance(error, OSError):
        found = f"could not read or write: {error}"
        fix = (
            "make it possible (disk, permissions, network share), then continue with --resume auto"
        )
    else:
        return None
    return RankFailure(found, fix, where=f"rank {rank} ({platform.node()})")
