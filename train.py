"""Train a causal language model on one process or on many peers: load, build, loop, save.

    accelerate launch --config_file accelerate_configs/cpu_2_processes.yaml train.py \\
        --dataset-path data/prepared/x --output-dir artifacts/x
"""

from __future__ import annotations

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_llm_forge import data_order
from p2p_llm_forge.config import PrepareConfig, TrainConfig, as_dict, parse
from p2p_llm_forge.errors import ForgeError, run_script
from p2p_llm_forge.results import RESULTS, TrainResult

if TYPE_CHECKING:  # heavy libraries are imported where they are used: --help answers at once
    import torch

    from p2p_llm_forge.cluster import Cluster
    from p2p_llm_forge.corpus import PreparedDataset
    from p2p_llm_forge.sync import AllReduce
    from p2p_llm_forge.tracking import LossWindow, Silent

__all__ = ["TrainConfig", "TrainResult", "train"]


@dataclass
class Run:
    """Everything that the loop works on."""

    config: TrainConfig
    cluster: Cluster
    data: PreparedDataset
    plan: data_order.Plan
    model: Any  # NextTokenLoss as Accelerate wraps it
    bare_model: Any  # the same without DDP
    optimizer: Any
    learning_rate_factor: Any
    sync: AllReduce
    tracking: Silent
    window: LossWindow
    first_step: int
    train_loss: float | None = None  # of the last line in metrics.jsonl


def train(config: TrainConfig) -> TrainResult:
    """Train as `config` says, on every rank of the launch that this process belongs to.

    Returns the same TrainResult on every rank. Raises ForgeError for what the user can mend.
    """
    check(config)
    from p2p_llm_forge.cluster import join

    with join(config) as cluster:
        data = open_data(config, cluster)
        if config.eval_only:
            return evaluate_only(config, cluster, data)
        plan = data_order.plan_updates(
            config, len(data.blocks("train")), data.manifest.sequence_length, cluster.world_size
        )
        if config.dry_run:
            return describe(config, cluster, data, plan)
        checkpoint = claim_output(config, cluster, data, plan)
        done = finished_result(config, cluster, checkpoint, plan)
        if done:
            return done
        run = set_up(config, cluster, data, plan, checkpoint)
        try:
            train_loss, tokens_per_second = loop(run)
            return conclude(run, train_loss, tokens_per_second)
        finally:
            run.tracking.finish()


def loop(run: Run) -> tuple[float | None, float | None]:
    """Take the updates of the run. Returns the last loss and all peers' tokens per second."""
    config, plan, window = run.config, run.plan, run.window
    training_s, started = 0.0, time.perf_counter()
    run.tracking.start(run.first_step, plan.total_steps)
    for step in range(run.first_step, plan.total_steps):
        nats, grad_norm = take_update(run, step)
        window.add(nats)
        report = run.sync.after_update(step)
        run.tracking.step()

        done = step + 1
        is_last = done == plan.total_steps
        if is_last or done % config.log_every == 0:
            run.train_loss = window.mean(plan.tokens_per_update)
            spent = training_s + time.perf_counter() - started
            run.tracking.log(
                {
                    "step": done,
                    "loss": run.train_loss,
                    "learning_rate": config.learning_rate * run.learning_rate_factor(step),
                    "grad_norm": float(grad_norm),
                    "tokens": done * plan.tokens_per_update,
                    "epoch": done * plan.batch_size / len(run.data.blocks("train")),
                    "tokens_per_second": (done - run.first_step) * plan.tokens_per_update / spent,
                    "peers": report.peers,
                }
            )
        should_save = is_last or is_due(done, config.save_every)
        should_evaluate = is_due(done, config.eval_every) and not is_last
        if should_save or should_evaluate:
            since_log = window.collect()  # ends the run before bad weights could be saved
            training_s += time.perf_counter() - started
            if should_save:
                save(run, done, since_log)
            if should_evaluate:
                run.tracking.log({"step": done, **evaluate(run)})
            started = time.perf_counter()
    updates = plan.total_steps - run.first_step
    return run.train_loss, updates * plan.tokens_per_update / training_s if updates else None


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps (0: never) is done now."""
    return bool(every) and step % every == 0


def take_update(run: Run, step: int) -> tuple[torch.Tensor, torch.Tensor]:
    """One optimizer update. Returns this rank's summed loss (nats) and the norm of the gradient."""
    import torch

    config, plan, cluster = run.config, run.plan, run.cluster
    for group in run.optimizer.param_groups:
        group["lr"] = config.learning_rate * run.learning_rate_factor(step)
    blocks = data_order.blocks_of_update(
        step, plan.batch_size, len(run.data.blocks("train")), config.seed
    )
    own = data_order.share_of_rank(blocks, cluster.rank, cluster.world_size)
    nats = torch.zeros((), device=cluster.device)
    for number, numbers in enumerate(data_order.micro_batches(own, plan.micro_batch_size), start=1):
        inputs, targets = (
            torch.from_numpy(a).to(cluster.device)
            for a in run.data.blocks("train").inputs_and_targets(numbers)
        )
        # A resumed run repeats its dropout without any saved generator.
        offset = cluster.rank * len(own) + (number - 1) * plan.micro_batch_size
        torch.manual_seed(data_order.dropout_seed(config.seed, step, offset))
        with run.sync.context(is_last_micro_batch=number == plan.accumulation):
            micro_nats, _ = run.model(inputs, targets)
            # DDP averages over the ranks; what is wanted is the sum over all tokens of the update.
            cluster.accelerator.backward(micro_nats * (cluster.world_size / plan.tokens_per_update))
        nats += micro_nats.detach()
    grad_norm = cluster.accelerator.clip_grad_norm_(
        run.model.parameters(), config.max_grad_norm or float("inf")
    )
    run.optimizer.step()
    run.optimizer.zero_grad()
    return nats, grad_norm


