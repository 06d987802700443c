"""A run while it trains: what the loop works on, and what it does between the updates."""

from __future__ import annotations

import contextlib
import math
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch

from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.data.held_out import HeldOut
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.peers.rank_failure import is_out_of_memory
from p2p_llm_forge.sync.base import STAY_FINITE, Discarded, Sync, SyncReport
from p2p_llm_forge.training.balance import Balance
from p2p_llm_forge.training.budget import Budget
from p2p_llm_forge.training.card import CardFacts
from p2p_llm_forge.training.checkpoint import checkpoint_dir
from p2p_llm_forge.training.evaluation import evaluate_blocks
from p2p_llm_forge.training.gauge import Gauge
from p2p_llm_forge.training.interruptions import NOTHING, SAVE_NOW
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.learner import Learner
from p2p_llm_forge.training.loss_window import LossWindow
from p2p_llm_forge.training.pace import MOST_UPDATES, Pace
from p2p_llm_forge.training.pictures import Pictures
from p2p_llm_forge.training.publishing import Uploads
from p2p_llm_forge.training.results import TrainResult
from p2p_llm_forge.training.run_folder import RunFolder, published_names
from p2p_llm_forge.training.samples import Samples
from p2p_llm_forge.training.saving import Saving
from p2p_llm_forge.training.tracking import Silent


class Clock:
    """The seconds since `start`, without those in which it was paused."""

    _started = _paused_s = 0.0

    def start(self) -> None:
        self._started = time.perf_counter()

    @property
    def seconds(self) -> float:
        return time.perf_counter() - self._started - self._paused_s

    @contextlib.contextmanager
    def paused(self) -> Iterator[None]:
        began = time.perf_counter()
        try:
            yield
        finally:
            self._paused_s += time.perf_counter() - began


@dataclass(frozen=True)
class Due:
    """What the loop does between one update and the next."""

    evaluate: bool
    save: bool
    stop: bool


