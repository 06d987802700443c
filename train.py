"""Train a causal language model on one process or on many peers: load, build, loop, save.

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml train.py \\
        --dataset-path data/prepared/x --output-dir artifacts/x
"""

from __future__ import annotations

import math
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_llm_forge.config import TrainConfig, as_dict, parse
from p2p_llm_forge.data import order as data_order
from p2p_llm_forge.errors import ForgeError, run_script
from p2p_llm_forge.peers.launch import local_rank
from p2p_llm_forge.training.balance import Balance
from p2p_llm_forge.training.interruptions import NOTHING, SAVE_NOW, Interruptions, interruption
from p2p_llm_forge.training.results import RESULTS, TrainResult

if TYPE_CHECKING:  # heavy libraries are imported where they are used: --help answers at once
    import torch

    from p2p_llm_forge.data.blocks import Blocks
    from p2p_llm_forge.data.dataset import PreparedDataset
    from p2p_llm_forge.peers.cluster import Cluster
    from p2p_llm_forge.sync.base import Meter, Sync
    from p2p_llm_forge.training.loss_window import LossWindow
    from p2p_llm_forge.training.saving import Saving
    from p2p_llm_forge.training.tracking import Silent

__all__ = ["TrainConfig", "TrainResult", "train"]


@dataclass
class Run:
    """Everything that the loop works on."""

    config: TrainConfig
    cluster: Cluster
    data: PreparedDataset
    blocks: Blocks  # of the training split
    plan: data_order.Plan
    model: Any  # NextTokenLoss as Accelerate wraps it
    bare_model: Any  # the same without DDP
    optimizer: Any
    learning_rate_factor: Any
    sync: Sync
    meter: Meter
    tracking: Silent
    window: LossWindow
    saving: Saving
    balance: Balance
    first_step: int
    first_position: int  # of update `first_step` in the stream of blocks
    train_loss: float | None = None  # of the last line in metrics.jsonl
    training_s: float = 0.0  # spent on the updates of this process
    figures: dict[str, Any] = field(default_factory=dict)  # of the last update, if evaluated


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says, on every rank of the launch that this process belongs to.

    Returns the same TrainResult on every rank. Raises ForgeError for what the user can mend, and
    Interrupted when the run was asked to stop and has saved.
    """
    check(config)
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.training.run_folder import (
        claim_output,
        find_checkpoint,
        finished_result,
        only_run,
    )
    from p2p_llm_forge.training.setup import make_plan, open_data

    interruptions = Interruptions(config.max_seconds)  # the clock runs from here
    with join(config) as cluster:
        data = open_data(config, cluster)
        if config.eval_only:
            return evaluate_only(config, cluster, data)
        plan = make_plan(config, cluster, data)
        if config.dry_run:
            return describe(config, cluster, data, plan)
        with only_run(config, cluster):
            checkpoint = find_checkpoint(config, cluster, data, plan)
            config = settle_strategy(config, cluster, data, plan, checkpoint)
            finished = finished_result(config, cluster, checkpoint, plan)
            if finished:
                return finished
            run = set_up(config, cluster, data, plan, checkpoint)
            claim_output(config, cluster, data, plan)
            return learn(run, interruptions)


def learn(run: Run, interruptions: Interruptions) -> TrainResult:
    """The updates, the evaluation and the results; what is being written is always finished."""
    try:
        with interruptions:
            loop(run, interruptions)
            return conclude(run)
    finally:
        run.saving.wait()
        run.tracking.finish()


def loop(run: Run, interruptions: Interruptions) -> None:
    """Take the updates of the run."""
    config, plan, window = run.config, run.plan, run.window
    forward_s, started = 0.0, time.perf_counter()
    run.tracking.start(run.first_step, plan.total_steps)
    for step in range(run.first_step, plan.total_steps):
        taken = take_update(run, step)
        window.add(taken.nats)
        forward_s += taken.forward_s
        run.meter.add(run.sync.after_update(step, taken.tokens))
        run.tracking.step()

        done = step + 1
        is_last = done == plan.total_steps
        if is_last or is_due(done, config.log_every):
            spent = run.training_s + time.perf_counter() - started
            window.end_line(metrics_line(run, done, taken.grad_norm, spent))
        asked = NOTHING
        if is_meeting := is_last or run.sync.is_sync_point(done):
            told = run.cluster.gather_numbers([interruptions.asked(), forward_s])
            asked = int(max(wish for wish, _ in told))
            run.balance.measured([seconds for _, seconds in told])
            forward_s = 0.0
        should_stop = asked not in (NOTHING, SAVE_NOW) and not is_last
        should_save = is_last or should_stop or asked == SAVE_NOW or is_due(done, config.save_every)
        should_evaluate = is_last or (is_due(done, config.eval_every) and not should_stop)
        if should_save or should_evaluate or (is_meeting and window.has_line()):
            if not is_meeting:
                run.cluster.barrier()
            log_lines(run)  # ends the run before bad weights could be saved
        if should_save or should_evaluate:
            run.training_s += time.perf_counter() - started
            run.figures = evaluate(run, done) if should_evaluate else {}
            if should_save:
                save(run, done)
                interruptions.saved()
            started = time.perf_counter()
        if should_stop:
            run.saving.finish()
            raise interruption(asked, done, run.cluster.launch.is_elastic)


def log_lines(run: Run) -> None:
    """Write the lines of metrics.jsonl that have ended."""
    for line in run.window.settle():
        run.train_loss = line["loss"]
        run.tracking.log(line)


def metrics_line(run: Run, step: int, grad_norm: float, spent_s: float) -> dict:
    """A line of metrics.jsonl after `step` updates, but for the loss."""
    return {
        "step": step,
        "learning_rate": run.config.learning_rate * run.learning_rate_factor(step - 1),
        "grad_norm": grad_norm if math.isfinite(grad_norm) else None,
        "tokens": step * run.plan.tokens_per_update,
        "epoch": position_of(run, step) / len(run.blocks),
        "tokens_per_second": (step - run.first_step) * run.plan.tokens_per_update / spent_s,
        "peers": run.cluster.world_size,
        **run.meter.figures(spent_s, step - run.first_step),
        **({"shares": run.balance.shares} if run.config.balance == "auto" else {}),
    }


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps (0: never) is done now."""
    return bool(every) and step % every == 0


