"""Outer settings of DiLoCo by the dozen: many small models train in one process, as one batch.

    python benchmarks/diloco_sweep.py --text FILE

takes every arm (a setting) with every seed to the same number of updates of the same global batches
and prints the validation losses, also against DDP's with the same seeds. A run has a machine (see
benchmarks/side_by_side.py) for each of its peers; between them no byte travels. So a sweep tells
which settings are worth real runs, which benchmarks/diloco_quality.py makes. The outer step, the
codecs, the schedule and the order of the data are those of train.py.

Every finished group of runs is kept in a file of results and never repeated: a call can be
interrupted, and calls with other arms, seeds or rates add to the file.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import statistics
import sys
import tempfile
import time
from dataclasses import dataclass, replace
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.side_by_side import Optimizer, Sizes, losses
from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.data.order import blocks_at
from p2p_llm_forge.data.splits import VALIDATION
from p2p_llm_forge.model.optimizer import learning_rate_factor
from p2p_llm_forge.sync.compress import CODECS, Codec, ErrorFeedback
from p2p_llm_forge.sync.outer import outer_settings, outer_step, settings_of_rounds
from prepare_data import prepare


@dataclass(frozen=True)
class Arm:
    """A setting of the sweep; as it stands here, plain averaging."""

    sync: str = "diloco"  # or ddp
    ddp_rounds: int = 0  # before the first: as many updates as by ddp
    outer_lr: float | None = 1.0  # None: the usual one of so many peers and such rounds
    outer_momentum: float | None = 0.0  # so too
    warmup_rounds: int = 0  # from plain averaging to the two above
    fade_rounds: int = 0  # and back, at the end of the run
    compress: str = "none"  # of the pseudo-gradients: a codec's name
    feedback_decay: float = 1.0  # what is kept of the residual from round to round
    inner: str = "adamw"  # or muon, for the layers' matrices
    averages_moments: int = 0  # 1: of AdamW, too, at the end of a round


class TopK(Codec):
    """Keeps the largest of every 4096 values. On the wire stand zeros too: no bytes count here."""

    group, group_bytes = 4096, 4 * 4096

    def __init__(self, kept: float) -> None:
        self.name, self._kept = f"top{kept:g}", round(kept * self.group)

    def _write(self, values: Tensor, wire: Tensor) -> None:
        chunks = values.unflatten(1, (-1, self.group))
        kept = chunks.abs().topk(self._kept).indices
        sent = torch.zeros_like(chunks).scatter_(-1, kept, chunks.gather(-1, kept))
        wire.view(torch.float32).copy_(sent.flatten(1))

    def _read(self, wire: Tensor, values: Tensor) -> None:
        values.copy_(wire.view(torch.float32))


TOP = {codec.name: codec for codec in (TopK(0.25), TopK(0.05))}
DEFAULT = Arm(
    outer_lr=TrainConfig.outer_lr,
    outer_momentum=TrainConfig.outer_momentum,
    warmup_rounds=TrainConfig.outer_warmup_rounds,
)
AT_ONCE = replace(DEFAULT, warmup_rounds=0)
# SparseLoCo, arXiv 2508.15706: what a peer has not sent yet takes the place of momentum.
SPARSE = Arm(feedback_decay=0.95)
ARMS: dict[str, Arm] = {
    "ddp": Arm(sync="ddp"),
    "plain averaging": Arm(),
    **{  # 0.7/0.9: as published (arXiv 2311.08105)
        f"{lr:g}/{momentum:g}": Arm(outer_lr=lr, outer_momentum=momentum)
        for lr in (0.3, 0.5, 0.7)
        for momentum in (0.5, 0.8, 0.9)
    },
    "default": DEFAULT,
    **{f"default over {n} rounds": replace(DEFAULT, warmup_rounds=n) for n in (10, 40)},
    **{
        f"{lr:g}/{momentum:g} over 20 rounds": Arm(
            outer_lr=lr, outer_momentum=momentum, warmup_rounds=20
        )
        for lr, momentum in ((0.3, 0.9), (0.5, 0.7), (0.5, 0.9), (0.7, 0.5), (0.7, 0.8))
    },
    "default, fades over 20": replace(DEFAULT, fade_rounds=20),
    "default, fades over 50": replace(DEFAULT, fade_rounds=50),
    "default int8": replace(DEFAULT, compress="int8"),
    "default int4": replace(DEFAULT, compress="int4"),
    **{f"sparse {name}": replace(SPARSE, compress=name) for name in TOP},
    "default after 10 rounds of ddp": replace(DEFAULT, ddp_rounds=10),
    "default, averages moments": replace(DEFAULT, averages_moments=1),
    "ddp, Muon": Arm(sync="ddp", inner="muon"),
    "plain averaging, Muon": Arm(inner="muon"),
    "default, Muon": replace(DEFAULT, inner="muon"),  # MuLoCo, arXiv 2505.23725
}


class Rounds:
    """The outer steps of one run."""

    def __init__(self, arm: Arm, rounds: int, anchor: Tensor) -> None:
        self._arm, self._left, self._done = arm, rounds, 0
        self._anchor, self._momentum_buffer = anchor, None  # (parameters)
        self._codec, self._feedback = {**CODECS, **TOP}[arm.compress], ErrorFeedback()

    def end_round(self, weights: Tensor) -> None:
        """Exchange pseudo-gradients. weights: (peers, parameters), changed in place."""
        self._left -= 1
        asked = self._arm.outer_lr, self._arm.outer_momentum
        lr, momentum = outer_settings(self._done, *asked, self._arm.warmup_rounds)
        lr, momentum = outer_settings(self._left, lr, momentum, self._arm.fade_rounds)
        gradient = self._arriving(self._anchor - weights).mean(0)
        self._anchor, self._momentum_buffer = outer_step(
            self._anchor, gradient, self._momentum_buffer, lr, momentum
        )
        weights.copy_(self._anchor)
        self._done += 1

    def agree(self, weights: Tensor) -> None:
        """Take weights (parameters) that all peers have, after updates as ddp's, as agreed on."""
        self._anchor = weights.clone()
        self._left -= 1

    def _arriving(self, gradients: Tensor) -> Tensor:
        """What the others decode of each peer's values; the sum is not compressed again."""
        count, feedback = gradients.shape[1], self._feedback
        if feedback.residual is not None:
            feedback.residual = feedback.residual * self._arm.feedback_decay
        filled = F.pad(gradients, (0, -count % self._codec.group))
        return self._codec.decode(feedback.encode(self._codec, filled))[:, :count]


