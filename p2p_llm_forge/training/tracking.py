"""What a run shows: progress, metrics.jsonl, trackers. Silent off the main process."""

from __future__ import annotations

import contextlib
import json
import math
import re
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

from accelerate.tracking import LOGGER_TYPE_TO_CLASS, filter_trackers, get_available_trackers
from tqdm import tqdm

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.errors import ForgeError, Problems, nearest
from p2p_llm_forge.files import files_in, parse_json, write_file
from p2p_llm_forge.model.lora import settings_of
from p2p_llm_forge.peers.addresses import is_loopback, resolve
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.shapes import is_count, require_shape
from p2p_llm_forge.training.numbers import duration
from p2p_llm_forge.training.plan import Plan
from p2p_llm_forge.training.run_record import METRICS, RUNS, put_on_record

PLAIN_LINE_INTERVAL_S = 5.0
SILENCE_S = 10.0  # after which the loss of a single update is shown
OF_PEERS = {
    *("tokens_per_second", "mfu", "memory_peak_bytes", "peers"),
    *("communication", "bytes_sent_per_update", "discarded_updates"),
}
OF_TRACKER = re.compile(r"events\.out\.tfevents\..+|hparams\.yml")


class Silent:
    """What the other ranks have instead of a `Tracking`."""

    def start(self, first_step: int, total_steps: int, began: float | None = None) -> None: ...
    def step(self, nats: Any = None, tokens: int = 0) -> None: ...
    def expect(self, total_steps: int) -> None: ...
    def log(self, metrics: dict[str, Any]) -> None: ...
    def texts(self, step: int, texts: dict[str, str]) -> None: ...
    def say(self, text: str) -> None: ...
    def finish(self) -> None: ...


class Elsewhere(Silent):
    """What a machine shows whose run is shown on another: that it trains, and what it has done."""

    def __init__(self, launch: Launch) -> None:
        self._who = f"rank {launch.rank} of {launch.world_size}"
        self._main, self._done = f"rank 0 at {launch.master_addr}", 0
        self._has_started = False

    def start(self, first_step: int, total_steps: int, began: float | None = None) -> None:
        self._has_started = True
        left = f"{total_steps - first_step:,} updates"
        print(
            f"{self._who} trains with {self._main}, where the progress is shown ({left})",
            flush=True,
        )

    def step(self, nats: Any = None, tokens: int = 0) -> None:
        self._done += 1

    def finish(self) -> None:
        if self._has_started:
            done = f"took part in {self._done:,} updates"
            print(f"{self._who} {done}; figures and model are with {self._main}", flush=True)


def tracking_of(
    config: TrainConfig, cluster: Cluster, confirm: Callable[[], None] = lambda: None
) -> Silent:
    """What this rank shows: all on the main process, two lines on each further machine."""
    launch = cluster.launch
    if cluster.is_main:
        return Tracking(config, cluster, confirm)
    is_on_another = launch.rank >= launch.local_world_size and launch.local_rank == 0
    if is_on_another and launch.master_addr and not is_loopback(resolve(launch.master_addr)[0]):
        return Elsewhere(launch)
    return Silent()


