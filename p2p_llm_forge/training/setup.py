"""Set a run up: its strategy, model, optimizer and state, from scratch or from a checkpoint."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import as_dict
from p2p_llm_forge.data.held_out import HeldOut, held_out
from p2p_llm_forge.data.splits import VALIDATION
from p2p_llm_forge.model.compiling import keep_between_runs
from p2p_llm_forge.model.lora import lora_in_words
from p2p_llm_forge.model.optimizer import learning_rate_factor
from p2p_llm_forge.shapes import is_count
from p2p_llm_forge.sync.base import Replica, Sync
from p2p_llm_forge.sync.forecast import choose, table
from p2p_llm_forge.sync.outer import settings_of_rounds
from p2p_llm_forge.sync.strategy import build_strategy, refuse_elastic
from p2p_llm_forge.training.balance import Balance
from p2p_llm_forge.training.card import facts_of, machines_of
from p2p_llm_forge.training.checkpoint import read_state
from p2p_llm_forge.training.compilation import was_compiled
from p2p_llm_forge.training.copy_leader import copies_of
from p2p_llm_forge.training.evaluation import blocks_beside
from p2p_llm_forge.training.forecast import as_begun, measure_and_forecast, with_strategy
from p2p_llm_forge.training.gauge import Gauge, new_gauge
from p2p_llm_forge.training.identity import settings_changed
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.learner import Learner, build_learner, new_model, prime
from p2p_llm_forge.training.loss_window import NO_LOSSES, LossWindow
from p2p_llm_forge.training.orthogonalising import in_words
from p2p_llm_forge.training.pace import Pace, paced_learning_rate, saved_pace
from p2p_llm_forge.training.pictures import Pictures, install_line, is_installed
from p2p_llm_forge.training.plan import Plan
from p2p_llm_forge.training.publishing import Uploads
from p2p_llm_forge.training.rehearsal import ending_s, validation_tokens
from p2p_llm_forge.training.run import Run
from p2p_llm_forge.training.run_folder import RunFolder
from p2p_llm_forge.training.samples import Samples
from p2p_llm_forge.training.saving import Saving, resume
from p2p_llm_forge.training.settle import settled_lines
from p2p_llm_forge.training.tracking import introduction, tracking_of

SENT_IN_PLAIN = (
    "note      NCCL sends weights and gradients in plain, the cluster's secret does not cover them:"
    " run it inside a tunnel (WireGuard: docs/security.md), or add --backend gloo"
)
# The trainer's state before the first update.
FROM_SCRATCH = dict(step=0, blocks_read=0, train_loss=None, figures={}, since_log=NO_LOSSES)


@contextlib.contextmanager
def set_up(job: Job, folder: RunFolder) -> Iterator[Run]:
    """The run that the loop works on; at the end, what is being written is finished.

    All ranks must call. The folder is claimed when everything else is known to work.
    """
    job, pace, state = settle_from(job, folder.checkpoint)
    learner = build_learner(job, folder.checkpoint)
    job = as_settled(job, learner)
    cluster, plan = job.cluster, job.plan
    blocks = cluster.together(job.data.train_blocks)
    evaluated = cluster.together(lambda: held_out_of(job))
    sync = build_strategy(job.config, cluster, replica_of(learner, plan, state["step"]))
    prime(job, learner, sync, blocks)
    if saved := folder.checkpoint:
        cluster.together(lambda: resume(saved, state, job, learner, sync))
    tracking = tracking_of(job.config, cluster, folder.confirm)
    run = Run(
        job=job,
        folder=folder,
        learner=learner,
        blocks=blocks,
        held_out=evaluated,
        sync=sync,
        learning_rate_factor=schedule_of(job, pace),
        saving=Saving(job, folder, learner, sync),
        tracking=tracking,
        window=window_of(job, state, sync),
        balance=Balance(plan.shares, job.config.balance == "auto"),
        gauge=gauge_of(job, learner),
        card_facts=facts_of(job, learner.lm, machines_of(cluster), bool(folder.checkpoint)),
        uploads=Uploads(job.config, tracking.say) if uploads_checkpoints(job) else None,
        first_step=state["step"],
        first_position=state["blocks_read"],
        train_loss=state.get("train_loss"),
        figures=state["figures"],
        budget=job.budget,
        pace=pace,
        discarded=state.get("discarded_updates") or 0,
    )
    introduce(run, state)
    if cluster.is_main:
        run.samples = Samples(job, folder, learner.lm, sync, tracking)
        run.pictures = pictures_for(run)
    folder.claim()
    run.saving.copies = copies_of(job, folder, tracking.say)
    rehearse_end(run)
    try:
        yield run
    finally:
        run.close()


def gauge_of(job: Job, learner: Learner) -> Gauge:
    """What the session's time, memory and speed are measured by. All ranks must call."""
    manifest = job.data.manifest
    length, counted = manifest.sequence_length, manifest.share_trained("train")
    return new_gauge(learner.lm, length, job.cluster, job.began, counted)