def position_of(run: Run, step: int) -> int:
    """Where update `step` begins in the stream of blocks."""
    return run.first_position + (step - run.first_step) * run.plan.batch_size


@dataclass(frozen=True)
class Taken:
    """What one update came to on this rank."""

    nats: torch.Tensor  # summed loss, on the device
    tokens: int
    norm: torch.Tensor  # of the gradient, before clipping
    forward_s: float

    @property
    def grad_norm(self) -> float:
        """The norm as a number; waits for the device."""
        return float(self.norm)


def take_update(run: Run, step: int) -> Taken:
    """One optimizer update, on this rank's share of its blocks."""
    import torch

    config, plan, cluster = run.config, run.plan, run.cluster
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * run.learning_rate_factor(step)
    blocks = data_order.blocks_at(
        position_of(run, step), plan.batch_size, len(run.blocks), config.seed
    )
    own = data_order.share_of_rank(blocks, run.balance.shares, cluster.rank)
    tokens = len(own) * run.data.manifest.sequence_length
    scale = run.sync.loss_scale(tokens, plan.tokens_per_update)
    offset = sum(run.balance.shares[: cluster.rank])
    micro_batches = data_order.micro_batches(own, plan.micro_batch_size)
    nats = torch.zeros((), device=cluster.device)
    forward_s = 0.0
    for number, numbers in enumerate(micro_batches, start=1):
        inputs, targets = (
            torch.from_numpy(a).to(cluster.device) for a in run.blocks.inputs_and_targets(numbers)
        )
        # A resumed run repeats its dropout without any saved generator.
        torch.manual_seed(data_order.dropout_seed(config.seed, step, offset))
        offset += len(numbers)
        with run.sync.context(is_last_micro_batch=number == len(micro_batches)):
            with run.balance.stopwatch() as watch:
                micro_nats, _ = run.model(inputs, targets)
            forward_s += watch.seconds
            cluster.accelerator.backward(micro_nats * scale)
        nats += micro_nats.detach()
    norm = cluster.accelerator.clip_grad_norm_(
        run.model.parameters(), config.max_grad_norm or float("inf")
    )
    run.optimizer.step()
    run.optimizer.zero_grad()
    return Taken(nats, tokens, norm, forward_s)