def check(config: TrainConfig) -> None:
    """Raise ForgeError with every problem of the configuration that needs no data and no peers."""
    from p2p_llm_forge.model import check_names
    from p2p_llm_forge.tracking import tracker_names

    problems = config.problems()
    for look in (lambda: check_names(config), lambda: tracker_names(config.report_to)):
        try:
            look()
        except ForgeError as error:
            problems.require(False, str(error))
    problems.raise_any()


def open_data(config: TrainConfig, cluster: Cluster) -> PreparedDataset:
    """The prepared dataset; a text file is prepared first, by the main process alone."""
    from p2p_llm_forge.corpus import open_prepared

    folder = Path(config.dataset_path)
    if cluster.main_only(lambda: folder.is_file()):
        if config.dry_run:
            raise ForgeError(
                f"--dry-run writes nothing, and {folder} is a text: prepare it with prepare_data.py"
                " first"
            )
        folder = Path(config.output_dir) / "prepared"
        cluster.main_only(lambda: prepare_text(config, folder))
    data = cluster.together(lambda: open_prepared(folder))
    asked, found = config.sequence_length, data.manifest.sequence_length
    if asked not in (None, found):
        raise ForgeError(
            f"--sequence-length {asked} was asked, {folder} has blocks of {found} tokens: leave the"
            " flag out, or prepare the data again with it"
        )
    return data


def prepare_text(config: TrainConfig, folder: Path) -> None:
    """Prepare the text file of `--dataset-path` into `folder`, which the same text finds again."""
    from prepare_data import prepare

    prepare(
        PrepareConfig(
            dataset_path=[config.dataset_path],
            output_dir=str(folder),
            tokenizer=config.tokenizer or config.model_name,
            vocab_size=config.vocab_size,
            sequence_length=config.sequence_length or 256,
            overwrite=config.overwrite,
        )
    )


def claim_output(
    config: TrainConfig, cluster: Cluster, data: PreparedDataset, plan: data_order.Plan
) -> Path | None:
    """Make the output directory this run's own; returns the checkpoint to go on from, if any."""
    from p2p_llm_forge import checkpoint

    output_dir = Path(config.output_dir)
    identity = {
        "dataset": data.manifest.fingerprint,
        "model_name": config.model_name,
        "model_type": config.model_type,
        "config_overrides": sorted((config.config_overrides or "").split(",")),
        "seed": config.seed,
        "batch_size": plan.batch_size,
    }

    def claim() -> str | None:
        checkpoint.claim_output_dir(output_dir, identity, bool(config.resume), config.overwrite)
        if not config.resume:
            return None
        if config.resume != "auto":
            wrong = checkpoint.damage(Path(config.resume))
            if wrong:
                raise ForgeError(
                    f"--resume {config.resume}: {wrong}. Use --resume auto for the newest good one"
                )
            return config.resume
        found, passed_over = checkpoint.newest_good(output_dir)
        for line in passed_over:
            print(line, file=sys.stderr, flush=True)
        return str(found) if found else None

    found = cluster.main_only(claim)
    return Path(found) if found else None


