"""What gloo, NCCL and the system report becomes a message; bugs stay bugs."""

from __future__ import annotations

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.rank_failure import explain


@pytest.mark.parametrize(
    "text",
    [
        "[gloo/transport/tcp/pair.cc:521] Connection closed by peer [10.0.0.2]:39341",
        "Connection reset by peer",
        "Timed out waiting 30000ms for recv operation to complete",
        "Connect timeout: connection refused\nand a second line",
        "Gloo connectFullMesh failed with [gloo/transport/tcp/pair.cc:144] Connect timeout [::1]:1",
        "[gloo/transport/tcp/pair.cc:557] Application timeout caused pair closure",
        "NCCL error in: ../torch/csrc/distributed",
    ],
)
def test_a_lost_peer_has_many_names(text):
    error = explain(RuntimeError(text), rank=1)
    assert error.problems[0].found.startswith("lost a peer")
    assert text.splitlines()[0] in str(error) and "second line" not in str(error)


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
    assert explain(ValueError("timed out"), rank=0) is None
    assert explain(KeyboardInterrupt(), rank=0) is None
    own = ForgeError("found", "fix")
    assert explain(own, rank=0) is own
