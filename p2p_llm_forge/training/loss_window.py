"""The losses between two lines of metrics.jsonl, of all ranks, across a resume."""

from __future__ import annotations

import copy
import math
from typing import Any

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.sync.base import STAY_FINITE

NO_LOSSES: dict[str, Any] = {"nats": [], "updates": 0, "tokens": 0, "is_spoiled": False}


class LossWindow:
    """The losses since the last line of metrics.jsonl, kept update by update.

    They are summed without rounding errors, so the line is the same whether or not the run was
    saved and resumed in between. They leave the device, and this rank, only when asked for.

    step: updates taken so far. since_log: what `since_log` returned then. rolls_back_after: after
    so many updates a loss that is not finite does not end the run, which undoes such rounds.
    """

    def __init__(
        self,
        cluster: Cluster,
        step: int,
        since_log: dict[str, Any],
        rolls_back_after: float = math.inf,
    ) -> None:
        self._cluster = cluster
        self._step, self._rolls_back_after = step, rolls_back_after
        self._since_log = copy.deepcopy(since_log)  # of all ranks
        self._pending: list[torch.Tensor] = []  # of this rank
        self._tokens: list[int] = []  # of all ranks, in each of the pending
        self._lines: list[tuple[int, dict[str, Any]]] = []  # and how many of the pending they end

    def add(self, nats: torch.Tensor, tokens: int) -> None:
        """One more update: this rank's summed loss, a scalar on the device, and the tokens that
        count in all ranks' losses."""
        self._pending.append(nats)
        self._tokens.append(tokens)

    def end_line(self, line: dict[str, Any]) -> None:
        """The updates so far make up this line; `settle` puts in the loss."""
        self._lines.append((len(self._pending), line))

    def has_line(self) -> bool:
        """Whether a line waits for its loss."""
        return bool(self._lines)

    def settle(self) -> list[dict[str, Any]]:
        """The lines that have ended, with all ranks' losses. All ranks must call.

        Raises ForgeError, on all ranks, if a loss is not finite (but see `rolls_back_after`:
        then the line's loss is None).
        """
        by_rank: list[list[float]] = [[]]
        if self._pending:
            by_rank = self._cluster.gather_numbers(torch.stack(self._pending).tolist())
        updates = list(zip(self._tokens, zip(*by_rank, strict=True), strict=True))
        ended, start = [], 0
        for end, line in self._lines:
            self._take(updates[start:end])
            taken, start = self._since_log, end
            loss = math.fsum(taken["nats"]) / taken["tokens"]
            ended.append({**line, "loss": None if taken["is_spoiled"] else loss})
            self._since_log = copy.deepcopy(NO_LOSSES)
        self._take(updates[start:])
        self._pending.clear()
        self._tokens.clear()
        self._lines.clear()
        return ended

    def _take(self, updates: list[tuple[int, tuple[float, ...]]]) -> None:
        for tokens, losses in updates:
            self._step += 1
            self._since_log["updates"] += 1
            self._since_log["tokens"] += tokens
            bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
            if not bad:
                self._since_log["nats"] += losses
            elif self._step > self._rolls_back_after:
                self._since_log["is_spoiled"] = True
            else:
                raise ForgeError(
                    f"the loss became NaN or infinite at step {self._step} (first on rank"
                    f" {bad[0]}); nothing was saved after it and earlier checkpoints are untouched",
                    STAY_FINITE,
                )

    def since_log(self) -> dict[str, Any]:
        """What a resumed run needs, as plain JSON values; after `settle`."""
        # A copy: the background writer reads it while the list grows.
        return copy.deepcopy(self._since_log)