def settle_from(job: Job, checkpoint: Path | None) -> tuple[Job, Pace | None, dict[str, Any]]:
    """The job with what follows from where the run begins, its pace, and the trainer's state."""
    job = settle_strategy(job, checkpoint)
    state: dict[str, Any] = read_state(checkpoint) if checkpoint else FROM_SCRATCH
    job, pace = settle_pace(job, state)
    return settle_evaluation(job, state), pace, state


def rehearse_end(run: Run) -> None:
    """Find how long evaluation, pictures, samples and saving will take when the time is over."""
    budget = run.budget
    if budget is None or not run.job.cluster.is_main:
        return
    drawing_s = run.pictures.rehearse() if run.pictures else 0.0
    config = run.job.config
    saving_s = ending_s(run.learner.lm, len(config.prompts()), config.merge_lora)
    budget.ending_s = saving_s + drawing_s
    budget.evaluated_tokens = validation_tokens(run.job)


def uploads_checkpoints(job: Job) -> bool:
    """Whether this rank uploads them."""
    return job.cluster.is_main and job.config.push_checkpoints


def pictures_for(run: Run) -> Pictures | None:
    """What draws the run's pictures after every checkpoint; None where it is not to, or cannot."""
    if not run.job.config.pictures:
        return None
    if not is_installed():
        run.tracking.say(
            "note      no pictures of the run: matplotlib is not installed. To have them:"
            f"\n          {install_line('matplotlib')}"
        )
        return None
    pictures = Pictures(run.folder.path, run.folder.may_write, run.tracking.say)
    run.saving.after = pictures.draw_if_due
    return pictures


def schedule_of(job: Job, pace: Pace | None) -> Callable[[int], float]:
    """The fraction of the peak learning rate at every update."""
    if pace:
        return paced_learning_rate(job.config, pace)
    return learning_rate_factor(job.config, job.plan.total_steps)


def window_of(job: Job, state: dict[str, Any], sync: Sync) -> LossWindow:
    """The losses since the last line, as the trainer's state has them."""
    since_log = state.get("since_log") or NO_LOSSES
    # What does not say is of a version before conversations.
    tokens = since_log["updates"] * job.plan.tokens_per_update
    since_log = {"tokens": tokens, **since_log}
    return LossWindow(job.cluster, state["step"], since_log, sync.rounds_begin_after)


def settle_pace(job: Job, state: dict[str, Any]) -> tuple[Job, Pace | None]:
    """The job, and the pace of a run with `--minutes`, as the state of its checkpoint left them."""
    if job.budget is None:
        return job, None
    if pace := saved_pace(state):
        job.budget.resume(state["budget"])
    else:
        pace = Pace([(0, job.plan.total_steps)])
    return replace(job, plan=replace(job.plan, total_steps=pace.total_steps)), pace