@dataclass
class Run:
    """Everything that the loop works on, and what it has come to so far."""

    job: Job
    folder: RunFolder
    learner: Learner
    blocks: Blocks  # of the training split
    held_out: HeldOut | None  # what is evaluated on, the same at every evaluation
    sync: Sync
    learning_rate_factor: Callable[[int], float]
    saving: Saving
    tracking: Silent
    window: LossWindow
    balance: Balance
    gauge: Gauge
    card_facts: CardFacts

    first_step: int  # of this process; not 0 where it has resumed
    first_position: int  # of that update in the stream of blocks
    train_loss: float | None  # of the last line in metrics.jsonl
    figures: dict[str, Any]  # of the evaluation after the last update, if there was one

    uploads: Uploads | None = None  # of checkpoints; on the main process
    budget: Budget | None = None  # with --minutes
    pace: Pace | None = None  # the same
    samples: Samples | None = None  # on the main process
    pictures: Pictures | None = None  # the same, if asked for and possible
    discarded: int = 0  # updates that ranks took and gave up again, of the whole run
    grad_norm: float | torch.Tensor = 0.0  # of the last update; on the device
    meter: SyncReport = field(default_factory=SyncReport)  # of all updates
    clock: Clock = field(default_factory=Clock)  # of the updates, without evaluations and saves
    micro_batch_size: int = 0  # planned; of this rank smaller once memory was too small for it
    is_exchanging: bool = False  # whether gradients travel, so that no update can begin again
    forward_s: float = 0.0  # of this rank's forwards since the last `agree`

    def __post_init__(self) -> None:
        self.micro_batch_size = self.micro_batch_size or self.job.plan.micro_batch_size

    def start(self) -> None:
        """The first update is about to be taken."""
        self.tracking.start(self.first_step, self.total_steps, self.gauge.began)
        if self.samples:
            self.samples.start(self.first_step)
        self.saving.copies.start(self.first_step)
        self.clock.start()
        self.gauge.start()
        if self.budget:
            self.budget.start(self.first_step)

    @property
    def total_steps(self) -> int:
        """Updates after which the run ends; with `--minutes`, as was decided last."""
        return self.pace.total_steps if self.pace else self.job.plan.total_steps

    def is_due(self, done: int, every: int) -> bool:
        """Whether what is done every so many updates (0: only after the last) is done now."""
        return done == self.total_steps or bool(every and done % every == 0)

    def due_after(self, done: int, asked: int) -> Due:
        """What is due after `done` updates. asked: what the ranks ask for (interruptions.py)."""
        config = self.job.config
        stop = asked not in (NOTHING, SAVE_NOW) and done < self.total_steps
        return Due(
            evaluate=self.is_due(done, config.eval_every) and not stop,
            save=self.is_due(done, config.save_every) or asked == SAVE_NOW or stop,
            stop=stop,
        )

    def position_of(self, step: int) -> int:
        """Where update `step` begins in the stream of blocks."""
        return self.first_position + (step - self.first_step) * self.job.plan.batch_size

    def go_smaller(self, error: Exception) -> None:
        """Halve the micro-batch after `error`, for want of memory; the update is begun again.

        Raises the error where it is of another kind, or nothing is left to halve.
        """
        was, asked = self.micro_batch_size, self.job.config.micro_batch_size
        if asked != "auto" or was == 1 or self.is_exchanging or not is_out_of_memory(error):
            raise error
        self.micro_batch_size = -(-was // 2)
        self.learner.optimizer.zero_grad()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        self.tracking.say(
            f"warning: out of memory with micro-batches of {was}; the same updates go on with"
            f" {self.micro_batch_size}"
        )

    def agree(self, asked: int, done: int) -> int:
        """What the ranks ask for: the largest of their numbers (interruptions.py), on all ranks.

        All ranks must call, after the same number of updates, `done`. They learn each other's speed
        with it, and after how many updates the run ends now. Raises ForgeError on all of them if
        another process has taken the run's folder over.
        """
        total_steps = 0
        if self.budget and self.pace:
            length = self.job.data.manifest.sequence_length
            shares = [length * blocks for blocks in self.balance.shares]
            total_steps = self.budget.decide(done, self.pace, shares)
            if self.job.config.save_every and self.budget.is_save_due():
                asked = max(asked, SAVE_NOW)
        memory = self.gauge.memory_peak
        own = [asked, self.forward_s, self.folder.is_lost, total_steps, memory]
        wishes, forwards_s, are_lost, totals, memories = zip(
            *self.job.cluster.gather_numbers(own), strict=True
        )
        self.forward_s = 0.0
        require_numbers("it asks for", wishes, are_whole=True, most=64)
        require_numbers("its seconds are", forwards_s)
        require_numbers("its memory is", memories)
        self.gauge.worst_memory_peak = max(memories)
        self.balance.measured(list(forwards_s))
        if any(are_lost):
            self.folder.on_keepers(self.folder.confirm)
        if self.pace and totals[0]:
            self.end_after(done, totals[0])
        return int(max(wishes))

    def end_after(self, done: int, total_steps: float) -> None:
        """The run ends after so many updates, as rank 0 has decided after `done`."""
        what = "the run ends after updates, in number"
        require_numbers(what, [total_steps], done + 1, MOST_UPDATES, are_whole=True)
        assert self.pace is not None
        self.pace.decide(done, int(total_steps))
        self.sync.end_after(int(total_steps))
        self.tracking.expect(int(total_steps))

    def end_line(self, step: int, grad_norm: float) -> None:
        """End a line of metrics.jsonl after `step` updates; its loss is put in by `log_lines`."""
        tokens_per_update, updates = self.job.plan.tokens_per_update, step - self.first_step
        spent_s = self.clock.seconds
        tokens_per_second = updates * tokens_per_update / spent_s
        line: dict[str, Any] = {
            "step": step,
            "learning_rate": self.job.learning_rate * self.learning_rate_factor(step - 1),
            "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
            "tokens": step * tokens_per_update,
            "epoch": self.position_of(step) / len(self.blocks),
            "tokens_per_second": tokens_per_second,
            **self.gauge.figures(updates, self.total_steps - step, tokens_per_second),
            "peers": self.job.cluster.world_size,
            **self.meter.figures(spent_s, updates),
            **self.saving.copies.figures(),
        }
        if self.budget:
            line["seconds_left"] = max(0.0, self.budget.left_s)
        if self.job.cluster.world_size > 1:
            line["shares"] = self.balance.shares
        if self.first_step:
            line["resumed_from"] = self.first_step
        if self.discarded:
            line["discarded_updates"] = self.discarded
        self.window.end_line(line)

    def log_lines(self) -> None:
        """Write the lines that have ended. Raises ForgeError where a loss is not finite."""
        for line in self.window.settle():
            self.train_loss = line["loss"]
            self.tracking.log({**line, "memory_peak_bytes": self.gauge.worst_memory_peak or None})

    def evaluate(self, step: int) -> dict[str, Any]:
        """The figures on the held-out blocks after `step` updates; empty without any."""
        job, held_out = self.job, self.held_out
        if held_out is None:
            return {}
        # What ranks have halved for want of memory is theirs alone; an evaluation is of all.
        sizes = [one for (one,) in job.cluster.gather_numbers([self.micro_batch_size])]
        require_numbers("its micro-batches are", sizes, 1, are_whole=True)
        fits = int(min(sizes))
        with self.sync.agreed_weights():
            figures = evaluate_blocks(self.learner.bare_model, held_out, fits, job.cluster)
        self.tracking.log({"step": step, **figures})
        return figures

    def evaluate_and_save(self, step: int, due: Due) -> None:
        """Do what is due of both. What is saved holds the figures of its own weights, if any."""
        self.require_finite(step)
        began = time.perf_counter()
        self.figures = self.evaluate(step) if due.evaluate else {}
        if due.evaluate and self.budget:
            self.budget.evaluation_s = time.perf_counter() - began
        if due.evaluate and self.samples:
            self.samples.take(step)
        if not due.save:
            return
        state = {
            "blocks_read": self.position_of(step),
            "tokens": step * self.job.plan.tokens_per_update,
            "train_loss": self.train_loss,
            "figures": self.figures,
            "since_log": self.window.since_log(),
            "micro_batch_size": self.micro_batch_size,
            "discarded_updates": self.discarded,
        }
        if self.budget and self.pace:
            self.budget.saved()
            state["budget"] = self.budget.state(self.pace)
        if failed := self.saving.save(step, state, self.upload_of(step)):
            self.tracking.say(f"warning: {failed}; training continues")

    def upload_of(self, step: int) -> Callable[[Path], None] | None:
        """What uploads the checkpoint after `step` updates, if it is asked for."""
        uploads = self.uploads
        if uploads is None or step == self.total_steps:  # the end has an upload of its own
            return None
        tokens, processes = step * self.job.plan.tokens_per_update, self.job.cluster.world_size
        result = TrainResult(
            str(self.folder.path), step, tokens, self.train_loss, None, processes, **self.figures
        )
        card = self.folder.card(result, self.card_facts)
        return lambda saved: uploads.start(step, saved, published_names(saved), card)

    def require_finite(self, step: int) -> None:
        """Raise ForgeError, on all ranks, if there are weights or moments that none could resume
        from: nothing is evaluated, written or pruned then. Where a round can be undone, it is.
        """
        bad = self.saving.bad_by_rank()
        if bad and (discarded := self.sync.give_up_round(sorted(bad))):
            self.give_up(discarded)
            bad = self.saving.bad_by_rank()
        if bad:
            rank, found = min(bad.items())
            is_finite = math.isfinite(float(self.grad_norm))
            gradient = "" if is_finite else " (and the last gradient was not finite)"
            raise ForgeError(
                f"step {step} is not saved: rank {rank} has {found}{gradient}; earlier checkpoints"
                " are untouched",
                STAY_FINITE,
            )

    def synced(self, report: SyncReport) -> None:
        """Count what an update has cost, and report what it has not brought."""
        self.meter.add(report)
        if report.discarded:
            self.give_up(report.discarded)

    def give_up(self, discarded: Discarded) -> None:
        """Report updates that do not count."""
        self.discarded += len(discarded.updates)
        self.tracking.say(f"warning: {discarded.in_words()}")

    def close(self) -> None:
        self.saving.close()
        self.tracking.finish()


def conclude(run: Run) -> TrainResult:
    """Evaluate, write the results, publish the final model into the output directory.

    In this order: what fails later costs nothing that is done. Raises ForgeError.
    """
    job, folder, steps = run.job, run.folder, run.total_steps
    training_s, updates = run.clock.seconds, steps - run.first_step
    speed = updates * job.plan.tokens_per_update / training_s if updates else None
    run.saving.finish()
    figures = run.figures or run.evaluate(steps)  # a run killed after its last save has none
    memory = run.gauge.agree_on_memory(job.cluster)

    def publish() -> dict[str, Any]:
        result = TrainResult(
            output_dir=str(folder.path),
            steps=steps - run.discarded,
            tokens=(steps - run.discarded) * job.plan.tokens_per_update,
            train_loss=run.train_loss,
            tokens_per_second=speed,
            processes=job.cluster.world_size,
            mfu=run.gauge.mfu(speed),
            memory_peak_bytes=memory,
            seconds=run.gauge.seconds,
            **(run.meter.figures(training_s, updates) if updates else {}),
            discarded_updates=run.discarded,
            is_published=False,
            **figures,
        )
        try:
            if run.pictures:
                run.pictures.draw()
            note = folder.write_results(result, run.card_facts)
            folder.publish(checkpoint_dir(folder.path, steps))
            texts = run.samples.take(steps) if run.samples else []
            result = replace(result, is_published=True, sample=texts[0] if texts else None)
            folder.write_results(result, run.card_facts)
        finally:
            run.tracking.say(result.summary())
        if note:
            run.tracking.say(f"note      {note}")
        return vars(result)

    return TrainResult(**job.cluster.main_only(publish))
