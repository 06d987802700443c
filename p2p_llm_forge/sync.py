"""How the peers agree on weights. The training loop does not know which way is at work."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from typing import Any

from p2p_llm_forge.cluster import Cluster


@dataclass(frozen=True)
class SyncReport:
    """What one update cost in communication."""

    bytes_sent: int = 0
    seconds: float = 0.0
    peers: int = 1


class AllReduce:
    """Gradients averaged over all ranks in every update, by DDP while backward runs."""

    def __init__(self, cluster: Cluster, model: Any) -> None:
        self._cluster = cluster
        self._model = model
        if cluster.world_size > 1:
            # Set here because the constructor's argument has two names (renamed in torch 2.13). A
            # language model's buffers are constants: sending them in every forward costs a slow
            # link a round trip.
            model.broadcast_buffers = False

    def context(self, is_last_micro_batch: bool) -> AbstractContextManager[Any]:
        """What backward runs in: only an update's last micro-batch exchanges gradients."""
        return (
            nullcontext() if is_last_micro_batch else self._cluster.accelerator.no_sync(self._model)
        )

    def after_update(self, step: int) -> SyncReport:
        """Nothing is left to do: DDP exchanged the gradients during backward."""
        return SyncReport(peers=self._cluster.world_size)

    def state(self) -> dict[str, Any]:
        """Nothing to keep: all ranks hold the same weights after every update."""
        return {}

    def load_state(self, state: dict[str, Any]) -> None:
        """See `state`."""
