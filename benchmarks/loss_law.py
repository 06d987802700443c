"""Fit the law by which --minutes expects a loss (p2p_llm_forge/training/law.py) to small runs.

    python benchmarks/loss_law.py --text A.txt B.txt --results points.jsonl

trains the shapes of `--depth` for fixed numbers of updates on the first 90 % of each text, by the
plain loop of shapes.py, evaluates on the last 10 %, fits the law and prints its coefficients and a
table of what it misses every run by. A finished run is a line of --results and is never repeated;
--fit-only takes those that are there.
"""

from __future__ import annotations

import argparse
import json
import math
import sys
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from p2p_llm_forge.model.shape import shape_of  # noqa: E402
from p2p_llm_forge.training import law  # noqa: E402

# Depth, tokens read, tokens of the text (0: all of it).
POINTS = (
    *((1, 40_960, 0), (2, 40_960, 0), (1, 122_880, 0), (2, 122_880, 0), (3, 122_880, 0)),
    *((4, 122_880, 0), (1, 368_640, 0), (2, 368_640, 0), (3, 368_640, 0), (4, 368_640, 0)),
    *((1, 983_040, 0), (2, 737_280, 0)),
    *((1, 30_720, 30_720), (1, 122_880, 30_720), (1, 102_400, 102_400), (1, 409_600, 102_400)),
    *((2, 245_760, 61_440), (1, 245_760, 15_360), (1, 1_228_800, 0)),
)
STRETCH = 512  # tokens
RATE, RATE_WIDTH = 0.007, 256  # of Muon, and the width that it is for
NAMES = ("E", "A", "SIZE_POWER", "B", "BYTES_POWER", "HARM", "HARM_POWER", "KIND")


def collect(text_file: Path, results: Path, vocab: int, work_dir: Path) -> None:
    """Train what is not there yet."""
    import torch

    from benchmarks.shapes import Arm, Training, bits_per_byte, encoded

    text = text_file.read_bytes()
    done = {(one["text"], one["depth"], one["tokens"], one["asked"]) for one in points(results)}
    for depth, tokens, unique in POINTS:
        if (text_file.name, depth, tokens, unique) in done:
            continue
        shape = shape_of(depth)
        width = shape["hidden_size"]
        arm = Arm(
            layers=depth,
            width=width,
            head=shape["head_dim"],
            lr=RATE * (RATE_WIDTH / width) ** 0.5,
            tokens=tokens,
            vocab=vocab,
            batch=2048 if tokens > 100_000 else 1024,
        )
        train, validation, size_bytes = encoded(text, vocab, work_dir)
        bytes_per_token = 9 * size_bytes / len(train)
        if unique:  # stretches from all over the text
            stretches = train[: len(train) // STRETCH * STRETCH].view(-1, STRETCH)
            chosen = torch.linspace(0, len(stretches) - 1, unique // STRETCH).long()
            train = stretches[chosen].flatten()
        training = Training(arm, 0, train)
        for _ in range(arm.updates):
            training.advance()
        point = {
            **{"text": text_file.name, "depth": depth, "width": width, "vocab": vocab},
            **{"tokens": tokens, "asked": unique},
            "unique_bytes": len(train) * bytes_per_token,
            "bytes": arm.updates * arm.batch * bytes_per_token,
            "compressed": law.compressed_bits(text[: len(text) * 9 // 10]),
            "bits_per_byte": bits_per_byte(arm, training.finish(), validation, size_bytes),
        }
        with results.open("a") as file:
            file.write(json.dumps(point) + "\n")
        print(json.dumps(point), flush=True)


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
        # Small runs do not show what is left when size and text are large. Without a pull towards
        # a usual remainder and Chinchilla's exponents they say that depth 1 is enough for ever.
        usual = np.log([0.9, 0.34, 0.28, 1.2])
        pull = 0.01 * float(np.sum((logs[[0, 2, 4, 6]] - usual) ** 2))
        return float(np.mean(np.log(expected(np.exp(logs), found) / seen) ** 2)) + pull

    draw = np.random.default_rng(0)
    start = np.log([0.3, 8.0, 0.34, 12.0, 0.28, 0.0145, 1.2, 0.2])
    runs = (minimised(miss, start + draw.normal(0, 0.5, 8)) for _ in range(tries))
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
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, nargs="+", required=True)
    parser.add_argument("--vocab", type=int, default=1024)
    parser.add_argument("--results", type=Path, default=Path("loss_law.jsonl"))
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/shapes"), help="of tokens")
    parser.add_argument("--fit-only", action="store_true")
    options = parser.parse_args()
    torch.set_num_threads(1)
    for text in [] if options.fit_only else options.text:
        collect(text, options.results, options.vocab, options.work_dir)
    found = points(options.results)
    values = fitted(found)
    print(", ".join(NAMES), "=", ", ".join(f"{value:.4g}" for value in values))
    misses = expected(values, found) / [one["bits_per_byte"] for one in found] - 1
    print(f"{len(found)} runs, root mean square miss {np.sqrt(np.mean(misses**2)):.2%}\n")
    print(table(found, values))


if __name__ == "__main__":
    main()
