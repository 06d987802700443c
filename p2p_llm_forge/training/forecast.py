"""What a run would make of this network: its own model and links measured, then forecast."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch

from p2p_llm_forge.config import OF_DILOCO, TrainConfig
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.data.order import Plan
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.links import Links, measure_links
from p2p_llm_forge.sync import forecast as advice
from p2p_llm_forge.sync.outer import units_of
from p2p_llm_forge.sync.strategy import refuse_elastic

FEWEST_MICRO_BATCHES, COMPUTING_S = 3, 2.0  # that an update is timed by: either ends it
STRATEGY_FIELDS = ("sync", "compress", "sync_every", "fragments", "overlap_steps")


def computing_s(
    config: TrainConfig, cluster: Cluster, data: PreparedDataset, plan: Plan, lm: Any
) -> float:
    """Seconds that this rank computes for its share of one update, without any exchange.

    lm: a model as the run would train it; it takes a few updates and is to be thrown away.
    """
    from p2p_llm_forge.model.loss import NextTokenLoss
    from p2p_llm_forge.model.optimizer import build_optimizer

    if config.gradient_checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    document_end = data.manifest.eos_token_id if config.document_mask else None
    model = NextTokenLoss(lm.to(cluster.device), document_end).train()
    optimizer, blocks = build_optimizer(config, lm), data.train_blocks()
    numbers = range(min(plan.micro_batch_size, len(blocks)))
    inputs, targets = (
        torch.from_numpy(a).to(cluster.device) for a in blocks.inputs_and_targets(numbers)
    )

    def micro_batch() -> None:
        with cluster.accelerator.autocast():
            nats, _ = model(inputs, targets)
        (nats / targets.numel()).backward()

    def update() -> None:
        optimizer.step()
        optimizer.zero_grad()

    seconds(micro_batch)  # the first of each makes buffers and moments
    seconds(update)
    spent = [seconds(micro_batch)]
    while len(spent) < FEWEST_MICRO_BATCHES or (sum(spent) < COMPUTING_S and len(spent) < 20):
        spent.append(seconds(micro_batch))
    micro_batches = -(-plan.shares[cluster.rank] // plan.micro_batch_size)
    return sorted(spent)[len(spent) // 2] * micro_batches + seconds(update)


def seconds(act: Callable[[], object]) -> float:
    """How long `act` takes, with all that it leaves to a device."""
    started = time.perf_counter()
    act()
    if torch.accelerator.is_available():
        torch.accelerator.synchronize()
    return time.perf_counter() - started


def update_s_by_rank(
    config: TrainConfig, cluster: Cluster, data: PreparedDataset, plan: Plan, lm: Any
) -> list[float]:
    """What every rank computes for an update, in seconds; all ranks must call. lm: as above."""
    own_s = cluster.together(lambda: computing_s(config, cluster, data, plan, lm))
    return [told for (told,) in cluster.gather_numbers([own_s])]


def forecasts(
    config: TrainConfig, cluster: Cluster, plan: Plan, lm: Any, links: Links, update_s: list[float]
) -> list[advice.Forecast]:
    """What every strategy that this run could take would bring, most exact first.

    All ranks must call. links, update_s: as measured, the same on all ranks, which then get the
    same answer.
    """
    trained = [p for p in lm.parameters() if p.requires_grad]
    latencies = [one for row in links.latency_s for one in row if not math.isnan(one)]
    # Peers of both kinds may train together, and all must come to the same answer.
    on_cpu = cluster.gather_numbers([float(cluster.device.type == "cpu")])
    known = advice.Measured(
        parameters=sum(p.numel() for p in trained),
        update_s=max(update_s),
        tokens_per_update=plan.tokens_per_update,
        peers=cluster.world_size,
        bytes_per_s=links.slowest()[2] if latencies else math.inf,
        latency_s=max(latencies, default=0.0),
        micro_batches=-(-max(plan.shares) // plan.micro_batch_size),
        is_on_cpu=any(told for (told,) in on_cpu),
    )
    possible = [way for way in advice.CANDIDATES if is_possible(config, cluster, lm, way)]
    return [advice.forecast(way, known) for way in possible]


def outlook(
    config: TrainConfig, cluster: Cluster, data: PreparedDataset, plan: Plan, lm: Any
) -> list[advice.Forecast]:
    """Measure links and computing, and forecast. All ranks must call. lm: as for `computing_s`."""
    links = measure_links(cluster)
    update_s = update_s_by_rank(config, cluster, data, plan, lm)
    return forecasts(config, cluster, plan, lm, links, update_s)


def with_strategy(config: TrainConfig, way: advice.Strategy) -> TrainConfig:
    """The same run, its peers kept in step in that way."""
    chosen = {name: getattr(way, name) for name in STRATEGY_FIELDS}
    if chosen["sync"] == "ddp":
        chosen["sync_every"] = None
    return replace(config, **chosen)


def as_begun(config: TrainConfig, begun: dict[str, Any]) -> TrainConfig:
    """The same run, its peers kept in step as they were so far.

    begun: the configuration in a checkpoint; settings that are younger than it have defaults.
    """
    names = ["sync", "compress", "powersgd_rank"]
    if begun.get("sync") == "diloco":
        names += OF_DILOCO
    return replace(config, **{name: begun.get(name, getattr(TrainConfig, name)) for name in names})


def is_possible(config: TrainConfig, cluster: Cluster, lm: Any, way: advice.Strategy) -> bool:
    """Whether the run's other settings go with that strategy."""
    asked = with_strategy(config, way)
    try:
        asked.problems().raise_any()
        refuse_elastic(asked, cluster)
    except ForgeError:
        return False
    return way.fragments <= len(units_of(lm))
