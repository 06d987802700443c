"""What DiLoCo costs in validation loss, at equal tokens: rounds of updates alone against DDP.

    python benchmarks/diloco_quality.py --text FILE

trains a small model by train.py itself, as many real ranks on this machine as there are peers, and
prints a table of validation losses: DDP, plain averaging (outer rate 1, no momentum) and DiLoCo as
it is by default, with every compression, and with the published outer settings. All runs of one
length take the same updates of the same global batch. DDP takes the same updates with any number of
ranks, so one rank takes them here. Every run is kept in a file of results and never repeated:
a call can be interrupted, and calls with other arms, seeds or rates add to the file.

The learning rate is tuned: all rates are tried with the first seed (DDP, plain averaging and the
default, without compression), the best is repeated with the other seeds; what has no rate of its
own takes that of its uncompressed fellow.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.sync.outer import settings_of_rounds
from p2p_llm_forge.training.results import RESULTS
from prepare_data import prepare
from tests import ROOT
from tests.ports import free_port
from tests.zygote import Zygote

SHAKESPEARE = ROOT.parent / "shared" / "data" / "tinyshakespeare.txt"
# Spelled out, so that results of other defaults are not taken for those of today's.
DILOCO = {
    "sync": "diloco",
    "outer_lr": TrainConfig.outer_lr,  # None: as usual with so many peers
    "outer_momentum": TrainConfig.outer_momentum,  # so too
    "outer_warmup_rounds": TrainConfig.outer_warmup_rounds,
}
AT_ONCE = {"outer_warmup_rounds": 0}
ARMS: dict[str, dict[str, Any]] = {
    "ddp": {"sync": "ddp"},
    "plain averaging": {**DILOCO, "outer_lr": 1.0, "outer_momentum": 0.0, **AT_ONCE},
    "diloco": DILOCO,
    "diloco int8": {**DILOCO, "compress": "int8"},
    "diloco int4": {**DILOCO, "compress": "int4"},
    "published 0.7/0.9": {**DILOCO, "outer_lr": 0.7, "outer_momentum": 0.9, **AT_ONCE},
}
TUNED_BY = {"diloco int8": "diloco", "diloco int4": "diloco"}
# A gpt2 of 1.0 M parameters with 512 tokens.
MODEL = "n_layer=2,n_head=4,n_embd=192,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"


@dataclass(frozen=True)
class Job:
    """One run: an arm, and what differs between the runs of an arm."""

    arm: str
    settings: str  # of the arm, KEY=VALUE,...
    peers: int
    every: int
    updates: int
    learning_rate: float
    seed: int
    model: str
    batch_size: int
    optimizer: str = "adamw"

    def ranks(self) -> int:
        return 1 if self.arm == "ddp" else self.peers

    def key(self) -> dict[str, object]:
        """What the result depends on."""
        is_ddp = self.arm == "ddp"
        left_out = {"arm", *(("peers", "every") if is_ddp else ())}
        left_out |= {"optimizer"} if self.optimizer == "adamw" else set()  # as results once were
        return {name: value for name, value in vars(self).items() if name not in left_out}

    def shape(self) -> dict[str, str]:
        """What says how large the model is."""
        if self.model.startswith("depth="):
            return {"model_type": "qwen3", "depth": self.model.removeprefix("depth=")}
        return {"model_type": "gpt2", "config_overrides": self.model}

    def words(self, data: Path, folder: Path) -> list[str]:
        """The command line of train.py."""
        settings: dict[str, object] = {
            **{"dataset_path": data, "output_dir": folder, "optimizer": self.optimizer},
            **self.shape(),
            **{"batch_size": self.batch_size, "max_steps": self.updates, "seed": self.seed},
            **{"learning_rate": self.learning_rate, "warmup_steps": self.updates // 20},
            **{"save_every": 0, "keep_checkpoints": 1, "log_every": self.updates // 10},
            **{"mixed_precision": "no", "report_to": "none", "cpu": True, "cpu_threads": 1},
            "peer_timeout": 300,
            "compile": "off",
        }
        if self.arm != "ddp":
            settings["sync_every"] = self.every
        given = dict(pair.split("=") for pair in self.settings.split(","))
        return [f"--{name}={value}" for name, value in {**settings, **given}.items()]


class Results:
    """The runs that are done, in a JSON file that is written again after each."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self.runs: list[dict] = json.loads(file.read_text()) if file.exists() else []

    def loss(self, job: Job) -> float | None:
        """The validation loss of a run; None if it has not been done."""
        found = [run["eval_loss"] for run in self.runs if run["job"] == job.key()]
        return found[0] if found else None

    def add(self, job: Job, result: dict) -> None:
        figures = {name: result[name] for name in ("eval_loss", "train_loss")}
        self.runs.append({"job": job.key(), "arm": job.arm, **figures})
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self.runs, indent=1) + "\n")
        scratch.replace(self._file)


