"""Whether a run's layers are compiled: as asked, as it has begun, or where a trial says it pays."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.compiling import (
    Trial,
    compiled_by,
    repeated_layers,
    require_compiler,
    take_back,
    try_compiling,
)
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.training.balance import device_clock
from p2p_llm_forge.training.checkpoint import read_state
from p2p_llm_forge.training.job import Job

Switch = Literal["on", "off"]
# What compiling can be hoped to bring on a CPU, and costs there, before it has been tried: a trial
# is made where the hope is worth more than the cost.
HOPED_SHARE, EXPECTED_S = 0.1, 20.0
LEAST_SHARE = 0.03  # of a micro-batch's time; less is noise


def settle_compile(job: Job, model: NextTokenLoss, checkpoint: Path | None) -> Switch:
    """Compile the layers of the model, or leave them.

    All ranks must call, before the model is wrapped, and get the same answer where all are asked
    the same; of others who were asked for auto is not compiled. A run goes on as it has begun, for
    compiled layers round otherwise. Raises ForgeError where --compile was asked for and is not
    possible.
    """
    config, cluster, lm = job.config, job.cluster, model.lm
    asked: str = config.compile
    if checkpoint is not None:
        begun = cluster.main_only(lambda: was_compiled(read_state(checkpoint)["config"]))
        asked = begun if asked == "auto" else asked
    of_launcher = cluster.launch.compile if config.compile != "off" else None
    own = "launcher" if of_launcher else "must" if config.compile == "on" else asked
    known = cluster.gather_facts({"asked": own, "is_on_gpu": cluster.device.type == "cuda"})

    def compile_now() -> None:
        require_compiler(cluster.device)
        compiled_by(lm, lambda: try_all_sizes(job, model))

    def compile_if_told() -> None:
        if of_launcher:
            lm.base_model.compile(**of_launcher)
        elif own == "must":
            compile_now()

    cluster.together(compile_if_told)
    if any(fact["asked"] != own for fact in known):
        is_compiled = own in ("must", "launcher")
    elif own == "on" or (own == "auto" and all(fact["is_on_gpu"] for fact in known)):
        is_compiled = all_can(job, compile_now)
    else:
        is_compiled = pays(job, model) if own == "auto" else own != "off"
    if not is_compiled:
        take_back(lm)
    return "on" if is_compiled else "off"


def was_compiled(recorded: dict[str, Any]) -> Switch:
    """Whether a checkpoint's run was compiled; before there was a choice it was a flag."""
    was = recorded.get("compile")
    return "on" if was in (True, "on") else "off"


def all_can(job: Job, act: Callable[[], object]) -> bool:
    """Whether `act` fails on no rank. Every rank tries, and all get the same answer."""
    reason = ""
    try:
        act()
    except ForgeError as error:
        reason = error.problems[0].found
    reasons = [fact["reason"] for fact in job.cluster.gather_facts({"reason": reason})]
    failed = [(rank, text) for rank, text in enumerate(reasons) if text]
    if failed and job.cluster.is_main:
        rank, text = failed[0]
        print(f"note      not compiled: rank {rank}: {text}", flush=True)
    return not failed


def pays(job: Job, model: NextTokenLoss) -> bool:
    """Whether compiling makes the run shorter: tried where that can be hoped. All ranks must call.

    The layers are compiled afterwards wherever this is true.
    """
    cluster, plan = job.cluster, job.plan
    seconds_left = plan.total_steps * update_s_at_most(job, model)
    can_compile = bool(repeated_layers(model.lm)) and has_compiler(cluster.device)
    known = cluster.gather_numbers([seconds_left, can_compile])
    require_numbers("its updates take, in seconds,", [seconds for seconds, _ in known])
    limits = [job.config.max_seconds or math.inf, 60 * (job.config.minutes or math.inf)]
    longest = min(max(seconds for seconds, _ in known), *limits)
    if HOPED_SHARE * longest < EXPECTED_S or not all(able for _, able in known):
        return False
    trials: list[Trial] = []
    if not all_can(job, lambda: trials.append(trial(job, model))):
        return False
    micro_batches = -(-plan.shares[cluster.rank] // plan.micro_batch_size)
    own = replace(
        trials[0],
        eager_s=trials[0].eager_s * micro_batches,
        compiled_s=trials[0].compiled_s * micro_batches,
    )
    by_rank = cluster.gather_numbers([own.eager_s, own.compiled_s, own.compile_s])
    for numbers in by_rank:
        require_numbers("compiled or not, an update takes it, in seconds,", list(numbers))
    # An update takes as long as the slowest rank.
    slowest = Trial(*(max(column) for column in zip(*by_rank, strict=True)))
    return pays_back(slowest, longest / max(slowest.eager_s, 1e-9))


def pays_back(trial: Trial, updates: float) -> bool:
    """Whether compiling makes so many updates shorter than it takes. trial: of whole updates."""
    saved_s = trial.eager_s - trial.compiled_s
    return saved_s * updates > trial.compile_s and saved_s > LEAST_SHARE * trial.eager_s


def has_compiler(device: torch.device) -> bool:
    """Whether machine code can be made for the device."""
    try:
        require_compiler(device)
    except ForgeError:
        return False
    return True


def trial(job: Job, model: NextTokenLoss) -> Trial:
    """What compiling brings this rank's micro-batches. The layers are compiled afterwards."""
    share = job.plan.shares[job.cluster.rank]
    size = min(job.plan.micro_batch_size, share)
    tried = try_compiling(model.lm, lambda: one_micro_batch(job, model, size), device_clock)
    began = device_clock()
    if left := share % size:  # another shape, which is compiled as well
        one_micro_batch(job, model, left)
    return replace(tried, compile_s=tried.compile_s + device_clock() - began)


def update_s_at_most(job: Job, model: NextTokenLoss) -> float:
    """The seconds of this rank's part of an update, judged by one block: that is never too low."""
    began = device_clock()
    one_micro_batch(job, model, 1)
    return (device_clock() - began) * job.plan.shares[job.cluster.rank]


def try_all_sizes(job: Job, model: NextTokenLoss) -> None:
    """A micro-batch of each size that this rank's part of an update is cut into."""
    share, size = job.plan.shares[job.cluster.rank], job.plan.micro_batch_size
    for blocks in dict.fromkeys((min(size, share), share % size)):
        if blocks:
            one_micro_batch(job, model, blocks)


def one_micro_batch(job: Job, model: NextTokenLoss, blocks: int, length: int | None = None) -> None:
    """A forward and backward of so many blocks, whatever they hold, without an update.

    length: of a block, if not that of the data.
    """
    length, device = length or job.data.manifest.sequence_length, job.cluster.device
    tokens = torch.arange(blocks * length, device=device).view(blocks, length)
    tokens %= job.data.manifest.vocab_size
    with job.cluster.accelerator.autocast():
        nats, _ = model(tokens, tokens)
    (nats / tokens.numel()).backward()
    model.zero_grad()
