"""Who has the better model after the same time: --minutes, yesterday's defaults, nanoGPT.

    python benchmarks/loss_per_second.py --nanogpt DIR --text tinyshakespeare.txt
    python benchmarks/loss_per_second.py --nanogpt DIR --mixed-megabytes 20 --times 10
    python benchmarks/loss_per_second.py --seconds 107 --text tinyshakespeare.txt --arm "--depth 3"

Every arm gets the first 90 % of the text; its model is judged by bits per byte over the last 10 %,
every token predicted once, by programs that share nothing with the trainer: transformers alone
loads our model and tokenizer, nanoGPT's own class its checkpoint. A round begins with nanoGPT's CPU
setting for Shakespeare (README: 2,000 iterations of 12 blocks of 64, 4 layers of 128, no dropout),
times --times iterations; the time that its process took is what the other arms are given as
--minutes, from the start of the process to its end, tokenizer training included. Arms take turns,
the seeds are those of the rounds (0, 1, ...), and medians are printed. --seconds gives that time
without nanoGPT, and --arm further flags for another arm of ours.

Of several --rates nanoGPT gets the one that is best with seed 0 after all iterations; these runs go
side by side, a thread each, as their time is not counted.

Runs of three or more line ends count as two in all texts: there documents end, and an end of a
document is judged as the two bytes that it stands for.
"""

from __future__ import annotations

import argparse
import math
import os
import re
import shutil
import statistics
import subprocess
import sys
import time
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.noise import against  # noqa: E402