def train_all(jobs: list[Job], results: Results, data: Path, work: Path, cores: int) -> None:
    """Take the runs that are not done yet, as many at a time as there are cores for their ranks."""
    waiting = [job for job in dict.fromkeys(jobs) if results.loss(job) is None]
    running: dict[Job, tuple[list[int], Path]] = {}
    if not waiting:
        return
    zygote, started, count = Zygote(), time.monotonic(), len(waiting)
    try:
        while waiting or running:
            busy = sum(job.ranks() for job in running)
            for job in list(waiting):
                if not running or busy + job.ranks() <= cores:
                    waiting.remove(job)
                    busy += job.ranks()
                    running[job] = start(zygote, job, data, Path(tempfile.mkdtemp(dir=work)))
            time.sleep(0.05)
            for job, (pids, folder) in list(running.items()):
                if all(zygote.has_ended(pid) for pid in pids):
                    del running[job]
                    log = (folder / "log").read_text()
                    assert [zygote.wait(pid) for pid in pids] == [0] * len(pids), log
                    results.add(job, json.loads((folder / "run" / RESULTS).read_text()))
                    shutil.rmtree(folder)
                    left = len(waiting) + len(running)
                    summary = f"{job.arm} H={job.every} peers={job.peers} lr={job.learning_rate:g}"
                    print(
                        f"{time.monotonic() - started:6.0f} s  {count - left}/{count}  {summary}"
                        f" seed={job.seed} loss={results.loss(job):.4f}",
                        file=sys.stderr,
                        flush=True,
                    )
    finally:
        zygote.close()


def start(zygote: Zygote, job: Job, data: Path, folder: Path) -> tuple[list[int], Path]:
    """Start the ranks of a run; returns their process ids and the run's folder."""
    words, ranks = job.words(data, folder / "run"), job.ranks()
    if ranks > 1:
        words += [f"--world-size={ranks}", "--master-addr=127.0.0.1"]
        words += [f"--master-port={free_port()}"]
    by_rank = [[*words, f"--rank={rank}"] if ranks > 1 else words for rank in range(ranks)]
    return [zygote.start(of_rank, folder / "log") for of_rank in by_rank], folder