def check(config: TrainConfig) -> None:
    """Raise ForgeError with every problem of the configuration that needs no data and no peers."""
    from p2p_llm_forge.model.build import check_names
    from p2p_llm_forge.training.tracking import tracker_names

    problems = config.problems()
    for look in (lambda: check_names(config), lambda: tracker_names(config.report_to)):
        try:
            look()
        except ForgeError as error:
            problems.add(error)
    problems.raise_any()


def settle_strategy(
    config: TrainConfig,
    cluster: Cluster,
    data: PreparedDataset,
    plan: data_order.Plan,
    checkpoint: Path | None,
) -> TrainConfig:
    """What `--sync auto` comes to: what the run has begun with, or what suits the network best.

    Raises ForgeError where the launch or the folder does not go with the strategy.
    """
    from p2p_llm_forge.peers.findings import refuse_failures
    from p2p_llm_forge.peers.preflight import hosts_of, judge_shared_folder
    from p2p_llm_forge.sync.forecast import choose, table
    from p2p_llm_forge.sync.strategy import refuse_elastic
    from p2p_llm_forge.training.checkpoint import read_state
    from p2p_llm_forge.training.forecast import as_begun, outlook, with_strategy
    from p2p_llm_forge.training.new_model import new_model

    if config.sync == "auto" and checkpoint is not None:
        begun = cluster.main_only(lambda: read_state(checkpoint)["config"])
        config = as_begun(config, begun)
    elif config.sync == "auto":
        lm = cluster.together(lambda: new_model(config, cluster, data))
        forecasts = outlook(config, cluster, data, plan, lm)
        if cluster.is_main:
            print("\n".join(table(forecasts)), flush=True)
        config = with_strategy(config, choose(forecasts).strategy)
    refuse_elastic(config, cluster)
    if config.keeps_own_state() and cluster.world_size > 1:
        folder, hosts = Path(config.output_dir), hosts_of(cluster)
        refuse_failures(judge_shared_folder(cluster, folder, True, hosts))
    return config


def set_up(
    config: TrainConfig,
    cluster: Cluster,
    data: PreparedDataset,
    plan: data_order.Plan,
    checkpoint: Path | None,
) -> Run:
    """Everything that the loop works on, new or as a checkpoint left it."""
    from p2p_llm_forge.model.loss import NextTokenLoss
    from p2p_llm_forge.model.optimizer import build_optimizer
    from p2p_llm_forge.model.schedule import learning_rate_factor
    from p2p_llm_forge.sync.base import Meter, Replica
    from p2p_llm_forge.sync.ddp import set_bucket_size
    from p2p_llm_forge.sync.strategy import build_strategy
    from p2p_llm_forge.training.checkpoint import read_state
    from p2p_llm_forge.training.loss_window import NO_LOSSES, LossWindow
    from p2p_llm_forge.training.saving import Saving, take_up
    from p2p_llm_forge.training.tracking import Silent, Tracking

    lm = build_or_load(config, cluster, data, checkpoint)
    bare_model = NextTokenLoss(lm.to(cluster.device), document_end(config, data)).train()
    blocks = cluster.together(data.train_blocks)
    if config.compile:
        lm.base_model.compile()
    optimizer = build_optimizer(config, lm)
    state: dict[str, Any] = {
        **{"step": 0, "blocks_read": 0, "train_loss": None, "config": as_dict(config)},
        "figures": {},
        "since_log": NO_LOSSES,
    }
    if checkpoint:
        state = read_state(checkpoint)
    set_bucket_size(config, cluster)
    model, optimizer = cluster.accelerator.prepare(bare_model, optimizer)
    replica = Replica(model, lm, optimizer, total_steps=plan.total_steps, steps_done=state["step"])
    sync = build_strategy(config, cluster, replica)
    prime(model, sync, blocks, plan, cluster)
    if checkpoint:
        bare = optimizer.optimizer
        total = plan.total_steps
        cluster.together(lambda: take_up(checkpoint, state, sync, cluster, lm, bare, total))
    tracking = Tracking(config, cluster) if cluster.is_main else Silent()
    run = Run(
        config,
        cluster,
        data,
        blocks,
        plan,
        model,
        bare_model,
        optimizer,
        learning_rate_factor(config, plan.total_steps),
        sync,
        Meter(),
        tracking,
        LossWindow(
            cluster,
            plan.tokens_per_update,
            state["step"],
            state["since_log"],
            sync.rolls_back_after,
        ),
        Saving(config, cluster, lm, optimizer.optimizer, sync, data.tokenizer_dir, tracking),
        Balance(plan.shares, config.balance == "auto"),
        first_step=state["step"],
        first_position=state["blocks_read"],
        train_loss=state["train_loss"],
        figures=state["figures"],
    )
    introduce(run, checkpoint, state["config"])
    return run