class Tracking(Silent):
    """What the main process shows: a bar on a terminal, lines elsewhere, and metrics.jsonl.

    A full disk, or a tracker that fails, costs its lines and never the run. confirm: raises
    ForgeError if this process may not write into the folder any more.
    """

    def __init__(
        self, config: TrainConfig, cluster: Cluster, confirm: Callable[[], None] = lambda: None
    ) -> None:
        self._confirm, self._warned = confirm, set[str]()
        self._config, self._accelerator = config, cluster.accelerator
        self._tracker_names = tracker_names(config.report_to)
        self._opened = contextlib.ExitStack()
        self._shown_at = self._logged_at = -math.inf
        self._first_step = self._done = 0

    def start(self, first_step: int, total_steps: int, began: float | None = None) -> None:
        """Open the bar, metrics.jsonl (without lines of steps to be repeated) and the trackers.

        began: when the session did, by `time.monotonic`; without it, now.
        """
        self._first_step = self._done = first_step
        self._started_at = time.monotonic()
        self._began = self._started_at if began is None else began
        path = Path(self._config.output_dir) / METRICS
        keep_metrics_until(path, first_step)
        self._metrics = self._opened.enter_context(path.open("a", encoding="utf-8"))
        if self._tracker_names:
            folder, settings = self._config.output_dir, as_dict(self._config)
            settings |= {k: str(v) for k, v in settings.items() if not isinstance(v, int | float)}
            self._accelerator.log_with = filter_trackers(self._tracker_names, folder)
            before = self._events()
            name = Path(folder).resolve().name
            named = {service: {"name": name} for service in ("wandb", "trackio")}
            self._accelerator.init_trackers(RUNS, config=settings, init_kwargs=named)
            with self._surviving("run.json"):
                put_on_record(Path(folder), self._events() - before)
            self._opened.callback(self._accelerator.end_training)
        is_hidden = not sys.stderr.isatty()
        bar = tqdm(initial=first_step, total=total_steps, unit="step", disable=is_hidden)
        self._bar = self._opened.enter_context(bar)

    def _events(self) -> set[str]:
        """TensorBoard's files, as run.json names them. Other trackers write elsewhere."""
        if "tensorboard" not in self._tracker_names:
            return set()
        found = files_in(Path(self._config.output_dir) / RUNS)
        return {f"{RUNS}/{name}" for name in found if OF_TRACKER.fullmatch(Path(name).name)}

    def step(self, nats: Any = None, tokens: int = 0) -> None:
        """One more update is done. nats: the summed loss of this rank's tokens in it, a scalar."""
        self._bar.update()
        self._done += 1
        now, has_line = time.monotonic(), self._done % self._config.log_every == 0
        if has_line or not tokens or now - self._shown_at < SILENCE_S:
            return  # asking a GPU for its loss waits for it
        self._shown_at = now
        update_s = (now - self._started_at) / (self._done - self._first_step)
        figures = {"loss": float(nats) / tokens, "seconds": now - self._began}
        left_s = ((self._bar.total or self._done) - self._done) * update_s
        self._show({"step": self._done, **figures, "seconds_left": left_s})

    def expect(self, total_steps: int) -> None:
        """The run is to end after so many updates."""
        self._bar.total = total_steps

    def log(self, metrics: dict[str, Any]) -> None:
        """Record figures; `metrics` holds the `step` they belong to (updates done so far)."""
        try:
            self._confirm()
        except ForgeError:
            return  # the run ends where its ranks next agree, and these lines are another's
        with self._surviving("metrics.jsonl"):
            self._metrics.write(json.dumps(metrics) + "\n")
            self._metrics.flush()
        self._track(metrics["step"], grouped(metrics))
        now = time.monotonic()
        is_due = now - self._logged_at > PLAIN_LINE_INTERVAL_S or "eval_loss" in metrics
        if is_due or not self._bar.disable:
            self._shown_at = self._logged_at = now
            self._show(metrics)

    def texts(self, step: int, texts: dict[str, str]) -> None:
        """Give texts, by their names, to the trackers."""
        self._track(step, texts)

    def _track(self, step: int, values: Mapping[str, float | str]) -> None:
        if self._tracker_names and values:
            with self._surviving("a tracker"):
                self._accelerator.log(dict(values), step=step)

    def _show(self, metrics: dict[str, Any]) -> None:
        """The figures after some step: beside the bar, which has the times, or as a line."""
        text = line_of(metrics)
        if not self._bar.disable:
            self._bar.set_postfix_str(text)
        else:
            text = "  ".join([text, *times_of(metrics)])
            print(f"step {metrics['step']}/{self._bar.total}  {text}", flush=True)

    def say(self, text: str) -> None:
        """A line for the person who watches."""
        with tqdm.external_write_mode():
            print(text, flush=True)

    def finish(self) -> None:
        """Close everything that `start` opened."""
        with self._surviving("the end of metrics.jsonl or of a tracker"):
            self._opened.close()

    @contextlib.contextmanager
    def _surviving(self, what: str) -> Iterator[None]:
        """Warn once, and continue, where a write of figures fails."""
        try:
            yield
        except Exception as error:  # trackers raise what their services raise
            if what not in self._warned:
                self._warned.add(what)
                reason = (str(error).strip() or type(error).__name__).splitlines()[0]
                self.say(f"warning: {what} could not be written ({reason}); the run continues")


