"""Fit the law by which --minutes expects a loss (p2p_llm_forge/training/law.py) to small runs.

    python benchmarks/loss_law.py --text A.txt B.txt --results points.jsonl

prepares each text, or some kilobytes from its middle, as `--minutes` would, lets train.py train
depths for fixed numbers of updates with the settings that `--minutes` would choose, fits the law to
the bits per byte of the documents that were held out, and prints its coefficients and a table of
what it misses every run by. A finished run is a line of --results and is never repeated;
--fit-only takes those that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from p2p_llm_forge.model.shape import learning_rate_of, shape_of  # noqa: E402
from p2p_llm_forge.training import law, planner  # noqa: E402

# Kilobytes of the text (0: all of it), depth, tokens read.
SMALL_TEXT = (  # of a megabyte
    *((0, 1, 100_000), (0, 1, 400_000), (0, 2, 400_000), (0, 3, 400_000)),
    *((0, 2, 1_600_000), (0, 3, 1_600_000), (0, 2, 3_200_000)),
    *((200, 1, 400_000), (200, 2, 800_000), (200, 3, 1_600_000)),
    *((60, 1, 200_000), (60, 2, 800_000)),
)
LARGE_TEXT = (
    *((0, 1, 250_000), (0, 2, 250_000), (0, 1, 1_000_000), (0, 2, 1_000_000)),
    *((0, 3, 1_000_000), (0, 4, 1_000_000), (0, 2, 3_000_000), (0, 3, 3_000_000)),
)
LARGE = 4_000_000  # bytes
HELD_OUT, LEAST_HELD_OUT = 0.05, 20_000  # share of a text, bytes
EVAL_BLOCKS = 400
NAMES = ("E", "A", "SIZE_POWER", "B", "BYTES_POWER", "HARM", "HARM_POWER", "KIND")


def collect(text_file: Path, results: Path, work_dir: Path) -> None:
    """Train what is not there yet."""
    text = text_file.read_bytes()
    done = {(one["text"], one["kilobytes"], one["depth"], one["tokens"]) for one in points(results)}
    for kilobytes, depth, tokens in LARGE_TEXT if len(text) > LARGE else SMALL_TEXT:
        if (text_file.name, kilobytes, depth, tokens) in done:
            continue
        middle, half = len(text) // 2, 500 * kilobytes
        part = text[middle - half : middle + half] if kilobytes else text
        prepared = prepare(part.decode(errors="ignore"), work_dir / f"{text_file.stem}-{kilobytes}")
        point = {
            **{"text": text_file.name, "kilobytes": kilobytes, "depth": depth, "tokens": tokens},
            **trained(prepared, part, depth, tokens, work_dir / "run"),
        }
        with results.open("a") as file:
            file.write(json.dumps(point) + "\n")
        print(json.dumps(point), flush=True)


def start(script: str, **flags: Any) -> None:
    """A script of the project with these flags. Raises SystemExit with what it printed last."""
    words = [f"--{name.replace('_', '-')}={value}" for name, value in flags.items()]
    command = [sys.executable, str(ROOT / script), *words]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, env=environ, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit((done.stdout + done.stderr)[-3000:])


def prepare(text: str, folder: Path) -> Path:
    """The text as a run with --minutes prepares it, but that enough of it is held out."""
    if not (folder / "manifest.json").exists():
        folder.parent.mkdir(parents=True, exist_ok=True)
        source = folder.with_suffix(".txt")
        source.write_text(text)
        size = len(text.encode())
        vocabulary, length = planner.text_settings(size)
        held_out = max(HELD_OUT, LEAST_HELD_OUT / size)
        asked = {"vocab_size": vocabulary, "sequence_length": length}
        asked |= {"dataset_path": source, "output_dir": folder, "validation_fraction": held_out}
        start("prepare_data.py", **asked)
    return folder


def trained(prepared: Path, text: bytes, depth: int, tokens: int, folder: Path) -> dict[str, Any]:
    """One run, and what it came to."""
    manifest = json.loads((prepared / "manifest.json").read_text())
    length, split = manifest["sequence_length"], manifest["splits"]["train"]
    unique = split["blocks"] * length
    per_token = split["bytes"] / unique
    batch = planner.batch_size_for(planner.update_tokens_for(tokens), length, 1)
    updates = tokens // (batch * length)
    choice = planner.Choice(depth, tokens, tokens / unique, batch * length, None, 0.0)
    decay = planner.weight_decay_for(choice, learning_rate_of("muon", depth))
    asked = {"dataset_path": prepared, "depth": depth, "max_steps": updates, "batch_size": batch}
    asked |= {"weight_decay": decay, "lr_scheduler": "linear", "warmup_steps": updates // 50}
    start(
        "train.py",
        output_dir=folder,
        overwrite="true",
        compile="off",
        save_every=updates,
        eval_blocks=EVAL_BLOCKS,
        **asked,
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    found = [one["bits_per_byte"] for one in map(json.loads, lines) if "bits_per_byte" in one]
    return {
        **{"width": shape_of(depth)["hidden_size"], "vocab": manifest["vocab_size"]},
        **{"unique_bytes": unique * per_token, "bytes": updates * batch * length * per_token},
        **{"compressed": law.compressed_bits(text), "bits_per_byte": found[-1]},
    }


def points(results: Path) -> list[dict[str, Any]]:
    lines = results.read_text().splitlines() if results.exists() else []
    return [json.loads(line) for line in lines]


def expected(values: np.ndarray, found: list[dict[str, Any]]) -> np.ndarray:
    """Bits per byte of every run by the law with these coefficients, in the order of NAMES."""
    before = {name: getattr(law, name) for name in NAMES}
    try:
        for name, value in zip(NAMES, values, strict=True):
            setattr(law, name, float(value))
        return np.array(
            [
                law.bits_per_byte(
                    13 * one["depth"] * one["width"] ** 2 + one["width"] * one["vocab"],
                    one["bytes"],
                    one["unique_bytes"],
                    one["compressed"],
                )
                for one in found
            ]
        )
    finally:
        for name, value in before.items():
            setattr(law, name, value)


def fitted(found: list[dict[str, Any]], tries: int = 40) -> np.ndarray:
    """The coefficients with the smallest squared relative misses: Nelder-Mead on logarithms."""
    seen = np.array([one["bits_per_byte"] for one in found])

    def miss(logs: np.ndarray) -> float:
        if np.any(np.abs(logs) > 12):
            return math.inf
        # Small runs do not show what is left when size and text are large, nor what size is worth:
        # of little text all depths learn as much. They would say that depth 1 is enough for ever.
        # So the worth of size stays what it was, by which a longer run has chosen well, and the
        # others are pulled towards a usual remainder and Chinchilla's exponent.
        usual, weights = np.log([0.9, 15.4, 0.3333, 0.28, 1.2]), [0.01, 1, 1, 0.01, 0.01]
        pull = float(np.sum(weights * (logs[[0, 1, 2, 4, 6]] - usual) ** 2))
        return float(np.mean(np.log(expected(np.exp(logs), found) / seen) ** 2)) + pull

    draw = np.random.default_rng(0)
    first = np.log([0.7, 10.0, 0.34, 20.0, 0.28, 0.001, 1.2, 0.3])
    runs = (minimised(miss, first + draw.normal(0, 0.3, 8)) for _ in range(tries))
    return np.exp(min(runs, key=miss))


def minimised(function: Any, start: np.ndarray, steps: int = 1500) -> np.ndarray:
    """Nelder-Mead, in its usual form."""
    size = len(start)
    simplex = [start, *(start + 0.3 * np.eye(size)[i] for i in range(size))]
    values = [function(one) for one in simplex]
    for _ in range(steps):
        order = np.argsort(values)
        simplex, values = [simplex[i] for i in order], [values[i] for i in order]
        centre = np.mean(simplex[:-1], axis=0)
        worst = simplex[-1]
        mirrored = centre + (centre - worst)
        at_mirrored = function(mirrored)
        if at_mirrored < values[0]:
            further = centre + 2 * (centre - worst)
            at_further = function(further)
            better = at_further < at_mirrored
            simplex[-1], values[-1] = (further, at_further) if better else (mirrored, at_mirrored)
        elif at_mirrored < values[-2]:
            simplex[-1], values[-1] = mirrored, at_mirrored
        else:
            inner = centre + 0.5 * (worst - centre)
            at_inner = function(inner)
            if at_inner < values[-1]:
                simplex[-1], values[-1] = inner, at_inner
            else:
                simplex = [simplex[0], *((simplex[0] + one) / 2 for one in simplex[1:])]
                values = [values[0], *(function(one) for one in simplex[1:])]
    return simplex[int(np.argmin(values))]


def table(found: list[dict[str, Any]], values: np.ndarray) -> str:
    """Every run: what it came to, what the law says, and the difference."""
    rows = ["| text | depth | MB read | times | bits per byte | law | miss |"]
    rows.append("|---|---|---|---|---|---|---|")
    for one, law_says in zip(found, expected(values, found), strict=True):
        seen, times = one["bits_per_byte"], one["bytes"] / one["unique_bytes"]
        rows.append(
            f"| {one['text']} | {one['depth']} | {one['bytes'] / 1e6:.2f} | {times:.1f} |"
            f" {seen:.3f} | {law_says:.3f} | {law_says / seen - 1:+.1%} |"
        )
    return "\n".join(rows)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--results", type=Path, default=Path("loss_law.jsonl"))
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/loss_law"))
    parser.add_argument("--fit-only", action="store_true")
    options = parser.parse_args()
    for text in [] if options.fit_only else options.text:
        collect(text, options.results, options.work_dir)
    found = points(options.results)
    values = fitted(found)
    print(", ".join(NAMES), "=", ", ".join(f"{value:.4g}" for value in values))
    misses = expected(values, found) / [one["bits_per_byte"] for one in found] - 1
    print(f"{len(found)} runs, root mean square miss {np.sqrt(np.mean(misses**2)):.2%}\n")
    print(table(found, values))


if __name__ == "__main__":
    main()
