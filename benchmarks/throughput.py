"""How fast train.py is, and how much memory it takes, against Hugging Face's own loop.

    python -m benchmarks.throughput --work-dir /tmp/throughput

Both train the same model on the same blocks, in micro-batches of one size, with as many threads,
each in a process of its own: train.py as its users start it, and benchmarks/hf_loop.py, the loop of
run_clm_no_trainer.py. They run in turns; a ratio is of two runs that follow each other. The first
updates of a run are not counted. Memory is the peak of the whole process (VmHWM).

--baseline-command measures any other program in the place of Hugging Face's loop: its last line
must be JSON with `segments_s`, `updates` and `tokens_per_update`, as that of hf_loop.py.
--against-freed measures train.py itself there, with glibc as it is: freed memory goes back to the
system. --flags are for train.py alone.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import shutil
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project's own modules
MODEL = "n_layer=6,n_head=6,n_embd=384,resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0"
# Name, vocabulary, precision of train.py; Hugging Face's script computes in float32 by default.
CASES = {
    "float32": (8192, "no"),
    "as by default": (8192, "auto"),
    "large vocabulary, float32": (32768, "no"),
    "large vocabulary, as by default": (32768, "auto"),
}
WITHOUT_KEEPING = """
import train
from p2p_llm_forge import memory

memory.keep_freed_memory = lambda: None
train.cli()
"""


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--model-type", default="gpt2")
    parser.add_argument("--config-overrides", default=MODEL)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--warm-up", type=int, default=2, help="updates that are not counted")
    parser.add_argument("--updates", type=int, default=2, help="updates of a segment")
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=[*CASES], choices=[*CASES])
    parser.add_argument("--flags", default="", help="more flags for train.py")
    other = parser.add_mutually_exclusive_group()
    other.add_argument("--baseline-command")
    other.add_argument("--against-freed", action="store_true")
    return parser.parse_args()


@dataclass(frozen=True)
class Measured:
    """A run of one of the two."""

    tokens_per_s: float
    peak_bytes: int


def forge(
    asked: argparse.Namespace, data: Path, precision: str, is_freed: bool = False
) -> Measured:
    """A run of train.py. is_freed: it leaves glibc as it is."""
    folder = asked.work_dir / "run"
    shutil.rmtree(folder, ignore_errors=True)
    settings = {
        **{"dataset_path": data, "output_dir": folder, "report_to": "none", "save_every": 0},
        **{"model_type": asked.model_type, "config_overrides": asked.config_overrides},
        **{"batch_size": asked.batch_size, "micro_batch_size": asked.micro_batch_size},
        **{"mixed_precision": precision, "cpu_threads": asked.threads, "optimizer": "adamw"},
        **{"max_steps": updates_of(asked), "log_every": 1, "learning_rate": 1e-3},
    }
    words = [f"--{name}={value}" for name, value in settings.items()] + shlex.split(asked.flags)
    script = ["-c", WITHOUT_KEEPING] if is_freed else [str(ROOT / "train.py")]
    _, peak = run([sys.executable, *script, *words])
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tokens = asked.batch_size * asked.sequence_length
    ends = [
        line["step"] * tokens / line["tokens_per_second"]
        for line in lines
        if "tokens_per_second" in line
    ][asked.warm_up - 1 :: asked.updates]
    segments = [end - start for start, end in zip(ends, ends[1:], strict=False)]
    assert len(segments) == asked.segments
    return Measured(asked.updates * tokens / statistics.median(segments), peak)


def baseline(asked: argparse.Namespace, data: Path, precision: str) -> Measured:
    """A run of Hugging Face's loop, or of another program."""
    if asked.against_freed:
        return forge(asked, data, precision, is_freed=True)
    settings = {
        **{"data": data, "model-type": asked.model_type, "threads": asked.threads},
        **{"config-overrides": asked.config_overrides, "micro-batch-size": asked.micro_batch_size},
        "gradient-accumulation-steps": asked.batch_size // asked.micro_batch_size,
        **{"warm-up": asked.warm_up, "updates": asked.updates, "segments": asked.segments},
    }
    words = [f"--{name}={value}" for name, value in settings.items()]
    command = [sys.executable, "-m", "benchmarks.hf_loop", "--cpu", *words]
    if asked.baseline_command:
        command = shlex.split(asked.baseline_command)
    said, peak = run(command)
    found = json.loads(said.splitlines()[-1])
    tokens = found["updates"] * found["tokens_per_update"]
    return Measured(tokens / statistics.median(found["segments_s"]), peak)


def updates_of(asked: argparse.Namespace) -> int:
    return asked.warm_up + asked.segments * asked.updates


def run(command: list[str]) -> tuple[str, int]:
    """What a program prints, and the most memory that it held, in bytes."""
    with subprocess.Popen(
        command, cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ) as process:
        peak = 0
        while process.poll() is None:
            peak = max(peak, peak_of(process.pid))
            time.sleep(0.05)
        assert process.stdout is not None
        said = process.stdout.read()
    if process.returncode:
        sys.exit(f"{shlex.join(command)} failed:\n{said[-4000:]}")
    return said, peak


def peak_of(pid: int) -> int:
    """VmHWM of a process; 0 once it has ended."""
    try:
        lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    except OSError:
        return 0
    found = [int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM")]
    return found[0] if found else 0


def row(case: str, pairs: list[tuple[Measured, Measured]]) -> str:
    """A line of the table; pairs: train.py's run and the one after it."""

    def spread(values: list[float]) -> str:
        return f"{statistics.median(values):.2f} ({min(values):.2f} to {max(values):.2f})"

    ours, theirs = (statistics.median(one.tokens_per_s for one in runs) for runs in zip(*pairs))  # noqa: B905
    faster = spread([one.tokens_per_s / other.tokens_per_s for one, other in pairs])
    memory = spread([one.peak_bytes / other.peak_bytes for one, other in pairs])
    return f"| {case} | {ours:,.0f} | {theirs:,.0f} | {faster} | {memory} |"


def main() -> None:
    asked = parse()
    from benchmarks.generated_blocks import generate

    asked.work_dir.mkdir(parents=True, exist_ok=True)
    os.environ["HF_HUB_OFFLINE"] = "1"
    facts: dict[str, Any] = {"cores": os.cpu_count(), "threads": asked.threads}
    print(f"{platform.machine()}, {facts}, {asked.model_type} {asked.config_overrides}\n")
    print("| | train.py, tokens/s | the other | x its speed | x its memory |")
    print("|---|---|---|---|---|", flush=True)
    for case in asked.cases:
        vocab_size, precision = CASES[case]
        data = asked.work_dir / f"blocks-{vocab_size}"
        if not data.exists():
            generate(data, vocab_size, asked.sequence_length, blocks=512)
        pairs = [
            (forge(asked, data, precision), baseline(asked, data, precision))
            for _ in range(asked.repeats)
        ]
        print(row(case, pairs), flush=True)


if __name__ == "__main__":
    main()