@dataclass(frozen=True)
class Run:
    """An arm, and all else that its result depends on."""

    arm: Arm
    learning_rate: float
    seed: int
    every: int
    rounds: int
    peers: int
    batch_size: int  # blocks in an update
    sizes: Sizes
    text: str  # the file's name


def train(runs: list[Run], blocks: Blocks) -> Tensor:
    """Train runs that differ in arm and learning rate. Returns weights (runs, parameters)."""
    first, peers = runs[0], runs[0].peers
    sizes, updates, seed = first.sizes, first.rounds * first.every, first.seed
    start = sizes.initial(seed)
    weights = start.repeat(len(runs) * peers, 1)
    machines = [run for run in runs for _ in range(peers)]
    optimizer = Optimizer(
        weights, sizes, [m.learning_rate for m in machines], [m.arm.inner for m in machines]
    )
    by_run, gradients_by_run = (
        flat.view(len(runs), peers, -1) for flat in (weights, optimizer.gradient)
    )
    ddp_rounds = torch.tensor(
        [run.rounds if run.arm.sync == "ddp" else run.arm.ddp_rounds for run in runs]
    )
    rounds = [Rounds(run.arm, run.rounds, start[0]) for run in runs]
    schedule = TrainConfig(warmup_steps=updates // 20, max_steps=updates)
    factor = learning_rate_factor(schedule, updates)
    leaf = weights.view_as(weights).requires_grad_()
    for step in range(updates):
        numbers = blocks_at(step * first.batch_size, first.batch_size, len(blocks), seed)
        inputs, targets = (
            torch.from_numpy(tokens).view(peers, -1, sizes.length).repeat(len(runs), 1, 1)
            for tokens in blocks.inputs_and_targets(numbers)
        )
        total = losses(leaf, inputs, targets, sizes).sum()
        optimizer.gradient.copy_(torch.autograd.grad(total, leaf)[0])
        is_ddp = step // first.every < ddp_rounds
        gradients_by_run[is_ddp] = (
            gradients_by_run[is_ddp].mean(1, keepdim=True).expand(-1, peers, -1)
        )
        norms = optimizer.gradient.norm(dim=1, keepdim=True)
        optimizer.gradient.mul_((TrainConfig.max_grad_norm / (norms + 1e-6)).clamp_max(1))
        optimizer.step(factor(step))
        if (step + 1) % first.every == 0:
            for number, run in enumerate(runs):
                if is_ddp[number]:
                    rounds[number].agree(by_run[number, 0])
                    continue
                rounds[number].end_round(by_run[number])
                if run.arm.averages_moments:
                    optimizer.average_moments(range(number * peers, (number + 1) * peers))
    return by_run[:, 0].clone()


@torch.no_grad()
def evaluate(weights: Tensor, blocks: Blocks, sizes: Sizes) -> list[float]:
    """Nats per token of machines (machines, parameters) on all blocks."""
    nats = torch.zeros(len(weights))
    for start in range(0, len(blocks), 16):
        numbers = range(start, min(start + 16, len(blocks)))
        inputs, targets = (
            torch.from_numpy(tokens).expand(len(weights), -1, -1)
            for tokens in blocks.inputs_and_targets(numbers)
        )
        nats += losses(weights, inputs, targets, sizes) * len(numbers)
    return (nats / len(blocks)).tolist()


class Results:
    """The runs that are done, in a JSON file that is written again after each group."""

    def __init__(self, file: Path) -> None:
        self._file = file
        self._runs: list[dict] = json.loads(file.read_text()) if file.exists() else []
        for done in self._runs:  # before an arm had them, settings were as they are by default
            done["run"]["arm"] = dataclasses.asdict(Arm()) | done["run"]["arm"]

    def loss(self, run: Run) -> float | None:
        """The validation loss of a run; None if it has not been done."""
        key = dataclasses.asdict(run)
        return next((done["loss"] for done in self._runs if done["run"] == key), None)

    def add(self, runs: list[Run], found: list[float]) -> None:
        self._runs += [
            {"run": dataclasses.asdict(run), "loss": loss}
            for run, loss in zip(runs, found, strict=True)
        ]
        scratch = self._file.with_suffix(".tmp")
        scratch.write_text(json.dumps(self._runs, indent=1) + "\n")
        scratch.replace(self._file)


def table(planned: dict[tuple[str, float], list[Run]], results: Results) -> str:
    """Validation losses in Markdown, best first.

    planned: runs by arm and learning rate, one for each seed. The comparison is with DDP's best
    learning rate, seed by seed: of one seed all have the initial weights and the data in common,
    and so most of their luck.
    """
    done = {
        key: found
        for key, runs in planned.items()
        if (found := {run.seed: x for run in runs if (x := results.loss(run)) is not None})
    }
    mean = {key: statistics.mean(found.values()) for key, found in done.items()}
    best_ddp = min((key for key in done if key[0] == "ddp"), key=mean.__getitem__, default=None)
    of_ddp = done[best_ddp] if best_ddp else {}
    lines = [
        "| arm | learning rate | validation loss | spread | against ddp | of each seed | seeds |",
        "|---|---|---|---|---|---|---|",
    ]
    for arm, rate in sorted(done, key=mean.__getitem__):
        found = done[arm, rate]
        more = [loss / of_ddp[seed] - 1 for seed, loss in found.items() if seed in of_ddp]
        spread = f"{statistics.stdev(found.values()):.4f}" if len(found) > 1 else "-"
        lines.append(
            f"| {arm} | {rate:g} | {mean[arm, rate]:.4f} | {spread}"
            f" | {f'{statistics.mean(more):+.2%}' if more else '-'}"
            f" | {' '.join(f'{part:+.2%}' for part in more) or '-'}"
            f" | {' '.join(map(str, found))} |"
        )
    return "\n".join(lines)


def plan(options: argparse.Namespace) -> dict[tuple[str, float], list[Run]]:
    """All runs that a call asks for, by arm and learning rate."""
    sizes = Sizes(
        options.layers, options.heads, options.width, options.vocab_size, options.sequence_length
    )
    lengths = (options.every, options.rounds, options.peers, options.batch_size)
    return {
        (name, rate): [
            Run(
                arm_of(name, options.peers, options.every),
                rate,
                seed,
                *lengths,
                sizes,
                options.text.name,
            )
            for seed in options.seeds
        ]
        for name in options.arms
        for rate in options.learning_rates
    }


def arm_of(name: str, peers: int, every: int) -> Arm:
    """One of ARMS, or what KEY=VALUE,... makes of plain averaging."""
    if name in ARMS:
        arm = ARMS[name]
        asked = arm.outer_lr, arm.outer_momentum
        lr, momentum = settings_of_rounds(*asked, peers, every, arm.inner)
        return replace(arm, outer_lr=lr, outer_momentum=momentum)
    pairs = dict(pair.split("=") for pair in name.split(","))
    return Arm(**{key: type(getattr(Arm, key))(value) for key, value in pairs.items()})


def options_of(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("diloco_sweep.json"))
    parser.add_argument("--every", type=int, default=20, help="updates in a round")
    parser.add_argument("--rounds", type=int, default=100)
    parser.add_argument("--peers", type=int, default=2)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--learning-rates", type=float, nargs="+", default=[6e-3])
    parser.add_argument("--arms", nargs="+", default=list(ARMS), help="names, or KEY=VALUE,...")
    parser.add_argument("--batch-size", type=int, default=8, help="blocks in an update")
    parser.add_argument("--sequence-length", type=int, default=32)
    parser.add_argument("--vocab-size", type=int, default=512)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--heads", type=int, default=4)
    parser.add_argument("--width", type=int, default=64)
    parser.add_argument("--at-a-time", type=int, default=12, help="runs in one batch")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only-table", action="store_true", help="train nothing")
    return parser.parse_args(words)


def train_all(runs: list[Run], results: Results, options: argparse.Namespace) -> None:
    """Take the runs that are not done yet, seed by seed, so that a part says something."""
    waiting = [run for run in dict.fromkeys(runs) if results.loss(run) is None]
    started, count = time.monotonic(), len(waiting)
    with tempfile.TemporaryDirectory() as folder:
        prepare(
            PrepareConfig(
                [str(options.text)],
                f"{folder}/data",
                vocab_size=options.vocab_size,
                sequence_length=options.sequence_length,
            )
        )
        data = open_prepared(f"{folder}/data")
        held_out = data.blocks(VALIDATION)
        assert held_out
        while waiting:
            seed = waiting[0].seed
            group = [run for run in waiting if run.seed == seed][: options.at_a_time]
            waiting = [run for run in waiting if run not in group]
            weights = train(group, data.train_blocks())
            results.add(group, evaluate(weights, held_out, group[0].sizes))
            took = f"{time.monotonic() - started:6.0f} s  {count - len(waiting)}/{count} runs"
            print(took, file=sys.stderr, flush=True)


def main() -> None:
    """Train what is not done yet, and print the table."""
    options = options_of(sys.argv[1:])
    torch.set_num_threads(options.threads)
    results, planned = Results(options.results), plan(options)
    if not options.only_table:
        by_seed = [runs[n] for n in range(len(options.seeds)) for runs in planned.values()]
        train_all(by_seed, results, options)
    print(table(planned, results))


if __name__ == "__main__":
    main()
