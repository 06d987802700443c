"""What changes of Muon are worth: small models by a plain loop, arms paired seed by seed.

    python benchmarks/optimizers.py --text tinyshakespeare.txt

trains a Qwen3 of 2 layers of 64 (output projections zero at first) for the same updates by every
arm and prints bits per byte of held-out documents, and each arm's difference from the first,
seed by seed, with its t: beyond 4.3 it is more than luck (two sides, 5 %, three seeds). Every run
is kept in a file of results and never repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import statistics
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch
from torch import Tensor

from benchmarks.noise import against
from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.data.dataset import PreparedDataset, open_prepared
from p2p_llm_forge.data.order import blocks_at
from p2p_llm_forge.data.splits import VALIDATION
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.model.muon import Matrix, Muon
from p2p_llm_forge.model.optimizer import build_optimizer, learning_rate_factor
from p2p_llm_forge.training.learner import text_spec_of
from prepare_data import prepare

SIZES = (
    "num_hidden_layers=2,hidden_size=64,intermediate_size=192,num_attention_heads=2,"
    "num_key_value_heads=2,head_dim=32,tie_word_embeddings=false"
)
BLOCKS, LENGTH, VOCABULARY = 16, 64, 512  # of an update, of a block in tokens, of the tokenizer
CLIP = 1.0
# Decays of averages of the weights that runs are evaluated with, too; 0: the weights themselves.
AVERAGES = (0.0, 0.95, 0.98)


@dataclass(frozen=True)
class Arm:
    """What is tried."""

    optimizer: str = "muon"
    rate: float = 0.01
    others: float = 1.0  # the rate of embeddings, head and vectors, in rates of the matrices
    variant: str = ""  # cautious, normuon
    decay: float = 0.1


ARMS = {
    "muon": Arm(),
    "rate 0.005": Arm(rate=0.005),
    "rate 0.02": Arm(rate=0.02),
    "rest at 2x": Arm(others=2.0),
    "rest at 4x, 0.005": Arm(rate=0.005, others=4.0),
    "rest at 4x, 0.01": Arm(others=4.0),
    "cautious decay": Arm(variant="cautious"),
    "normuon": Arm(variant="normuon"),
    "adamw 0.005": Arm("adamw", 0.005),
    "adamw 0.01": Arm("adamw", 0.01),
}


class Cautious(Muon):
    """Decays a weight only where the step, too, makes it smaller (arXiv 2510.12402)."""

    def _step_matrices(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        before = [parameter.clone() for parameter in parameters]
        super()._step_matrices(parameters, lr, 0.0)
        for parameter, old in zip(parameters, before, strict=True):
            shrinks = (parameter - old) * old < 0
            parameter.sub_(old * shrinks, alpha=lr * weight_decay)


class NorMuon(Muon):
    """Divides each row of an update by its usual size (arXiv 2510.05491)."""

    def _updates(self, matrices: list[Matrix]) -> Any:
        for matrix, update in super()._updates(matrices):
            parameter = matrix.weight
            state = self.state[parameter._base if parameter._base is not None else parameter]
            # Rows of the weight as (outputs, inputs): here the shorter side is always first.
            sides = 1 if matrix.weight.is_contiguous() else 0
            squares = update.square().mean(sides, keepdim=True)
            usual = state.setdefault("row_squares", torch.zeros_like(squares))
            usual.lerp_(squares, 0.05)
            scaled = update / (usual.sqrt() + 1e-8)
            yield matrix, scaled * (update.norm() / scaled.norm().clamp(min=1e-12))


VARIANTS = {"": Muon, "cautious": Cautious, "normuon": NorMuon}


def train(arm: Arm, seed: int, updates: int, data: PreparedDataset) -> list[float]:
    """Bits per byte of the validation text after the updates, by each of AVERAGES."""
    config = TrainConfig(
        model_type="qwen3",
        config_overrides=SIZES,
        optimizer=arm.optimizer,
        learning_rate=arm.rate,
        weight_decay=arm.decay,
        lr_scheduler="linear",
        seed=seed,
    )
    lm = build_model(config, text_spec_of(data))
    for name, parameter in lm.named_parameters():
        if "o_proj" in name or "down_proj" in name:
            torch.nn.init.zeros_(parameter)
    model, optimizer = NextTokenLoss(lm, None).train(), build_optimizer(config, lm)
    optimizer.__class__ = VARIANTS[arm.variant] if arm.optimizer == "muon" else type(optimizer)
    averages = {decay: [p.detach().clone() for p in lm.parameters()] for decay in AVERAGES}
    blocks, factor = data.train_blocks(), learning_rate_factor(config, updates)
    for step in range(updates):
        for group in optimizer.param_groups:
            is_matrix = group.get("is_orthogonalised", True)
            group["lr"] = arm.rate * factor(step) * (1.0 if is_matrix else arm.others)
        numbers = blocks_at(step * BLOCKS, BLOCKS, len(blocks), seed)
        inputs, targets = (torch.from_numpy(a) for a in blocks.inputs_and_targets(numbers))
        nats, _ = model(inputs, targets)
        (nats / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), CLIP)
        optimizer.step()
        optimizer.zero_grad()
        for decay, means in averages.items():
            kept = min(decay, (step + 1) / (step + 10))  # the first weights are soon forgotten
            for mean, parameter in zip(means, lm.parameters(), strict=True):
                mean.lerp_(parameter.detach(), 1 - kept)
    found = []
    for means in averages.values():
        for mean, parameter in zip(means, lm.parameters(), strict=True):
            parameter.data.copy_(mean)
        found.append(bits_per_byte(model, data))
    return found


@torch.no_grad()
def bits_per_byte(model: NextTokenLoss, data: PreparedDataset) -> float:
    held_out, nats = data.blocks(VALIDATION), 0.0
    assert held_out
    for first in range(0, len(held_out), 64):
        numbers = range(first, min(first + 64, len(held_out)))
        inputs, targets = (torch.from_numpy(a) for a in held_out.inputs_and_targets(numbers))
        nats += float(model(inputs, targets)[0])
    return nats / math.log(2) / data.manifest.splits[VALIDATION].bytes


def table(found: dict[str, dict[int, float]]) -> str:
    """Markdown: means, and differences from the first arm seed by seed."""
    first = next(iter(found.values()))
    lines = ["| arm | bits per byte | against the first | seed by seed |", "|---|---|---|---|"]
    for name, by_seed in found.items():
        seeds = [seed for seed in by_seed if seed in first]
        pair = [by_seed[seed] for seed in seeds], [first[seed] for seed in seeds]
        more = ", ".join(f"{one / other - 1:+.2%}" for one, other in zip(*pair, strict=True))
        mean, verdict = statistics.mean(by_seed.values()), against(*pair) if seeds else ""
        lines.append(f"| {name} | {mean:.4f} | {verdict} | {more} |")
    return "\n".join(lines)


def main() -> None:
    """Train what is not done yet, seed by seed, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--results", type=Path, default=Path("optimizers.json"))
    parser.add_argument("--updates", type=int, default=300)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=list(ARMS))
    options = parser.parse_args()
    torch.set_num_threads(1)
    done = json.loads(options.results.read_text()) if options.results.exists() else {}
    with tempfile.TemporaryDirectory() as folder:
        sizes = {"vocab_size": VOCABULARY, "sequence_length": LENGTH}
        prepare(PrepareConfig([str(options.text)], f"{folder}/data", **sizes))
        data = open_prepared(Path(folder) / "data")
        for seed in options.seeds:
            for name in options.arms:
                key = f"{ARMS[name]} {options.updates} {seed}"
                if key not in done:
                    done[key] = train(ARMS[name], seed, options.updates, data)
                    options.results.write_text(json.dumps(done, indent=1) + "\n")
                    print(f"{name}, seed {seed}: {done[key]}", file=sys.stderr, flush=True)
    found = {
        f"{name}, averaged {decay:g}" if decay else name: {
            seed: done[f"{ARMS[name]} {options.updates} {seed}"][number] for seed in options.seeds
        }
        for name in options.arms
        for number, decay in enumerate(AVERAGES)
    }
    print(table(found))


if __name__ == "__main__":
    main()