def build_or_load(
    config: TrainConfig, cluster: Cluster, data: PreparedDataset, checkpoint: Path | None
) -> Any:
    """The causal LM of the run, the same on every rank."""
    from p2p_llm_forge.model.load import load_model, without_progress_bars
    from p2p_llm_forge.sync.strategy import refuse_different_models
    from p2p_llm_forge.training.new_model import new_model, text_spec_of

    without_progress_bars()

    def of_this_rank() -> Any:
        if checkpoint is None:
            return new_model(config, cluster, data)
        if not checkpoint.is_dir():
            raise ForgeError(
                f"{checkpoint} is not seen from here: to resume, every machine must see the"
                " --output-dir of rank 0; share it, or copy it over"
            )
        return load_model(str(checkpoint), text_spec_of(data), config.trust_remote_code)

    lm = cluster.together(of_this_rank)
    refuse_different_models(cluster, lm, is_loaded=bool(config.model_name or checkpoint))
    if config.gradient_checkpointing:
        lm.activation_checkpointing_enable({"use_reentrant": False})
    return lm


def introduce(run: Run, checkpoint: Path | None, config_before: dict[str, Any]) -> None:
    """Say what is about to happen, and what it goes on from."""
    from p2p_llm_forge.sync.outer import outer_lr_of
    from p2p_llm_forge.training.run_folder import settings_changed
    from p2p_llm_forge.training.tracking import introduction

    say = run.tracking.say
    say(introduction(run.cluster, run.data, run.plan, run.bare_model.lm))
    if run.config.sync == "diloco":
        config, rate = run.config, outer_lr_of(run.config.outer_lr, run.cluster.world_size)
        say(
            f"rounds    of {config.round_length()} updates; outer rate {rate:.3g} and momentum"
            f" {config.outer_momentum:g}, reached after {config.outer_warmup_rounds} rounds"
        )
        if run.cluster.world_size == 1:
            say("note      --sync diloco is pointless with one process: nobody to agree with")
    if checkpoint:
        say(f"resuming  after step {run.first_step} from {checkpoint}")
        for line in settings_changed(config_before, as_dict(run.config)):
            say(f"changed   {line}")


def document_end(config: TrainConfig, data: PreparedDataset) -> int | None:
    """The token that attention does not cross; None where it reads a block as one text."""
    return data.manifest.eos_token_id if config.document_mask else None


def prime(model: Any, sync: Sync, blocks: Blocks, plan: data_order.Plan, cluster: Cluster) -> None:
    """Take a forward and a backward before the first update, and throw their gradients away.

    DDP orders its buckets by it, and no rank compiles while others wait in an exchange.
    """
    import torch

    numbers = range(min(plan.micro_batch_size, len(blocks)))
    inputs, targets = (
        torch.from_numpy(a).to(cluster.device) for a in blocks.inputs_and_targets(numbers)
    )
    with sync.priming():
        nats, _ = model(inputs, targets)
        nats.backward()
    model.zero_grad()
    cluster.barrier()


def save(run: Run, step: int) -> None:
    """Save a checkpoint after `step` updates; in the background, training goes on meanwhile."""
    run.saving.save(
        step,
        {
            "blocks_read": position_of(run, step),
            "tokens": step * run.plan.tokens_per_update,
            "train_loss": run.train_loss,
            "figures": run.figures,
            "since_log": run.window.since_log(),
        },
    )


def evaluate(run: Run, step: int) -> dict[str, Any]:
    """The figures on the validation split after `step` updates; empty without one."""
    from p2p_llm_forge.training.evaluation import evaluate_split

    blocks = run.data.blocks("validation")
    if blocks is None:
        return {}
    size = run.data.manifest.splits["validation"].bytes
    with run.sync.agreed_weights():
        figures = evaluate_split(
            run.bare_model, blocks, size, run.plan.micro_batch_size, run.cluster
        )
    run.tracking.log({"step": step, **figures})
    return figures