def settle_evaluation(job: Job, state: dict[str, Any]) -> Job:
    """The job with how many blocks are evaluated: as asked, else as the run has begun, else as many
    as are quick beside the training. 0: all. state: of the trainer."""
    config, plan = job.config, job.plan
    count = config.eval_blocks
    if count is None and "config" in state:
        begun = state["config"].get("eval_blocks")
        count = begun if is_count(begun) else 0  # older versions took all
    if count is None:
        manifest = job.data.manifest
        split = manifest.splits.get(VALIDATION)
        updates = min(config.eval_every or plan.total_steps, plan.total_steps)
        there, length = split.blocks if split else 0, manifest.sequence_length
        count = blocks_beside(updates * plan.batch_size, there, length)
    return replace(job, config=replace(config, eval_blocks=count))


def held_out_of(job: Job) -> HeldOut | None:
    """What the run evaluates on."""
    return held_out(job.data, job.config.eval_blocks, job.config.trust_remote_code)


def as_settled(job: Job, learner: Learner) -> Job:
    """The job with what `auto` has come to, which is recorded: a resume computes the same."""
    precision = job.cluster.accelerator.mixed_precision
    config = replace(job.config, compile=learner.compile, mixed_precision=precision)
    plan = replace(job.plan, micro_batch_size=learner.micro_batch_size)
    return replace(job, config=config, plan=plan)


def replica_of(learner: Learner, plan: Plan, steps_done: int) -> Replica:
    """What a strategy needs to know of this process's model and of the run."""
    return Replica(
        learner.model,
        learner.lm,
        learner.optimizer,
        total_steps=plan.total_steps,
        steps_done=steps_done,
        tokens_per_update=plan.tokens_per_update,
    )


def settle_strategy(job: Job, checkpoint: Path | None) -> Job:
    """The job with what `--sync auto` comes to: as the run has begun, or what suits the network.

    Raises ForgeError where the launch does not go with the strategy.
    """
    config, cluster = job.config, job.cluster
    if config.sync == "auto" and checkpoint is not None:
        config = as_begun(config, cluster.main_only(lambda: read_state(checkpoint)["config"]))
    elif config.sync == "auto":
        lm = cluster.together(lambda: new_model(job))
        forecasts = measure_and_forecast(job, lm)
        if cluster.is_main:
            print("\n".join(table(forecasts)), flush=True)
        config = with_strategy(config, choose(forecasts).strategy)
    refuse_elastic(config, cluster)
    return replace(job, config=config)


def introduce(run: Run, state: dict[str, Any]) -> None:
    """Show what is about to happen, and what it resumes from: the trainer's state there."""
    say, config, cluster = run.tracking.say, run.job.config, run.job.cluster
    say(introduction(cluster, run.job.data, run.job.plan, run.learner.lm))
    say("\n".join(settled_lines(config)))
    if config.lora_rank:
        say(f"LoRA      of {lora_in_words(run.learner.lm)}")
    built = run.learner.lm.config.model_type
    if config.model_type not in (None, built):
        say(f"note      the causal language model of a {config.model_type} is a {built}")
    if line := in_words(run.learner.bare_optimizer):
        say(line)
    if run.held_out and run.held_out.is_sample:
        say(f"held out  {run.held_out.in_words()}")
    say(run.gauge.in_words())
    if cluster.sends_in_plain:
        say(SENT_IN_PLAIN)
    if config.compile == "on":
        say(f"compiled  layers; later runs find that in {keep_between_runs()}")
    if config.sync == "diloco":
        asked = config.outer_lr, config.outer_momentum
        peers, every = cluster.world_size, config.round_length()
        rate, momentum = settings_of_rounds(*asked, peers, every, config.optimizer)
        say(
            f"rounds    of {config.round_length()} updates; outer rate {rate:.3g} and momentum"
            f" {momentum:.3g}, reached after {config.outer_warmup_rounds} rounds"
        )
        if cluster.world_size == 1:
            say("note      --sync diloco is pointless with one process: nobody to agree with")
    for line in run.budget.words if run.budget else ():
        say(line)
    if run.folder.checkpoint:
        say(f"resuming  after step {run.first_step} from {run.folder.checkpoint}")
        begun = state["config"] | {"compile": was_compiled(state["config"])}
        if begun.get("mixed_precision") == "auto":  # not recorded what it was
            begun["mixed_precision"] = config.mixed_precision
        for line in settings_changed(begun, as_dict(config)):
            say(f"changed   {line}")