ITERATIONS = 2000
NANOGPT = (
    *("config/train_shakespeare_char.py", "--device=cpu", "--compile=False", "--eval_iters=20"),
    *("--log_interval=100", "--block_size=64", "--batch_size=12", "--n_layer=4", "--n_head=4"),
    *("--n_embd=128", "--dropout=0.0"),
)
RATES = [5e-4, 1e-3, 2e-3, 4e-3]  # that nanoGPT's shape is tuned over
YESTERDAY = (
    *("--model-type", "gpt2", "--optimizer", "adamw", "--learning-rate", "1e-3"),
    "--config-overrides=n_layer=4,n_head=4,n_embd=256,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0",
    *("--batch-size", "16", "--lr-scheduler", "cosine", "--vocab-size", "8192"),
    *("--sequence-length", "256"),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--nanogpt", type=Path, help="a copy of its repository")
    parser.add_argument("--text", type=Path)
    parser.add_argument("--mixed-megabytes", type=int, help="gather a text from installed Python")
    parser.add_argument("--times", type=float, default=1.0, help="as long as nanoGPT's setting")
    parser.add_argument("--rates", type=float, nargs="+", help="of nanoGPT (1e-3; --times: four)")
    parser.add_argument("--seconds", type=float, help="this long, without nanoGPT")
    parser.add_argument("--arm", action="append", default=[], help="flags of another arm of ours")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/loss_per_second"))
    parser.add_argument("--judge", choices=("ours", "nanogpt"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    work: Path = options.work_dir.resolve()
    if options.judge:
        print(judge_ours(work) if options.judge == "ours" else judge_nanogpt(work))
        return
    if bool(options.nanogpt) == bool(options.seconds):
        parser.error("give --nanogpt DIR or --seconds S")
    if bool(options.text) == bool(options.mixed_megabytes):
        parser.error("give --text FILE or --mixed-megabytes N")
    work.mkdir(parents=True, exist_ok=True)
    text = (
        gathered(options.mixed_megabytes) if options.mixed_megabytes else options.text.read_text()
    )
    text = re.sub(r"\n\n+", "\n\n", text.replace("\r\n", "\n"))
    cut = int(len(text) * 0.9)
    (work / "train.txt").write_text(text[:cut])
    (work / "validation.txt").write_text(text[cut:])
    if options.nanogpt:
        options.nanogpt = options.nanogpt.resolve()
        (options.nanogpt / "data/shakespeare_char/input.txt").write_text(text)
        subprocess.run(
            [sys.executable, "prepare.py"],
            cwd=options.nanogpt / "data/shakespeare_char",
            check=True,
            stdout=subprocess.DEVNULL,
        )
    compare(options, work)


def compare(options: argparse.Namespace, work: Path) -> None:
    """Let the arms take turns, and print what each round and their medians come to."""
    iterations = round(ITERATIONS * options.times)
    rates = options.rates or (RATES if options.times > 1 else [1e-3])
    rate = rates[0] if len(rates) == 1 else tuned_rate(options.nanogpt, iterations, rates)
    arms = {"--minutes": ()} | {f"--minutes {flags}": flags.split() for flags in options.arm}
    arms |= {"yesterday's defaults": YESTERDAY} if options.times > 1 else {}
    found: dict[str, list[tuple[float, float]]] = {}

    def keep(name: str, seed: int, bits: float, seconds: float) -> None:
        found.setdefault(name, []).append((bits, seconds))
        print(f"seed {seed}: {name}: {bits:.3f} bits per byte, {seconds:.0f} s", flush=True)

    for seed in range(options.repeats):
        given_s = options.seconds
        if options.nanogpt:
            out, given_s = run_nanogpt(options.nanogpt, iterations, rate, seed)
            keep(f"nanoGPT, rate {rate:g}", seed, judged("nanogpt", out), given_s)
        for name, flags in arms.items():
            spent_s = run_ours(work, given_s, seed, flags)
            keep(name, seed, judged("ours", work), spent_s)
    print("\n| arm | bits per byte | rounds | seconds | against --minutes |\n|---|---|---|---|---|")
    ours = [bits for bits, _ in found["--minutes"]]
    for name, rounds in found.items():
        losses, seconds = zip(*rounds, strict=True)
        shown = ", ".join(f"{loss:.3f}" for loss in losses)
        middle, verdict = statistics.median, "" if name == "--minutes" else against(losses, ours)
        print(f"| {name} | {middle(losses):.3f} | {shown} | {middle(seconds):.0f} | {verdict} |")


def gathered(megabytes: int) -> str:
    """Text of the installed Python's files, as the benchmark of data preparation gathers it."""
    from benchmarks.data_preparation import source_files

    parts, size = [], 0
    for content in source_files():
        if size >= megabytes * 10**6:
            break
        parts.append(content.decode("utf-8", "replace"))
        size += len(content)
    return "\n\n".join(parts)


# --- the arms -------------------------------------------------------------------------------------


def run_nanogpt(
    folder: Path, iterations: int, rate: float, seed: int, threads: int | None = None
) -> tuple[Path, float]:
    """Train it; returns its checkpoint's folder, and seconds from the process's start to end."""
    out = folder / f"out-{rate:g}"
    out.mkdir(exist_ok=True)
    words = [sys.executable, str(out / "train.py"), *NANOGPT, f"--out_dir={out}"]
    words += [f"--learning_rate={rate}", f"--min_lr={rate / 10}", f"--max_iters={iterations}"]
    words += [f"--lr_decay_iters={iterations}", f"--eval_interval={min(iterations, 250)}"]
    # It has no flag for its seed, which is written in its script.
    script = (folder / "train.py").read_text()
    seeded = re.sub(r"torch\.manual_seed\(\d+ \+", f"torch.manual_seed({1337 + seed} +", script)
    (out / "train.py").write_text(seeded)
    environ = {"PYTHONPATH": str(folder)} | ({"OMP_NUM_THREADS": str(threads)} if threads else {})
    return out, timed(words, folder, out / "last.log", environ)


def tuned_rate(folder: Path, iterations: int, rates: list[float]) -> float:
    """The best of some rates."""

    def bits(rate: float) -> float:
        out, _ = run_nanogpt(folder, iterations, rate, seed=0, threads=1)
        loss = judged("nanogpt", out)
        print(f"nanoGPT tuned, rate {rate:g}: {loss:.3f} bits per byte", flush=True)
        return loss

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        losses = dict(zip(rates, pool.map(bits, rates), strict=True))
    return min(losses, key=lambda rate: losses[rate])


def run_ours(work: Path, seconds: float, seed: int, flags: Sequence[str]) -> float:
    """Train by --minutes; returns seconds from the start of the process to its end."""
    shutil.rmtree(work / "run", ignore_errors=True)  # with the tokenizer and the prepared text
    words = [sys.executable, str(ROOT / "train.py"), "--dataset-path", str(work / "train.txt")]
    words += ["--output-dir", str(work / "run"), "--minutes", str(seconds / 60)]
    return timed([*words, "--seed", str(seed), *flags], work, work / "last.log", {})


def timed(words: list[str], folder: Path, log_path: Path, environ: dict[str, str]) -> float:
    began = time.perf_counter()
    with log_path.open("w") as log:
        environ = {**os.environ, "HF_HUB_OFFLINE": "1", **environ}
        done = subprocess.run(words, cwd=folder, stdout=log, stderr=subprocess.STDOUT, env=environ)
    if done.returncode:
        raise SystemExit(log_path.read_text()[-3000:])
    return time.perf_counter() - began


# --- the judges -----------------------------------------------------------------------------------


def judged(which: str, folder: Path) -> float:
    """Bits per byte, by a process of its own."""
    words = [sys.executable, str(Path(__file__).resolve()), "--judge", which]
    done = subprocess.run([*words, "--work-dir", str(folder)], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(done.stderr[-3000:])
    return float(done.stdout.split()[-1])


def judge_ours(work: Path) -> float:
    """Of the published model, by transformers alone: every token of the text predicted once."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    text = (work / "validation.txt").read_text()
    tokenizer = AutoTokenizer.from_pretrained(work / "run")
    model = AutoModelForCausalLM.from_pretrained(work / "run", dtype=torch.float32).eval()
    length, end = model.config.max_position_embeddings, tokenizer.eos_token_id
    tokens = [end]
    documents = text.split("\n\n")
    assert "\n\n".join(documents) == text
    for number, document in enumerate(documents):
        tokens += tokenizer.encode(document, add_special_tokens=False)
        tokens += [end] if number + 1 < len(documents) else []
    nats = 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            piece = torch.tensor([tokens[start : start + length + 1]])
            logits = model(piece[:, :-1]).logits[0]
            nats += torch.nn.functional.cross_entropy(logits, piece[0, 1:], reduction="sum").item()
    return nats / math.log(2) / len(text.encode())


def judge_nanogpt(out: Path) -> float:
    """Of its last checkpoint, by its own class: every character of its val.bin predicted once."""
    folder = out.parent
    sys.path.insert(0, str(folder))
    import numpy as np
    import torch
    from model import GPT, GPTConfig  # nanoGPT's

    saved = torch.load(out / "ckpt.pt", weights_only=True)
    model = GPT(GPTConfig(**saved["model_args"]))
    model.load_state_dict(saved["model"])
    model.eval()
    data = folder / "data/shakespeare_char"
    train, validation = (np.fromfile(data / f"{name}.bin", np.uint16) for name in ("train", "val"))
    tokens = torch.from_numpy(np.concatenate([train[-1:], validation]).astype(np.int64))
    length, nats = saved["model_args"]["block_size"], 0.0
    with torch.no_grad():
        for start in range(0, len(tokens) - 1, length):
            piece = tokens[start : start + length + 1]
            _, loss = model(piece[None, :-1], piece[None, 1:])
            nats += loss.item() * (len(piece) - 1)
    text = (data / "input.txt").read_text()
    return nats / math.log(2) / len(text[int(len(text) * 0.9) :].encode())


if __name__ == "__main__":
    main()