class Plan:
    """Which runs a call asks for, and which of their results stand in the table."""

    def __init__(self, options: argparse.Namespace, results: Results) -> None:
        self._options, self._results = options, results

    def job(self, arm: str, peers: int, every: int, rate: float, seed: int) -> Job:
        options = self._options
        given = dict(ARMS[arm])
        if given["sync"] == "diloco":
            asked = given["outer_lr"], given["outer_momentum"]
            usual = settings_of_rounds(*asked, peers, every, options.optimizer)
            given["outer_lr"], given["outer_momentum"] = usual
        settings = ",".join(f"{name}={value}" for name, value in given.items())
        updates = options.rounds * every
        sizes = (options.model, options.batch_size, options.optimizer)
        return Job(arm, settings, peers, every, updates, rate, seed, *sizes)

    def cells(self) -> list[tuple[str, int, int]]:
        """Arm, peers, round length: rows and columns of the tables."""
        options = self._options
        return [
            (arm, peers, every)
            for every in options.every
            for peers in options.peers
            for arm in options.arms
        ]

    def tuning(self) -> list[Job]:
        """The runs that choose the learning rates."""
        return [
            self.job(arm, peers, every, rate, self._options.seeds[0])
            for arm, peers, every in self.cells()
            if arm not in TUNED_BY
            for rate in self._options.learning_rates
        ]

    def best_rate(self, arm: str, peers: int, every: int) -> float | None:
        """The rate with the lowest loss, of those that were tried with the first seed."""
        arm, seed = TUNED_BY.get(arm, arm), self._options.seeds[0]
        losses = {
            rate: loss
            for rate in self._options.learning_rates
            if (loss := self._results.loss(self.job(arm, peers, every, rate, seed))) is not None
        }
        return min(losses, key=losses.__getitem__) if losses else None

    def seeds(self) -> list[Job]:
        """The runs of all seeds at the best rates; seed by seed, so that a part says something."""
        return [
            self.job(arm, peers, every, rate, seed)
            for seed in self._options.seeds
            for arm, peers, every in self.cells()
            if (rate := self.best_rate(arm, peers, every)) is not None
        ]

    def losses(self, arm: str, peers: int, every: int) -> dict[int, float]:
        """By seed, at the best rate."""
        rate = self.best_rate(arm, peers, every)
        if rate is None:
            return {}
        found = {
            seed: self._results.loss(self.job(arm, peers, every, rate, seed))
            for seed in self._options.seeds
        }
        return {seed: loss for seed, loss in found.items() if loss is not None}


def table(plan: Plan, options: argparse.Namespace) -> str:
    """Validation losses in Markdown: mean and spread over the seeds, and against DDP's seeds."""
    lines = [
        "| peers | H | arm | learning rate | validation loss | spread | against ddp | seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for peers in options.peers:
        for every in options.every:
            of_ddp = plan.losses("ddp", peers, every)
            for arm in options.arms:
                losses = plan.losses(arm, peers, every)
                if not losses:
                    continue
                # Of the same seeds: they share initial weights, data and so most of their luck.
                pairs = [(losses[seed], of_ddp[seed]) for seed in losses if seed in of_ddp]
                more = statistics.mean(own / ddp - 1 for own, ddp in pairs) if pairs else None
                spread = statistics.stdev(losses.values()) if len(losses) > 1 else None
                lines.append(
                    f"| {peers} | {every} | {arm} | {plan.best_rate(arm, peers, every):g}"
                    f" | {statistics.mean(losses.values()):.4f}"
                    f" | {'-' if spread is None else f'{spread:.4f}'}"
                    f" | {'-' if more is None else f'{more:+.2%}'}"
                    f" | {' '.join(map(str, losses))} |"
                )
    return "\n".join(lines)


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, default=SHAKESPEARE)
    parser.add_argument("--work-dir", type=Path, help="default: a temporary folder")
    parser.add_argument("--results", type=Path, default=Path("diloco_quality.json"))
    parser.add_argument("--peers", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--every", type=int, nargs="+", default=[10, 20, 50], help="round lengths")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[1e-3, 2e-3, 3e-3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="names, or KEY=VALUE,...")
    parser.add_argument("--model", default=MODEL, help="--config-overrides of a gpt2, or depth=N")
    parser.add_argument("--optimizer", default="adamw", help="the inner one")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--sequence-length", type=int, default=64)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--cores", type=int, default=2, help="ranks that train at a time")
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    options = parser.parse_args(words)
    for arm in options.arms:
        if arm not in ARMS:
            ARMS[arm] = {**DILOCO, **dict(pair.split("=") for pair in arm.split(","))}
    return options


def main() -> None:
    """Train what is not done yet, and print the table."""
    options = options_of(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # ends the runs, too
    results = Results(options.results)
    plan = Plan(options, results)
    if not options.only_table:
        with tempfile.TemporaryDirectory(dir=options.work_dir) as temporary:
            work = Path(temporary)
            data = work / "data"
            prepare(
                PrepareConfig(
                    [str(options.text)],
                    str(data),
                    vocab_size=options.vocab_size,
                    sequence_length=options.sequence_length,
                )
            )
            train_all(plan.tuning(), results, data, work, options.cores)
            train_all(plan.seeds(), results, data, work, options.cores)
    print(table(plan, options))


if __name__ == "__main__":
    main()
