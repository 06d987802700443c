"""What gloo, NCCL and the system report becomes a message; bugs stay bugs."""

from __future__ import annotations

import torch
import torch.distributed as dist

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.rank_failure import explain


def test_what_nccl_raises_in_a_backward_is_a_lost_peer():
    error = explain(dist.DistBackendError("NCCL error in: x.cpp\nand a second line"), rank=1)
    assert error.problems[0].found.startswith("lost a peer")
    assert "NCCL error in: x.cpp" in str(error) and "second line" not in str(error)


def test_memory_and_disks_are_told_apart():
    for error in (
        MemoryError(),
        torch.OutOfMemoryError("CUDA"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    ):
        assert "--micro-batch-size" in explain(error, rank=0).problems[0].fix
    assert "read-only" in str(explain(OSError(30, "read-only"), rank=0))


def test_what_is_no_failure_of_the_machine_is_not_explained():
    assert explain(RuntimeError("shapes do not match"), rank=0) is None
    assert explain(RuntimeError("Connection closed by peer"), rank=0) is None, (
        "words decide nothing"
    )
    assert explain(ValueError("timed out"), rank=0) is None
    assert explain(KeyboardInterrupt(), rank=0) is None
    own = ForgeError("found", "fix")
    assert explain(own, rank=0) is own
