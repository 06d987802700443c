"""Train a causal language model on one process or on many peers: load, build, loop, save.

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml train.py \\
        --dataset-path data/prepared/x --output-dir artifacts/x
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

from p2p_llm_forge.config import TrainConfig, parse
from p2p_llm_forge.data import order as data_order
from p2p_llm_forge.errors import run_script
from p2p_llm_forge.memory import freed_memory_kept
from p2p_llm_forge.peers.launch import launcher_pid, local_rank
from p2p_llm_forge.peers.parent import end_with_parent
from p2p_llm_forge.training.budget import process_began
from p2p_llm_forge.training.interruptions import NOTHING, Interruptions, interruption
from p2p_llm_forge.training.mistakes import mistakes_in
from p2p_llm_forge.training.publishing import push_at_end, push_finished
from p2p_llm_forge.training.results import TrainResult

if TYPE_CHECKING:  # heavy libraries are imported where they are used: --help answers at once
    import torch

    from p2p_llm_forge.training.beginning import Beginning
    from p2p_llm_forge.training.job import Job
    from p2p_llm_forge.training.run import Run

__all__ = ["TrainConfig", "TrainResult", "train"]


def train(config: TrainConfig, began: float | None = None) -> TrainResult:
    """Train as `config` says, on every rank of the launch that this process belongs to.

    began: when the time of `--minutes` did, by `time.monotonic`; without it, now. Returns the same
    TrainResult on every rank. Raises ForgeError for what the user can fix, and Interrupted when the
    run was asked to stop and has saved.
    """
    began = time.monotonic() if began is None else began
    interruptions = Interruptions(config.max_seconds)  # the clock runs from here
    mistakes_in(config).raise_any()  # before imports that take seconds
    if config.push_to_hub and not config.dataset_path:
        return push_finished(config)
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.training.beginning import Beginning
    from p2p_llm_forge.training.job import open_job
    from p2p_llm_forge.training.modes import dry_run, evaluate_only
    from p2p_llm_forge.training.timing import timed

    beginning = Beginning(config)
    with interruptions.kept_by_errors(), join(config, beginning.agree) as cluster:
        config = beginning.config
        if config.eval_only:
            return evaluate_only(config, cluster)
        job = replace(open_job(config, cluster), began=began)
        with freed_memory_kept():  # an update takes what the one before has freed
            if config.minutes:
                job = timed(config, job, began)
            if config.dry_run:
                return dry_run(job)
            result = train_job(job, beginning, interruptions)
    if cluster.is_main:  # the others need not wait for it
        push_at_end(config)
    return result


def train_job(job: Job, beginning: Beginning, interruptions: Interruptions) -> TrainResult:
    """Begin a run or go on with it, to its end; what it came to if it has ended before."""
    from p2p_llm_forge.training.run import conclude
    from p2p_llm_forge.training.run_folder import run_folder
    from p2p_llm_forge.training.setup import set_up

    with run_folder(job, beginning) as folder:
        if folder.result is not None:
            return folder.result
        with set_up(job, folder) as run, interruptions:
            loop(run, interruptions)
            return conclude(run)


def loop(run: Run, interruptions: Interruptions) -> None:
    """Take the updates of the run; between them log, evaluate, save and stop, where it is due."""
    config, cluster, step = run.job.config, run.job.cluster, run.first_step
    run.start()
    while step < run.total_steps:  # which --minutes decides again and again
        update = take_update(run, step)
        run.window.add(update.nats, update.tokens_of_all)
        run.grad_norm = update.grad_norm
        run.synced(run.sync.after_update(step, update.tokens))
        run.tracking.step(update.nats, update.tokens)

        step = done = step + 1
        if run.is_due(done, config.log_every):
            run.end_line(done, float(update.grad_norm))
        is_sync_point = done == run.total_steps or run.sync.is_sync_point(done)
        asked = run.agree(interruptions.asked(), done) if is_sync_point else NOTHING
        due = run.due_after(done, asked)
        if due.evaluate or due.save or (is_sync_point and run.window.has_line()):
            if not is_sync_point:
                cluster.barrier()
            run.log_lines()  # ends the run before bad weights could be saved
        if due.evaluate or due.save:
            with run.clock.paused():
                run.evaluate_and_save(done, due)
        if due.save:
            interruptions.saved()
        if due.stop:
            run.saving.finish()
            raise interruption(asked, done, cluster.launch.is_elastic)


@dataclass(frozen=True)
class Update:
    """What one update came to on this rank. Scalars stay on the device, which need not wait."""

    nats: torch.Tensor  # summed loss
    tokens: int  # that count in it
    tokens_of_all: int  # of all ranks
    grad_norm: torch.Tensor  # before clipping


def take_update(run: Run, step: int) -> Update:
    """One optimizer update, on this rank's share of its blocks."""
    config, plan, cluster = run.job.config, run.job.plan, run.job.cluster
    model, optimizer = run.learner.model, run.learner.optimizer
    for group in optimizer.param_groups:
        group["lr"] = run.job.learning_rate * run.learning_rate_factor(step)
    blocks = data_order.blocks_at(
        run.position_of(step), plan.batch_size, len(run.blocks), config.seed
    )
    own = data_order.share_of_rank(blocks, run.balance.shares, cluster.rank)
    tokens, tokens_of_all = run.blocks.trained_tokens(own), run.blocks.trained_tokens(blocks)
    scale = run.sync.loss_scale(tokens, tokens_of_all)
    while True:
        try:
            nats = add_gradients(run, step, own, scale)
            break
        except Exception as error:
            run.go_smaller(error)  # or raise it: what is wrong is not a lack of memory
    grad_norm = cluster.accelerator.clip_grad_norm_(
        model.parameters(), config.max_grad_norm or float("inf")
    )
    optimizer.step()
    optimizer.zero_grad()
    return Update(nats, tokens, tokens_of_all, grad_norm)


def add_gradients(run: Run, step: int, own: list[int], scale: float) -> torch.Tensor:
    """Forward and backward of this rank's blocks, in micro-batches. Returns their summed loss."""
    import torch

    from p2p_llm_forge.training.feeding import fed

    cluster, model = run.job.cluster, run.learner.model
    offset = sum(run.balance.shares[: cluster.rank])
    micro_batches = data_order.micro_batches(own, run.micro_batch_size)
    nats = torch.zeros((), device=cluster.device)
    batches = fed(run.blocks, micro_batches, cluster.device)
    for number, batch in enumerate(batches, start=1):
        # A resumed run repeats its dropout without any saved generator.
        torch.manual_seed(data_order.dropout_seed(run.job.config.seed, step, offset))
        offset += len(batch.inputs)
        is_last = number == len(micro_batches)
        with run.sync.context(is_last_micro_batch=is_last):
            began = run.balance.clock()
            micro_nats, _ = model(*batch)
            run.forward_s += run.balance.clock() - began
            run.is_exchanging = is_last and cluster.world_size > 1
            cluster.accelerator.backward(micro_nats * scale)
            run.is_exchanging = False
        nats += micro_nats.detach()
    return nats


def main() -> int:
    """The command line."""
    train(parse(TrainConfig, sys.argv[1:], "train.py", mistakes_in), process_began())
    return 0


def cli() -> None:
    """Entry point of the command `p2p-llm-forge`."""
    end_with_parent(launcher_pid())
    run_script(main, local_rank())


if __name__ == "__main__":
    cli()