def line_of(metrics: dict[str, Any]) -> str:
    """The figures that are worth a look while a run lasts."""
    shown = [
        (f"{key} {value:,.0f}" if value > 100 else f"{key} {value:.4f}")
        + (f" ± {error:.4f}" if (error := metrics.get(f"{key}_stderr")) is not None else "")
        for key in ("loss", "eval_loss", "tokens_per_second")
        if (value := metrics.get(key)) is not None
    ]
    if (used := metrics.get("mfu")) is not None:
        shown.append(f"MFU {used:.1%}")
    if most := metrics.get("memory_peak_bytes"):
        shown.append(f"memory {most / 1e9:.2f} GB")
    if metrics.get("bytes_sent_per_update"):
        sent = f"{metrics['bytes_sent_per_update'] / 1e6:.2f} MB/step"
        shown.append(f"communication {metrics['communication']:.1%}, {sent}")
    return "  ".join(shown)


def times_of(metrics: dict[str, Any]) -> list[str]:
    """How long the session has lasted, and how long the run takes from here."""
    words = {"seconds": "after", "seconds_left": "ends in about"}
    return [
        f"{word} {duration(metrics[key])}"
        for key, word in words.items()
        if metrics.get(key) is not None
    ]


def introduction(cluster: Cluster, data: PreparedDataset, plan: Plan, lm: Any) -> str:
    """What is about to happen, in a few lines."""
    parameters = sum(p.numel() for p in lm.parameters())
    frozen = (
        0 if settings_of(lm) else sum(p.numel() for p in lm.parameters() if not p.requires_grad)
    )
    note = f", of which no text reaches {frozen / 1e6:.2f} M" if frozen else ""
    manifest, precision = data.manifest, cluster.accelerator.mixed_precision
    split, length = manifest.splits["train"], manifest.sequence_length
    blocks, learnt = split.blocks, ""
    if manifest.conversations is not None:
        share = manifest.share_trained("train")
        learnt = f"; conversations, {split.trained:,} tokens to learn ({share:.0%})"
    shares = f"{' + '.join(map(str, plan.shares))} on {cluster.world_size} processes"
    if len(set(plan.shares)) == 1:
        shares = f"{plan.shares[0]} on each of {cluster.world_size} process(es)"
    return f"""\
model     {lm.config.model_type}, {parameters / 1e6:.2f} M parameters{note}
data      {blocks:,} blocks of {length} tokens, vocabulary {manifest.vocab_size:,}{learnt}
peers     {cluster.world_size} process(es) on {cluster.device.type}, precision {precision}
updates   {plan.total_steps:,} of {plan.batch_size} blocks, {shares}, \
micro-batches of {plan.micro_batch_size}"""


def tracker_names(report_to: str) -> list[str]:
    """The trackers that `--report-to` asks for. Raises ForgeError for unknown or missing ones."""
    names = [name.strip() for name in report_to.split(",") if name.strip() not in ("", "none")]
    known, problems = [*LOGGER_TYPE_TO_CLASS, "none"], Problems()
    installed = {str(name) for name in get_available_trackers()}
    for name in names:
        asked, is_known = f"--report-to {name}", name in known
        problems.require(is_known, f"{asked}: no such tracker", nearest(name, known))
        is_missing, fix = is_known and name not in installed, f"pip install {name}, or leave it out"
        problems.require(not is_missing, f"{asked}: it is not installed", fix)
    problems.raise_any()
    return names


def grouped(metrics: dict[str, Any]) -> dict[str, float]:
    """The numbers of a line as trackers name them: train/loss, eval/loss, peers/communication."""
    is_evaluation, found = "eval_loss" in metrics, {}
    for key, value in metrics.items():
        group = "eval" if is_evaluation else "peers" if key in OF_PEERS else "train"
        if key == "peers":
            found["peers/processes"] = value
        elif key == "shares":
            found |= {f"peers/blocks_of_rank_{rank}": one for rank, one in enumerate(value)}
        elif key != "step" and isinstance(value, int | float):
            found[f"{group}/{key.removeprefix('eval_')}"] = value
    return found


def keep_metrics_until(path: Path, step: int) -> None:
    """Drop the lines of metrics.jsonl after `step`, which come again, and damaged ones."""
    if path.exists():
        write_file(path, "".join(lines_until(path, step)))


def lines_until(path: Path, step: int) -> list[str]:
    """The lines of a file up to `step`, without damaged ones; none if there is no file."""
    if not path.exists():
        return []
    kept = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines(keepends=True):
        with contextlib.suppress(ValueError):
            require_shape(figures := parse_json(line), {"step": is_count})
            if line.endswith("\n") and figures["step"] <= step:
                kept.append(line)
    return kept