def set_up(
    config: TrainConfig,
    cluster: Cluster,
    data: PreparedDataset,
    plan: data_order.Plan,
    checkpoint: Path | None,
) -> Run:
    """Build the model and optimizer, or load them, and hand them to Accelerate."""
    from p2p_llm_forge import model as models
    from p2p_llm_forge.checkpoint import load_optimizer, read_state
    from p2p_llm_forge.loss import NextTokenLoss
    from p2p_llm_forge.sync import AllReduce
    from p2p_llm_forge.tracking import LossWindow, Silent, Tracking

    models.without_progress_bars()
    if checkpoint:
        lm = cluster.together(
            lambda: models.load_model(str(checkpoint), data, config.trust_remote_code)
        )
    else:
        lm = cluster.together(lambda: models.build_model(config, data))
    if config.gradient_checkpointing:
        lm.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
    bare_model = NextTokenLoss(lm.to(cluster.device), document_end(config, data)).train()
    if config.compile:
        lm.base_model.compile()
    optimizer = models.build_optimizer(config, lm)
    state = {"step": 0, "train_loss": None, "since_log": {"nats": [], "updates": 0}}
    if checkpoint:
        state = read_state(checkpoint)
        cluster.together(lambda: load_optimizer(checkpoint, lm, optimizer))
    model, optimizer = cluster.accelerator.prepare(bare_model, optimizer)
    tracking = Tracking(config, cluster) if cluster.is_main else Silent()
    run = Run(
        config,
        cluster,
        data,
        plan,
        model,
        bare_model,
        optimizer,
        models.learning_rate_factor(config, plan.total_steps),
        AllReduce(cluster, model),
        tracking,
        LossWindow(cluster, state["step"], state["since_log"]),
        state["step"],
        state["train_loss"],
    )
    tracking.say(introduction(cluster, data, plan, lm))
    if checkpoint:
        tracking.say(f"resuming  after step {run.first_step} from {checkpoint}")
    return run


def document_end(config: TrainConfig, data: PreparedDataset) -> int | None:
    """The token that attention does not cross; None where it reads a block as one text."""
    return data.manifest.eos_token_id if config.document_mask else None


def introduction(cluster: Cluster, data: PreparedDataset, plan: data_order.Plan, lm: Any) -> str:
    """What is about to happen, in a few lines."""
    parameters = sum(p.numel() for p in lm.parameters())
    world, manifest = cluster.world_size, data.manifest
    return "\n".join(
        [
            f"model     {lm.config.model_type}, {parameters / 1e6:.2f} M parameters",
            (
                f"data      {len(data.blocks('train')):,} blocks of {manifest.sequence_length}"
                f" tokens, vocabulary {manifest.vocab_size:,}"
            ),
            (
                f"peers     {world} process(es) on {cluster.device.type}, precision"
                f" {cluster.accelerator.mixed_precision}"
            ),
            (
                f"updates   {plan.total_steps:,} of {plan.batch_size} blocks = {world} process(es)"
                f" x {plan.accumulation} micro-batch(es) x {plan.micro_batch_size}"
            ),
        ]
    )


def save(run: Run, step: int, since_log: dict[str, Any]) -> None:
    """Write a checkpoint after `step` updates: everyone calls, the main process writes."""
    from p2p_llm_forge import checkpoint

    lm = run.bare_model.lm

    def write(folder: Path) -> None:
        checkpoint.write_model(folder, lm, run.data.tokenizer_dir)
        state = {
            "step": step,
            "tokens": step * run.plan.tokens_per_update,
            "train_loss": run.train_loss,
            "since_log": since_log,
            "config": as_dict(run.config),
        }
        checkpoint.write_state(folder, lm, run.optimizer.optimizer, state)

    def commit() -> None:
        checkpoint.commit(Path(run.config.output_dir), step, write, run.config.keep_checkpoints)

    run.cluster.main_only(commit)


def evaluate(run: Run) -> dict[str, Any]:
    """The figures on the validation split; empty without one."""
    from p2p_llm_forge.evaluation import evaluate_split

    blocks = run.data.blocks("validation")
    if blocks is None:
        return {}
    size = run.data.manifest.splits["validation"].bytes
    return evaluate_split(run.bare_model, blocks, size, run.plan.micro_batch_size, run.cluster)


