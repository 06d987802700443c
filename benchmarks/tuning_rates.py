"""Which peak rate, how many epochs and how much warm-up tuning wants: a sweep over small models.

    python benchmarks/tuning_rates.py --text tinyshakespeare.txt

trains a Qwen3 of each depth on one text, then tunes it on another (the sample text) in full and by
LoRA of rank 16 (peft, alpha 32), and prints bits per byte of that text's held-out documents.
Every run is kept in a file of results and never repeated.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import sys
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from benchmarks.optimizers import bits_per_byte
from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.data.dataset import PreparedDataset, open_prepared
from p2p_llm_forge.data.order import blocks_at
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.model.optimizer import build_optimizer, learning_rate_factor
from p2p_llm_forge.model.shape import shape_of
from p2p_llm_forge.training.plan import steps_of_epochs
from prepare_data import prepare
from tests import ROOT
from train import train

LENGTH, VOCABULARY = 128, 1024  # of a block in tokens, of the tokenizer
BASE_UPDATES, BASE_BLOCKS, TUNING_BLOCKS = 120, 32, 8
RANK, ALPHA = 16, 32
RATES = {
    "full": (3e-5, 1e-4, 3e-4, 1e-3, 3e-3),
    "lora": (3e-4, 1e-3, 3e-3, 1e-2, 3e-2),
}


@dataclass(frozen=True)
class Arm:
    """What is tried."""

    depth: int
    method: str
    rate: float
    epochs: float
    warmup: float = 0.05  # of the updates
    schedule: str = "linear"
    seed: int = 0
    targets: str = "all-linear"  # of LoRA; auto: those that peft chooses for the family


def prepared(text: Path, folder: Path, tokenizer: str | None = None) -> PreparedDataset:
    """The text in blocks, prepared once."""
    asked = PrepareConfig(
        [str(text)],
        str(folder),
        tokenizer=tokenizer,
        vocab_size=VOCABULARY,
        sequence_length=LENGTH,
    )
    prepare(asked)
    return open_prepared(folder)


def learn(lm: Any, data: PreparedDataset, config: TrainConfig, updates: int, blocks: int) -> None:
    """So many updates of so many blocks."""
    model, optimizer = NextTokenLoss(lm, None).train(), build_optimizer(config, lm)
    rows, factor = data.train_blocks(), learning_rate_factor(config, updates)
    for step in range(updates):
        for group in optimizer.param_groups:
            group["lr"] = (config.learning_rate or 0) * factor(step)
        numbers = blocks_at(step * blocks, blocks, len(rows), config.seed)
        inputs, targets = (torch.from_numpy(a) for a in rows.inputs_and_targets(numbers))
        nats, _ = model(inputs, targets)
        (nats / targets.numel()).backward()
        torch.nn.utils.clip_grad_norm_(lm.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()


def base_of(depth: int, data: PreparedDataset, folder: Path) -> Path:
    """A model of that depth, trained on the data by train.py; made once, and resumed if killed."""
    path = folder / f"base-{depth}"
    result = train(
        TrainConfig(
            dataset_path=str(data.path),
            output_dir=str(path),
            model_type="qwen3",
            depth=depth,
            max_steps=BASE_UPDATES,
            batch_size=BASE_BLOCKS,
            resume="auto",
            report_to="none",
            cpu=True,
            cpu_threads=1,
        )
    )
    print(f"base of depth {depth}: {result.bits_per_byte:.4f}", file=sys.stderr, flush=True)
    return path


def tuned(arm: Arm, base: Path, data: PreparedDataset) -> dict[str, float]:
    """Bits per byte of the held-out documents before and after tuning."""
    import peft
    from transformers import AutoModelForCausalLM

    torch.manual_seed(arm.seed)
    lm = AutoModelForCausalLM.from_pretrained(base)
    before = bits_per_byte(NextTokenLoss(lm, None).eval(), data)
    if arm.method == "lora":
        targets = None if arm.targets == "auto" else arm.targets
        settings: dict[str, Any] = {"r": RANK, "lora_alpha": ALPHA, "target_modules": targets}
        lora = peft.LoraConfig(task_type="CAUSAL_LM", **settings)
        peft.get_peft_model(lm, lora)  # puts the adapters into lm itself
    updates = steps_of_epochs(arm.epochs, len(data.train_blocks()), TUNING_BLOCKS)
    config = TrainConfig(
        optimizer="adamw",
        learning_rate=arm.rate,
        warmup_steps=math.ceil(arm.warmup * updates),
        lr_scheduler=arm.schedule,
        weight_decay=0.0 if arm.method == "lora" else 0.1,
        seed=arm.seed,
    )
    learn(lm, data, config, updates, TUNING_BLOCKS)
    after = bits_per_byte(NextTokenLoss(lm, None).eval(), data)
    return {"before": before, "after": after, "updates": updates}


def arms_of(options: argparse.Namespace) -> list[Arm]:
    """Every combination that was asked for."""
    return [
        Arm(depth, method, rate, epochs, warmup, schedule, seed, options.targets)
        for seed, depth, method, epochs in product(
            options.seeds, options.depths, options.methods, options.epochs
        )
        for rate in options.rates or RATES[method]
        for warmup, schedule in product(options.warmup, options.schedules)
    ]


def table(found: dict[Arm, dict[str, float]]) -> str:
    """Markdown: a row for each arm."""
    lines = [
        "| width | method | epochs | warm-up | schedule | seed | rate | updates | before | after |",
        "|" + "---|" * 10,
    ]
    for arm, one in found.items():
        width = shape_of(arm.depth)["hidden_size"]
        method = f"lora {arm.targets}" if arm.method == "lora" else arm.method
        cells: list[object] = [width, method, arm.epochs, arm.warmup, arm.schedule, arm.seed]
        cells += [arm.rate, one["updates"], f"{one['before']:.4f}", f"{one['after']:.4f}"]
        lines.append(f"| {' | '.join(map(str, cells))} |")
    return "\n".join(lines)


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="what the base learns from")
    parser.add_argument("--tuning-text", type=Path, default=ROOT / "data" / "sample_corpus.txt")
    parser.add_argument("--tuning-bytes", type=int, default=150_000, help="so much of it")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "artifacts" / "tuning_rates")
    parser.add_argument("--depths", type=int, nargs="+", default=[2, 4])
    parser.add_argument("--methods", nargs="+", choices=RATES, default=list(RATES))
    parser.add_argument("--targets", default="all-linear", choices=("all-linear", "auto"))
    parser.add_argument("--rates", type=float, nargs="+")
    parser.add_argument("--epochs", type=float, nargs="+", default=[1.0, 3.0])
    parser.add_argument("--warmup", type=float, nargs="+", default=[0.05])
    parser.add_argument("--schedules", nargs="+", default=["linear"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    return parser.parse_args()


def main() -> None:
    """Tune what is not done yet and print the table."""
    options = parse()
    torch.set_num_threads(1)
    folder = options.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    results = folder / "results.json"
    done = json.loads(results.read_text()) if results.exists() else {}
    data = prepared(options.text, folder / "data")
    text = folder / f"text-{options.tuning_bytes}.txt"
    documents = options.tuning_text.read_bytes()[: options.tuning_bytes].rpartition(b"\n\n")[0]
    text.write_bytes(documents)
    other = prepared(text, folder / text.stem, str(data.tokenizer_dir))
    found: dict[Arm, dict[str, float]] = {}
    bases: dict[int, Path] = {}
    for arm in arms_of(options):
        key = f"{arm} {options.tuning_bytes}"
        if key not in done:
            bases[arm.depth] = bases.get(arm.depth) or base_of(arm.depth, data, folder)
            done[key] = tuned(arm, bases[arm.depth], other)
            results.write_text(json.dumps(done, indent=1) + "\n")
            print(f"{arm}: {done[key]}", file=sys.stderr, flush=True)
        found[arm] = done[key]
    print(table(found))


if __name__ == "__main__":
    main()