def conclude(run: Run) -> TrainResult:
    """Evaluate, publish the final model into the output directory, write and print results."""
    from p2p_llm_forge.training import checkpoint
    from p2p_llm_forge.training.evaluation import sample_text
    from p2p_llm_forge.training.new_model import text_spec_of

    output_dir, steps = Path(run.config.output_dir), run.plan.total_steps
    updates = steps - run.first_step
    tokens = updates * run.plan.tokens_per_update
    run.saving.finish()
    figures = run.figures or evaluate(run, steps)  # a run killed after its last save has none

    def publish() -> dict[str, Any]:
        checkpoint.publish(checkpoint.checkpoint_dir(output_dir, steps), output_dir)
        result = TrainResult(
            output_dir=str(output_dir),
            steps=steps,
            tokens=steps * run.plan.tokens_per_update,
            train_loss=run.train_loss,
            tokens_per_second=tokens / run.training_s if tokens else None,
            processes=run.cluster.world_size,
            **(run.meter.figures(run.training_s, updates) if updates else {}),
            sample=sample_text(
                run.bare_model.lm, text_spec_of(run.data), run.config.sample_prompt, run.config.seed
            ),
            **figures,
        )
        checkpoint.write_json(output_dir / RESULTS, result.as_dict())
        (output_dir / "README.md").write_text(
            result.model_card(run.config.model_name), encoding="utf-8"
        )
        run.tracking.say(result.summary())
        return result.as_dict()

    return TrainResult(**run.cluster.main_only(publish))


def evaluate_only(config: TrainConfig, cluster: Cluster, data: PreparedDataset) -> TrainResult:
    """Evaluate `--model-name`, or the newest good checkpoint of the run, and write nothing."""
    from p2p_llm_forge.model.load import load_model, without_progress_bars
    from p2p_llm_forge.model.loss import NextTokenLoss
    from p2p_llm_forge.training import checkpoint
    from p2p_llm_forge.training.evaluation import evaluate_split
    from p2p_llm_forge.training.new_model import text_spec_of

    without_progress_bars()
    blocks = data.blocks("validation")
    if blocks is None:
        raise ForgeError(
            f"{config.dataset_path} has no validation split: prepare it with"
            " --validation-fraction 0.1"
        )
    output_dir, steps = Path(config.output_dir), 0
    name = config.model_name or cluster.main_only(
        lambda: str(checkpoint.newest_good(output_dir)[0] or "")
    )
    if not name:
        raise ForgeError(
            f"nothing to evaluate: {output_dir} has no checkpoint, and no --model-name was given"
        )
    if not config.model_name:
        steps = checkpoint.read_state(Path(name))["step"]
    text = text_spec_of(data)
    lm = cluster.together(lambda: load_model(name, text, config.trust_remote_code))
    size = data.manifest.splits["validation"].bytes
    figures = evaluate_split(
        NextTokenLoss(lm.to(cluster.device), document_end(config, data)),
        blocks,
        size,
        config.micro_batch_size or 8,
        cluster,
    )
    result = TrainResult(name, steps, 0, None, None, cluster.world_size, **figures)
    if cluster.is_main:
        print(result.summary(), flush=True)
    return result


def describe(
    config: TrainConfig, cluster: Cluster, data: PreparedDataset, plan: data_order.Plan
) -> TrainResult:
    """What a run would do, and how fast in which way; trains no model and writes nothing."""
    from p2p_llm_forge.sync.forecast import table
    from p2p_llm_forge.training.checkpoint import refuse_another_run
    from p2p_llm_forge.training.forecast import outlook
    from p2p_llm_forge.training.new_model import new_model
    from p2p_llm_forge.training.run_folder import run_identity
    from p2p_llm_forge.training.tracking import introduction

    output_dir, identity = Path(config.output_dir), run_identity(config, data, plan)
    if not config.overwrite:
        cluster.main_only(
            lambda: refuse_another_run(
                output_dir, identity, bool(config.resume), config.resume_changed
            )
        )
    lm = cluster.together(lambda: new_model(config, cluster, data))
    told = introduction(cluster, data, plan, lm)
    if cluster.world_size > 1:
        told += f"\n\n{table(outlook(config, cluster, data, plan, lm))}"
    if cluster.is_main:
        print(f"{told}\ndry run: nothing was trained or written", flush=True)
    return TrainResult(config.output_dir, 0, 0, None, None, cluster.world_size)


def main() -> int:
    """The command line."""
    train(parse(TrainConfig, sys.argv[1:], "train.py"))
    return 0


def cli() -> None:
    """Entry point of the command `p2p-llm-forge`."""
    run_script(main, local_rank())


if __name__ == "__main__":
    cli()
