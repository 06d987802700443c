"""Ranks that 'train' by known amounts, and a stand-in for DDP: for strategies without real runs."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import nn

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.sync.base import Replica, SavedSync, Sync, SyncState
from p2p_llm_forge.sync.strategy import build_strategy
from tests.memory_channel import clusters, run_ranks

LAYERS, WIDTH = 3, 7
SIZES = [3 * WIDTH, *[WIDTH] * LAYERS]  # embedding (tied with the head), layers


class Model(nn.Module):
    """A model with layers and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.embedding = nn.Parameter(torch.linspace(-1, 1, 3 * WIDTH))
        self.layers = nn.ModuleList(nn.Linear(WIDTH, 1, bias=False) for _ in range(LAYERS))
        for layer in self.layers:
            nn.init.constant_(layer.weight, 0.5)
        self.tied = self.embedding

    def forward(self) -> torch.Tensor:
        return sum(p.sum() for p in self.parameters())


class LikeDDP(nn.Module):
    """A model as DDP wraps it: gradients go through the registered hook, a bucket a parameter."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module, self.hook = module, None

    def register_comm_hook(self, state: Any, hook: Callable[..., Any]) -> None:
        self.hook = hook

    def backward(self, gradients: Sequence[torch.Tensor]) -> list[torch.Tensor]:
        """Give each parameter's gradient to the hook; returns what it makes of them."""
        pairs = zip(self.parameters(), gradients, strict=True)
        buckets = [Bucket(n, parameter, one) for n, (parameter, one) in enumerate(pairs)]
        futures = [self.hook(None, bucket) for bucket in buckets]
        return [future.wait() for future in futures]


class Bucket:
    """What DDP gives to a hook."""

    def __init__(self, index: int, parameter: nn.Parameter, gradient: torch.Tensor) -> None:
        self._index, self._parameter = index, parameter
        self._buffer = gradient.flatten().clone()

    def index(self) -> int:
        return self._index

    def parameters(self) -> list[nn.Parameter]:
        return [self._parameter]

    def buffer(self) -> torch.Tensor:
        return self._buffer


@dataclass
class Rounds:
    """What ranks do: so many updates on so many tokens each, and what goes wrong meanwhile."""

    updates: int
    tokens: Sequence[int]  # by rank, in each update
    broken: Sequence[tuple[int, int]] = ()  # (rank, update) in which a weight becomes NaN
    stalled: int | None = None  # update after whose sending the network stands still for a moment
    first: int = 0  # update; those before were taken by the run that is resumed
    saved_at: Sequence[int] = ()  # after so many updates


@dataclass
class Trace:
    """What a rank has seen after each update."""

    weights: list[list[float]] = field(default_factory=list)
    bytes_sent: list[int] = field(default_factory=list)
    is_agreed: list[bool] = field(default_factory=list)
    residuals: list[dict[str, list[float]]] = field(default_factory=list)  # when stalled, twice
    discarded: list[list[Any]] = field(default_factory=list)  # round, first and last update, ranks
    saved: dict[int, tuple[dict[str, torch.Tensor], SyncState]] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)


def moved(rank: int, step: int, count: int) -> list[float]:
    """By how much rank `rank` changes its `count` weights in update `step`."""
    return [((rank + 2) * (step + 3) * (number + 5) % 17 - 8) / 64 for number in range(count)]


def residuals_in(state: SyncState) -> dict[str, list[float]]:
    """The residuals of error feedback, as a checkpoint would hold them."""
    return {key: value.tolist() for key, value in state.own.items() if key.startswith("residual_")}


def take_rounds(sync: Sync, lm: nn.Module, rank: int, rounds: Rounds) -> Trace:
    """Take the updates on one rank."""
    trace = Trace(settings=sync.settings())
    for step in range(rounds.first, rounds.updates):
        amounts = moved(rank, step, sum(p.numel() for p in lm.parameters()))
        with torch.no_grad():
            for parameter in lm.parameters():
                own = [amounts.pop(0) for _ in range(parameter.numel())]
                parameter += torch.tensor(own).view_as(parameter)
                if [rank, step] in map(list, rounds.broken):  # which come from JSON, too
                    parameter.flatten()[0] = float("nan")
        if step == rounds.stalled:
            gate = threading.Event()
            sync._channel.in_background(gate.wait, lambda _: None)
            threading.Timer(0.3, gate.set).start()
        report = sync.after_update(step, rounds.tokens[rank])
        trace.weights.append([x for p in lm.parameters() for x in p.flatten().tolist()])
        trace.bytes_sent.append(report.bytes_sent)
        if one := report.discarded:
            trace.discarded.append([one.round, one.updates[0], one.updates[-1], one.ranks])
        trace.is_agreed.append(sync.is_agreed())
        if step == rounds.stalled:
            trace.residuals = [residuals_in(sync.state()), residuals_in(sync.state())]
        if step + 1 in rounds.saved_at:
            state = sync.state()
            with sync.agreed_weights():
                agreed = {key: value.clone() for key, value in lm.state_dict().items()}
            trace.saved[step + 1] = agreed, state
    return trace


def rounds_in_memory(rounds: Rounds, before: list[Trace] | None = None, **settings: Any) -> list:
    """The ranks' traces. before: of the run whose checkpoint of update `first` is resumed."""
    config = TrainConfig("data", "run", **{"sync": "diloco", **settings})

    def act(cluster: Any) -> Trace:
        lm = Model()
        if before:
            lm.load_state_dict(before[0].saved[rounds.first][0])
        replica = Replica(
            LikeDDP(lm), lm, torch.optim.SGD(lm.parameters(), lr=0.1), rounds.updates, rounds.first
        )
        sync = build_strategy(config, cluster, replica)
        if before:
            sync.load_state(saved_sync(before, rounds.first))
        return take_rounds(sync, lm, cluster.rank, rounds)

    with clusters(len(rounds.tokens)) as ranks:
        return run_ranks(ranks, act)


def saved_sync(traces: list[Trace], step: int) -> SavedSync:
    """What a checkpoint of all ranks after `step` updates would hold."""
    states = [trace.saved[step][1] for trace in traces]
    facts = json.loads(json.dumps({**states[0].facts, "settings": traces[0].settings}))
    return SavedSync(facts, states[0].shared, lambda rank: states[rank].own)


def resumed(rounds: Rounds, at: int) -> Rounds:
    """The same from update `at` on."""
    return replace(rounds, first=at, saved_at=())
