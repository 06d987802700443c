"""What a run shows: progress, metrics.jsonl, trackers. Silent off the main process."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.errors import Problems, nearest
from p2p_llm_forge.files import write_file
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.training.plan import Plan

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
    """What the main process shows: a bar on a terminal, lines elsewhere, and metrics.jsonl."""

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
        text = line_of(metrics)
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


def line_of(metrics: dict[str, Any]) -> str:
    """The figures that are worth a look while a run lasts."""
    shown = [
        f"{key} {value:,.0f}" if value > 100 else f"{key} {value:.4f}"
        for key in ("loss", "eval_loss", "tokens_per_second")
        if (value := metrics.get(key)) is not None
    ]
    if metrics.get("bytes_sent_per_update"):
        shown.append(
            f"communication {metrics['communication']:.1%},"
            f" {metrics['bytes_sent_per_update'] / 1e6:.2f} MB/step"
        )
    return "  ".join(shown)


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
updates   {plan.total_steps:,} of {plan.batch_size} blocks, {_in_words(plan.shares)}, \
micro-batches of {plan.micro_batch_size}"""


def _in_words(shares: list[int]) -> str:
    """How many blocks of an update each process takes."""
    if len(set(shares)) == 1:
        return f"{shares[0]} on each of {len(shares)} process(es)"
    return f"{' + '.join(map(str, shares))} on {len(shares)} processes"


def tracker_names(report_to: str) -> list[str]:
    """The trackers that `--report-to` asks for. Raises ForgeError for unknown or missing ones."""
    from accelerate.tracking import LOGGER_TYPE_TO_CLASS, get_available_trackers

    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    installed = {str(name) for name in get_available_trackers()}
    known = {str(name) for name in LOGGER_TYPE_TO_CLASS}
    problems = Problems()
    for name in names:
        if name not in known:
            problems.require(
                False, f"--report-to {name}: no such tracker", nearest(name, known | {"none"})
            )
        elif name not in installed:
            problems.require(
                False,
                f"--report-to {name}: it is not installed",
                f"pip install {name}, or leave it out",
            )
    problems.raise_any()
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
    write_file(path, "".join(kept))