def conclude(run: Run, train_loss: float | None, tokens_per_second: float | None) -> TrainResult:
    """Evaluate, publish the final model into the output directory, write and print results."""
    from p2p_llm_forge import checkpoint
    from p2p_llm_forge.evaluation import sample_text

    output_dir, steps = Path(run.config.output_dir), run.plan.total_steps
    figures = evaluate(run)

    def publish() -> dict[str, Any]:
        checkpoint.publish(checkpoint.checkpoint_dir(output_dir, steps), output_dir)
        if figures:
            run.tracking.log({"step": steps, **figures})
        result = TrainResult(
            output_dir=str(output_dir),
            steps=steps,
            tokens=steps * run.plan.tokens_per_update,
            train_loss=train_loss,
            tokens_per_second=tokens_per_second,
            processes=run.cluster.world_size,
            sample=sample_text(
                run.bare_model.lm, run.data, run.config.sample_prompt, run.config.seed
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


def finished_result(
    config: TrainConfig, cluster: Cluster, checkpoint: Path | None, plan: data_order.Plan
) -> TrainResult | None:
    """The result of a run that `--resume` finds finished, so that it is not done twice."""

    def look() -> dict[str, Any] | None:
        from p2p_llm_forge.checkpoint import read_state

        if checkpoint is None:
            return None
        step, result = read_state(checkpoint)["step"], TrainResult.load(Path(config.output_dir))
        if step > plan.total_steps:
            raise ForgeError(
                f"{checkpoint} is after step {step}, this run was asked to end at"
                f" {plan.total_steps}: raise --max-steps or --epochs, or start anew with"
                " --overwrite"
            )
        if result is None or result.steps != plan.total_steps:
            return None
        print(f"finished already; --overwrite starts anew\n{result.summary()}", flush=True)
        return result.as_dict()

    result = cluster.main_only(look)
    return TrainResult(**result) if result else None


def evaluate_only(config: TrainConfig, cluster: Cluster, data: PreparedDataset) -> TrainResult:
    """Evaluate `--model-name`, or the newest good checkpoint of the run, and write nothing."""
    from p2p_llm_forge import checkpoint
    from p2p_llm_forge.evaluation import evaluate_split
    from p2p_llm_forge.loss import NextTokenLoss
    from p2p_llm_forge.model import load_model

    blocks = data.blocks("validation")
    if blocks is None:
        raise ForgeError(
            f"{config.dataset_path} has no validation split: prepare it with"
            " --validation-fraction 0.1"
        )
    output_dir, name, steps = Path(config.output_dir), config.model_name, 0
    if name is None:
        found = cluster.main_only(
            lambda: (path := checkpoint.newest_good(output_dir)[0]) and str(path)
        )
        if found is None:
            raise ForgeError(
                f"nothing to evaluate: {output_dir} has no checkpoint, and no --model-name was"
                " given"
            )
        name, steps = found, checkpoint.read_state(Path(found))["step"]
    lm = cluster.together(lambda: load_model(str(name), data, config.trust_remote_code))
    size = data.manifest.splits["validation"].bytes
    figures = evaluate_split(
        NextTokenLoss(lm.to(cluster.device), document_end(config, data)),
        blocks,
        size,
        config.micro_batch_size or 8,
        cluster,
    )
    result = TrainResult(str(name), steps, 0, None, None, cluster.world_size, **figures)
    if cluster.is_main:
        print(result.summary(), flush=True)
    return result


def describe(
    config: TrainConfig, cluster: Cluster, data: PreparedDataset, plan: data_order.Plan
) -> TrainResult:
    """What a run would do; builds the model, takes no update and writes nothing."""
    from p2p_llm_forge.model import build_model

    lm = cluster.together(lambda: build_model(config, data))
    if cluster.is_main:
        print(
            introduction(cluster, data, plan, lm),
            "\ndry run: nothing was trained or written",
            sep="",
            flush=True,
        )
    return TrainResult(config.output_dir, 0, 0, None, None, cluster.world_size)


def main() -> int:
    """The command line."""
    train(parse(TrainConfig, sys.argv[1:], "train.py"))
    return 0


def cli() -> None:
    """Entry point of the command `p2p-llm-forge`."""
    run_script(main)


if __name__ == "__main__":
    cli()
