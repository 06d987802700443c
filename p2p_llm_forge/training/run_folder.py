"""A run's folder: held by one run at a time, and belonging to one run only."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.data.order import Plan
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.lock import only_writer
from p2p_llm_forge.training.results import TrainResult


@contextlib.contextmanager
def only_run(config: TrainConfig, cluster: Cluster) -> Iterator[None]:
    """Hold the output directory against other runs: the main process has the lock."""
    with contextlib.ExitStack() as held:

        def lock() -> None:
            folder = Path(config.output_dir)
            run_id = cluster.launch.run_id
            held.enter_context(only_writer(folder / "run.lock", f"--output-dir {folder}", run_id))

        cluster.main_only(lock)
        yield


def run_identity(config: TrainConfig, data: PreparedDataset, plan: Plan) -> dict[str, Any]:
    """What makes a run this run and no other."""
    return {
        "dataset": data.manifest.fingerprint,
        "tokenizer": data.manifest.tokenizer_fingerprint,
        "sequence_length": data.manifest.sequence_length,
        "model_name": config.model_name,
        "model_type": config.model_type,
        "config_overrides": sorted((config.config_overrides or "").replace(" ", "").split(",")),
        "document_mask": config.document_mask,
        "optimizer": config.optimizer,
        "seed": config.seed,
        "batch_size": plan.batch_size,
    }


def find_checkpoint(
    config: TrainConfig, cluster: Cluster, data: PreparedDataset, plan: Plan
) -> Path | None:
    """The checkpoint to go on from, if any. Raises ForgeError if the folder holds another run."""

    def look() -> str | None:
        output_dir = Path(config.output_dir)
        if config.overwrite:
            return None
        checkpoint.refuse_another_run(
            output_dir,
            run_identity(config, data, plan),
            bool(config.resume),
            config.resume_changed,
        )
        found = checkpoint.find(output_dir, config.resume)
        return str(found) if found else None

    found = cluster.main_only(look)
    return Path(found) if found else None


def claim_output(config: TrainConfig, cluster: Cluster, data: PreparedDataset, plan: Plan) -> None:
    """Make the folder this run's own, now that model and data are known to work."""
    identity = run_identity(config, data, plan)
    cluster.main_only(lambda: checkpoint.claim(Path(config.output_dir), identity, config.overwrite))


def finished_result(
    config: TrainConfig, cluster: Cluster, newest: Path | None, plan: Plan
) -> TrainResult | None:
    """The result of a run that `--resume` finds finished, so that it is not done twice."""

    def look() -> dict[str, Any] | None:
        if newest is None:
            return None
        step, result = (
            checkpoint.read_state(newest)["step"],
            TrainResult.load(Path(config.output_dir)),
        )
        if step > plan.total_steps:
            raise ForgeError(
                f"{newest} is after step {step}, this run was asked to end at"
                f" {plan.total_steps}: raise --max-steps or --epochs, or start anew with"
                " --overwrite"
            )
        if result is None or result.steps != plan.total_steps or step != plan.total_steps:
            return None
        print(f"finished already; --overwrite starts anew\n{result.summary()}", flush=True)
        return result.as_dict()

    result = cluster.main_only(look)
    return TrainResult(**result) if result else None


def settings_changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting of what is computed that is another one than at the checkpoint."""
    computed = (
        *("learning_rate", "lr_scheduler", "warmup_steps", "epochs", "max_steps", "seed"),
        *("batch_size", "weight_decay", "max_grad_norm", "mixed_precision"),
        *("sync", "compress", "sync_every", "outer_lr", "outer_momentum"),
        *("outer_warmup_rounds", "fragments", "overlap_steps", "ddp_warmup_steps"),
    )
    return [
        f"{key}: {before.get(key)} -> {now[key]}" for key in computed if before.get(key) != now[key]
    ]
