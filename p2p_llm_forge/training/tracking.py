"""What a run says: progress, metrics.jsonl, trackers. Silent off the main process."""

from __future__ import annotations

import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.data.order import Plan
from p2p_llm_forge.errors import ForgeError, nearest
from p2p_llm_forge.peers.cluster import Cluster

METRICS = "metrics.jsonl"
PLAIN_LINE_INTERVAL_S = 5.0


class Silent:
    """What the other ranks have instead of a `Tracking`."""

    def start(self, first_step: int, total_steps: int) -> None: ...

    def step(self) -> None: ...

    def log(self, metrics: dict[str, Any]) -> None: ...

    def say(self, text: str) -> None: ...

    def finish(self) -> None: ...


class Tracking(Silent):
    """The main process's voice: a bar on a terminal, lines elsewhere, and metrics.jsonl."""

    def __init__(self, config: TrainConfig, cluster: Cluster) -> None:
        self._output_dir = Path(config.output_dir)
        self._accelerator = cluster.accelerator
        self._settings = {
            key: value if isinstance(value, bool | int | float | str) else str(value)
            for key, value in as_dict(config).items()
        }
        self._tracker_names = tracker_names(config.report_to)
        self._bar: Any = None
        self._metrics: Any = None
        self._last_line = 0.0

    def start(self, first_step: int, total_steps: int) -> None:
        """Open the bar, metrics.jsonl (without lines of steps to be repeated) and the trackers."""
        from tqdm import tqdm

        path = self._output_dir / METRICS
        keep_metrics_until(path, first_step)
        self._metrics = path.open("a", encoding="utf-8")
        if self._tracker_names:
            from accelerate.tracking import filter_trackers

            self._accelerator.log_with = filter_trackers(self._tracker_names, str(self._output_dir))
            self._accelerator.init_trackers("runs", config=self._settings)
        self._bar = tqdm(
            initial=first_step, total=total_steps, unit="step", disable=not sys.stderr.isatty()
        )

    def step(self) -> None:
        """One more update is done."""
        self._bar.update()

    def log(self, metrics: dict[str, Any]) -> None:
        """Record figures; `metrics` holds the `step` they belong to (updates done so far)."""
        self._metrics.write(json.dumps(metrics) + "\n")
        self._metrics.flush()
        if self._tracker_names:
            numbers = {
                key: value for key, value in metrics.items() if isinstance(value, int | float)
            }
            self._accelerator.log(numbers, step=metrics["step"])
        shown = {
            key: metrics[key]
            for key in ("loss", "eval_loss", "tokens_per_second")
            if metrics.get(key) is not None
        }
        text = "  ".join(
            f"{key} {value:,.0f}" if value > 100 else f"{key} {value:.4f}"
            for key, value in shown.items()
        )
        if metrics.get("bytes_sent_per_update"):
            text += (
                f"  communication {metrics['communication']:.1%},"
                f" {metrics['bytes_sent_per_update'] / 1e6:.2f} MB/step"
            )
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        elif time.monotonic() - self._last_line > PLAIN_LINE_INTERVAL_S or "eval_loss" in metrics:
            self._last_line = time.monotonic()
            print(f"step {metrics['step']}/{self._bar.total}  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        if self._bar is None or self._bar.disable:
            print(text, flush=True)
        else:
            self._bar.write(text)

    def finish(self) -> None:
        """Close everything that `start` opened."""
        if self._bar is not None:
            self._bar.close()
            self._metrics.close()
            if self._tracker_names:
                self._accelerator.end_training()
            self._bar = None


def introduction(cluster: Cluster, data: PreparedDataset, plan: Plan, lm: Any) -> str:
    """What is about to happen, in a few lines."""
    parameters = sum(p.numel() for p in lm.parameters())
    world, manifest = cluster.world_size, data.manifest
    blocks, length = manifest.splits["train"].blocks, manifest.sequence_length
    accelerator = cluster.accelerator
    return f"""\
model     {lm.config.model_type}, {parameters / 1e6:.2f} M parameters
data      {blocks:,} blocks of {length} tokens, vocabulary {manifest.vocab_size:,}
peers     {world} process(es) on {cluster.device.type}, precision {accelerator.mixed_precision}
updates   {plan.total_steps:,} of {plan.batch_size} blocks, {told_shares(plan.shares)}, \
micro-batches of {plan.micro_batch_size}"""


def told_shares(shares: list[int]) -> str:
    """Who takes how many blocks of an update, in words."""
    if len(set(shares)) == 1:
        return f"{shares[0]} on each of {len(shares)} process(es)"
    return f"{' + '.join(map(str, shares))} on {len(shares)} processes"


class LossWindow:
    """The losses since the last line of metrics.jsonl, kept update by update.

    They are summed without rounding errors, so the line is the same whether or not the run was
    saved and resumed in between. They leave the device, and this rank, only when asked for.

    loses_rounds_after: after so many updates losses that are not finite do not end the run, which
    will go back by itself.
    """

    def __init__(
        self,
        cluster: Cluster,
        tokens_per_update: int,
        first_step: int,
        since_log: dict[str, Any],
        loses_rounds_after: float = math.inf,
    ) -> None:
        self._cluster = cluster
        self._tokens_per_update = tokens_per_update
        self._nats = list(since_log["nats"])  # of all ranks
        self._updates = since_log["updates"]
        self._is_spoiled = since_log.get("is_spoiled", False)
        self._pending: list[torch.Tensor] = []  # of this rank
        self._lines: list[tuple[int, dict[str, Any]]] = []  # and how many of the pending they end
        self._next_step = first_step + 1
        self._loses_rounds_after = loses_rounds_after

    def add(self, nats: torch.Tensor) -> None:
        """This rank's summed loss of one more update: a scalar on the device."""
        self._pending.append(nats)

    def end_line(self, line: dict[str, Any]) -> None:
        """The updates so far make up this line; `settle` puts in the loss."""
        self._lines.append((len(self._pending), line))

    def has_line(self) -> bool:
        """Whether a line waits for its loss."""
        return bool(self._lines)

    def settle(self) -> list[dict[str, Any]]:
        """The lines that have ended, with all ranks' losses. All ranks must call.

        Raises ForgeError, on all ranks, if a loss is not finite (but see `loses_rounds_after`:
        then the line's loss is None).
        """
        by_rank: list[list[float]] = [[]]
        if self._pending:
            by_rank = self._cluster.gather_numbers(torch.stack(self._pending).tolist())
        updates = list(zip(*by_rank, strict=True))
        ended, start = [], 0
        for end, line in self._lines:
            self._take(updates[start:end])
            loss = math.fsum(self._nats) / (self._updates * self._tokens_per_update)
            ended.append({**line, "loss": None if self._is_spoiled else loss})
            self._nats, self._updates, self._is_spoiled, start = [], 0, False, end
        self._take(updates[start:])
        self._pending.clear()
        self._lines.clear()
        return ended

    def _take(self, updates: list[tuple[float, ...]]) -> None:
        for losses in updates:
            bad = [rank for rank, loss in enumerate(losses) if not math.isfinite(loss)]
            if bad and self._next_step <= self._loses_rounds_after:
                raise ForgeError(
                    f"the loss became NaN or infinite at step {self._next_step} (first on rank"
                    f" {bad[0]}); nothing was saved after it and earlier checkpoints are untouched."
                    " Lower --learning-rate, raise --warmup-steps or set --max-grad-norm 1, then go"
                    " on with --resume auto"
                )
            self._is_spoiled = self._is_spoiled or bool(bad)
            self._nats += [] if bad else losses
            self._next_step += 1
            self._updates += 1

    def since_log(self) -> dict[str, Any]:
        """What a later run needs to go on; after `settle`."""
        # A copy: the background writer reads it while the list grows.
        return {
            "nats": list(self._nats),
            "updates": self._updates,
            "is_spoiled": self._is_spoiled,
        }


def tracker_names(report_to: str) -> list[str]:
    """The trackers that `--report-to` asks for. Raises ForgeError for unknown or missing ones."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    installed = {str(name) for name in get_available_trackers()}
    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    for name in names:
        if name not in known:
            raise ForgeError(
                f"--report-to: unknown tracker '{name}': {nearest(name, known | {'none'})}"
            )
        if name not in installed:
            raise ForgeError(
                f"--report-to: {name} is not installed: pip install {name}, or --report-to none"
            )
    return names


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, and a torn last one: they come again."""
    if not path.exists():
        return
    kept = []
    for line in path.read_text(encoding="utf-8").splitlines(keepends=True):
        try:
            if line.endswith("\n") and json.loads(line)["step"] <= step:
                kept.append(line)
        except (ValueError, KeyError):
            continue
    partial = path.with_name(f"tmp-{path.name}")
    partial.write_text("".join(kept), encoding="utf-8")
    partial.rename(path)
