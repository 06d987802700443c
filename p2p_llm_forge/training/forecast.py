"""How fast a run would be by each strategy: its own model and links are measured, then forecast."""

from __future__ import annotations

import math
from dataclasses import asdict, replace
from typing import Any

from p2p_llm_forge.config import OF_DILOCO, TrainConfig
from p2p_llm_forge.config.sync import ROUND_LENGTH
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.links import Links, measure_links
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.sync.forecast import CANDIDATES, Forecast, Measured, Strategy, forecast
from p2p_llm_forge.sync.outer import units_of
from p2p_llm_forge.sync.strategy import refuse_elastic
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.trial import ONE_TRIAL, Trial, take_turns

# Rounds of a run with `--minutes`, at least: only where one ends is it decided when the run does.
ROUNDS = 10
# That an update is timed for, or by so many micro-batches; and the most, without --minutes.
COMPUTING_S, ENOUGH, MOST_COMPUTING_S = 2.0, 20, 60.0


def measure_and_forecast(job: Job, lm: Any) -> list[Forecast]:
    """Measure links and computing, and forecast. All ranks must call. lm: as for `computing_s`."""
    return forecasts(job, lm, measure_links(job.cluster), update_s_by_rank(job, lm))


def update_s_by_rank(job: Job, lm: Any) -> list[float]:
    """What every rank computes for an update, in seconds; all ranks must call. lm: see below."""
    own_s = job.cluster.together(lambda: computing_s(job, lm))
    by_rank = [seconds for (seconds,) in job.cluster.gather_numbers([own_s])]
    require_numbers("an update takes it, in seconds,", by_rank)
    return by_rank


def computing_s(job: Job, lm: Any) -> float:
    """Seconds that this rank computes for its share of one update, without any exchange.

    lm: a model as the run would train it; it takes a few updates and is to be thrown away.
    """
    share = job.plan.shares[job.cluster.rank] * job.data.manifest.sequence_length
    most_s = ONE_TRIAL * job.budget.seconds if job.budget else MOST_COMPUTING_S
    trial = Trial(job, lm, job.data.train_blocks(), most_s)
    take_turns([trial], COMPUTING_S, ENOUGH)
    token_s, update_s = trial.figures()
    return share * token_s + update_s


def forecasts(job: Job, lm: Any, links: Links, update_s: list[float]) -> list[Forecast]:
    """What every strategy that this run could take would bring, most exact first.

    All ranks must call. links, update_s: as measured, the same on all ranks, which then get the
    same answer.
    """
    cluster, plan = job.cluster, job.plan
    latencies = [one for row in links.latency_s for one in row if not math.isnan(one)]
    # Peers of both kinds may train together, and all must come to the same answer.
    on_cpu = cluster.gather_numbers([cluster.device.type == "cpu"])
    measured = Measured(
        parameters=sum(p.numel() for p in lm.parameters() if p.requires_grad),
        update_s=max(update_s),
        tokens_per_update=plan.tokens_per_update,
        peers=cluster.world_size,
        bytes_per_s=links.slowest()[2] if latencies else math.inf,
        latency_s=max(latencies, default=0.0),
        micro_batches=-(-max(plan.shares) // plan.micro_batch_size),
        is_on_cpu=any(is_on_cpu for (is_on_cpu,) in on_cpu),
    )
    updates, most = plan.total_steps if job.budget else math.inf, len(units_of(lm))
    possible = [one for one in candidates(job, updates) if one.fragments <= most]
    return [forecast(one, measured) for one in possible]


def candidates(job: Job, updates: float) -> list[Strategy]:
    """The strategies that go with the run's other settings, most exact first.

    updates: of a run with `--minutes`, for which rounds have to be short.
    """
    found = (in_short_rounds(job, one, updates) for one in CANDIDATES)
    return list(dict.fromkeys(one for one in found if one))


def in_short_rounds(job: Job, strategy: Strategy, updates: float) -> Strategy | None:
    """The strategy in rounds of a tenth of the updates or less.

    None where no such rounds go with the run's other settings.
    """
    lengths, longest = [strategy.sync_every], updates / ROUNDS
    if lengths[0] > max(1, longest):
        lengths = list(range(max(1, int(longest)), 0, -1))
    shorter = (replace(strategy, sync_every=length) for length in lengths)
    return next((one for one in shorter if is_possible(job, one)), None)


def round_length_for(job: Job, updates: int) -> int | None:
    """Updates of a round of a run with `--minutes`, where `--sync-every` is not given.

    None where the run's other settings allow none that is short enough.
    """
    config = job.config
    lasting = config.fragments, config.overlap_steps
    usual = Strategy("diloco", config.compress, ROUND_LENGTH, *lasting)
    found = in_short_rounds(job, usual, updates)
    return found.sync_every if found else None


def is_possible(job: Job, strategy: Strategy) -> bool:
    """Whether the run's other settings go with that strategy."""
    config = with_strategy(job.config, strategy)
    try:
        config.problems().raise_any()
        refuse_elastic(config, job.cluster)
    except ForgeError:
        return False
    return True


def with_strategy(config: TrainConfig, strategy: Strategy) -> TrainConfig:
    """The same run, its peers kept in step by that strategy."""
    chosen: dict[str, Any] = asdict(strategy)
    if strategy.sync == "ddp":
        chosen["sync_every"] = None
    return replace(config, **chosen)


def as_begun(config: TrainConfig, begun: dict[str, Any]) -> TrainConfig:
    """The same run, its peers kept in step as by `begun`, the configuration in a checkpoint."""
    of_rounds = OF_DILOCO if begun.get("sync") == "diloco" else ()
    names = ("sync", "compress", "powersgd_rank", *of_rounds)
    settled = replace(config, **{name: begun[name] for name in names if name in begun})
    before = {problem.found for problem in config.problems().found}
    if settled.sync == "auto" or {one.found for one in settled.problems().found} - before:
        raise ForgeError(
            "the checkpoint does not say how its peers were kept in step",
            "name the strategy: --sync ddp or --sync diloco",
        )
    return settled
