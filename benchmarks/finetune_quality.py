"""What LoRA here comes to beside peft with Hugging Face's Trainer: the same rows, rate and order.

    python benchmarks/finetune_quality.py --text tinyshakespeare.txt

A small Qwen3 is trained on one text. Then it is tuned on another (the sample text) for 100 updates,
with three seeds: by train.py with one process, by train.py with two, and by peft with Trainer
(hf_tune.py), which gets the same blocks in the same order. hf_tune.py also judges: the mean loss of
each over the held-out blocks. Two processes are to be equal to one within 1e-4, and peft's to ours
within what another seed changes.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.tuning_rates import LENGTH, base_of, prepared
from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.data.order import blocks_at
from p2p_llm_forge.data.splits import VALIDATION
from p2p_llm_forge.model.muon import BETAS
from tests import ROOT
from tests.ports import free_port

RANK, ALPHA, BLOCKS, RATE = 16, 32, 8, 3e-3
TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
ARMS = ("train.py", "train.py, 2 processes", "peft and Trainer")


def main() -> None:
    """Tune by every arm and seed that is not there yet, judge all, and print the table."""
    options = parse()
    folder = options.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    data = prepared(options.text, folder / "data")
    base = base_of(options.depth, data, folder)
    other = prepared(options.tuning_text, folder / "other", str(data.tokenizer_dir))
    found: dict[str, list[float]] = {arm: [] for arm in ARMS}
    for seed in options.seeds:
        settings = settings_of(other, seed, options.updates)
        file = folder / f"settings-{seed}.json"
        file.write_text(json.dumps(settings))
        adapters = [folder / f"{number}-{seed}" for number in range(len(ARMS))]
        for processes, output in zip((1, 2), adapters, strict=False):
            tune(processes, base, other, settings, output)
        if not adapters[2].exists():
            run("benchmarks/hf_tune.py", "tune", base, file, adapters[2])
        before, *losses = json.loads(run("benchmarks/hf_tune.py", "judge", base, file, *adapters))
        for arm, loss in zip(ARMS, losses, strict=True):
            found[arm].append(loss)
        print(
            f"seed {seed}, base {before:.4f}: {dict(zip(ARMS, losses, strict=True))}",
            file=sys.stderr,
            flush=True,
        )
    print(f"{table(found)}; the base's loss: {before:.5f}")


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--text", type=Path, required=True, help="what the base learns from")
    parser.add_argument("--tuning-text", type=Path, default=ROOT / "data" / "sample_corpus.txt")
    parser.add_argument("--work-dir", type=Path, default=ROOT / "artifacts" / "finetune_quality")
    parser.add_argument("--depth", type=int, default=4, help="of the base")
    parser.add_argument("--updates", type=int, default=100)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    return parser.parse_args()


def settings_of(data: PreparedDataset, seed: int, updates: int) -> dict[str, Any]:
    """All that decides what is learnt, and the rows."""
    blocks, held_out = data.train_blocks(), data.blocks(VALIDATION)
    assert held_out
    order = blocks_at(0, updates * BLOCKS, len(blocks), seed)
    return {
        **{"seed": seed, "rank": RANK, "alpha": ALPHA, "targets": TARGETS, "rate": RATE},
        **{"batch_size": BLOCKS, "updates": updates, "warmup_steps": updates // 20},
        **{"schedule": "linear", "betas": BETAS, "weight_decay": 0.0, "max_grad_norm": 1.0},
        **{"rows": rows(blocks, order), "held_out": rows(held_out, [*range(len(held_out))])},
    }


def rows(blocks: Blocks, numbers: list[int]) -> list[list[int]]:
    """Each block with the token before it."""
    inputs, targets = blocks.inputs_and_targets(numbers)
    assert inputs.shape[1] == LENGTH
    pairs = zip(inputs.tolist(), targets.tolist(), strict=True)
    return [[read[0], *learnt] for read, learnt in pairs]


def tune(
    processes: int, base: Path, data: PreparedDataset, settings: dict[str, Any], output: Path
) -> None:
    """By train.py, one process or two on this machine."""
    words = [
        *("--model-name", base, "--dataset-path", data.path, "--output-dir", output),
        *("--lora-rank", RANK, "--lora-alpha", ALPHA, "--lora-targets", *TARGETS),
        *("--learning-rate", RATE, "--lr-scheduler", "linear", "--optimizer", "adamw"),
        *("--warmup-steps", settings["warmup_steps"], "--max-steps", settings["updates"]),
        *("--batch-size", BLOCKS, "--weight-decay", 0, "--max-grad-norm", 1),
        *("--seed", settings["seed"], "--mixed-precision", "no", "--base-dtype", "float32"),
        *("--resume", "auto", "--report-to", "none", "--no-pictures", "--cpu", "--compile", "off"),
        *("--cpu-threads", 1),
    ]
    meet = ["--master-addr", "127.0.0.1", "--master-port", free_port()]
    ranks = [
        [*words, "--rank", rank, "--world-size", processes, *meet] if processes > 1 else words
        for rank in range(processes)
    ]
    started = [
        subprocess.Popen([sys.executable, "train.py", *map(str, r)], cwd=ROOT) for r in ranks
    ]
    if any([one.wait() for one in started]):
        sys.exit("error: a run failed")


def run(*words: object) -> str:
    """What a program of this Python prints."""
    argv = [sys.executable, *map(str, words)]
    return subprocess.run(argv, cwd=ROOT, check=True, stdout=subprocess.PIPE, text=True).stdout


def table(found: dict[str, list[float]]) -> str:
    """Markdown: the losses by seed, and how far each arm is from the first."""
    first = found[ARMS[0]]
    lines = [
        "| arm | nats per token, by seed | mean | from the first, by seed |",
        "|---|---|---|---|",
    ]
    for arm, losses in found.items():
        apart = ", ".join(f"{one - of:+.5f}" for one, of in zip(losses, first, strict=True))
        each = ", ".join(f"{one:.5f}" for one in losses)
        lines.append(f"| {arm} | {each} | {statistics.mean(losses):.5f} | {apart} |")
    spread = statistics.stdev(first) if len(first) > 1 else 0.0
    return "\n".join([*lines, "", f"Standard deviation between seeds of the first: {spread:.5f}"])


if __name__ == "__main__":
    main()
