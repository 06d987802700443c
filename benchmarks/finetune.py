"""Two peers that tune one base on a slow network, by LoRA and in full: tokens/s and memory.

    python benchmarks/finetune.py [--mbit 50] [--repeats 3]

Two hosts (network namespaces joined by a switch, which need root) send at most so many Mbit/s each.
On each a peer tunes with one thread, by plain DDP, a Qwen3 of about 60 M parameters: 10 layers of
640, vocabulary 8192, blocks of 256 tokens, 16 of them for each peer and update. LoRA has rank 16
and this project's defaults otherwise.

A machine's speed drifts from minute to minute, so one peer alone that tunes in the same way, on a
host of its own, is measured before and after every arm (it is stopped meanwhile), and an arm is a
multiple of the mean of both. Measured is the time of updates after the first two. Every
measurement is written to --results at once; what is there counts as a repeat.

Memory is the highest that the system has given to a run of a few updates by itself (ru_maxrss).
"""

from __future__ import annotations

import argparse
import os
import shutil
import signal
import statistics
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.slow_network import (
    Alone,
    line_of,
    machine,
    prepare_data,
    read,
    read_lines,
    speed_between,
    write,
)
from tests.multihost.hosts import PYTHON, ROOT, Host, hosts, why_not

DEPTH, VOCABULARY = 10, 8192
SKIPPED, MEASURED, ALONE_UPDATES = 2, 4, 2  # updates
LONGEST_RUN_S = 1500.0
METHODS = {"lora": ["--lora-rank", 16], "full": []}


def main() -> int:
    """Measure what is asked for and not known yet; print all that is known."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts and runs end with it
    arguments = parse()
    results = read(arguments.results)
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: {load:.1f} programs were at work before the start; they slow all down")
    with tempfile.TemporaryDirectory(prefix="finetune-") as temporary:
        folder = Path(temporary)
        data = prepare_data(folder)
        results["parameters"] = save_base(folder / "base", data, arguments.depth)
        flags = common_flags(folder / "base", data, arguments.mixed_precision)
        if "memory" in arguments.parts:
            measure_memory(flags, arguments, folder, results)
        if "speed" in arguments.parts:
            measure_speed(flags, arguments, folder, results)
    text = report(results)
    print(text)
    arguments.table.write_text(text + "\n", encoding="utf-8")
    return 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbit", type=float, default=50)
    parser.add_argument("--parts", nargs="+", choices=("speed", "memory"), default=None)
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--depth", type=int, default=DEPTH, help="of the base")
    parser.add_argument("--blocks", type=int, default=16, help="for each peer and update")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "auto"))
    artifacts = ROOT / "artifacts"
    parser.add_argument("--results", type=Path, default=artifacts / "finetune.json")
    parser.add_argument("--table", type=Path, default=artifacts / "finetune.md")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    arguments = parser.parse_args()
    arguments.parts = arguments.parts or ["speed", "memory"]
    return arguments


def save_base(folder: Path, data: Path, depth: int) -> int:
    """A base with random weights, whose values do not matter to speed; returns its parameters."""
    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.data.dataset import open_prepared
    from p2p_llm_forge.model.build import build_model
    from p2p_llm_forge.training.learner import text_spec_of

    prepared = open_prepared(data)
    sizes = f"vocab_size={VOCABULARY}"
    config = TrainConfig(str(data), model_type="qwen3", depth=depth, config_overrides=sizes)
    lm = build_model(config, text_spec_of(prepared))
    lm.save_pretrained(folder)
    shutil.copytree(prepared.tokenizer_dir, folder, dirs_exist_ok=True)
    return sum(p.numel() for p in lm.parameters())


def common_flags(base: Path, data: Path, precision: str) -> list[object]:
    """What all runs have in common."""
    return [
        *("--model-name", base, "--dataset-path", data, "--mixed-precision", precision),
        *("--report-to", "none", "--save-every", 0, "--cpu", "--cpu-threads", 1, "--no-pictures"),
        *("--compile", "off", "--peer-timeout", 120, "--log-every", 1, "--eval-blocks", 8),
    ]


# --- speed ----------------------------------------------------------------------------------------


def measure_speed(
    flags: list[object], arguments: argparse.Namespace, folder: Path, results: dict[str, Any]
) -> None:
    """Each method on two hosts, between two looks at one peer alone."""
    if why := why_not():
        sys.exit(f"error: hosts cannot be made here: {why}")
    count = len(arguments.methods)
    known = {name: results["runs"].setdefault(name, []) for name in arguments.methods}
    with hosts(2 + count) as (one, other, *lonely):
        sizes = ["--micro-batch-size", arguments.micro_batch_size]
        alone = {}
        for name, host in zip(arguments.methods, lonely, strict=True):
            own = [*flags, *METHODS[name], *sizes, "--batch-size", arguments.blocks]
            alone[name] = Alone(host, own, folder / f"alone-{name}", ALONE_UPDATES)
        for repeat in range(arguments.repeats):
            for name in (name for name in known if len(known[name]) <= repeat):
                began = time.monotonic()
                before = alone[name].tokens_per_s()
                words = [*flags, *METHODS[name], *sizes, "--batch-size", 2 * arguments.blocks]
                found = together(words, [one, other], arguments.mbit, folder / name)
                found["alone"] = (before + alone[name].tokens_per_s()) / 2
                known[name].append(found)
                results["machine"] = machine()
                results["settings"] = f"{arguments.mbit:g} Mbit/s, {arguments.mixed_precision}"
                write(arguments.results, results)
                times = found["tokens_per_s"] / found["alone"]
                took = time.monotonic() - began
                print(f"{name:5} {times:.2f}x one peer alone ({took:.0f} s)", flush=True)


def together(words: list[object], machines: list[Host], mbit: float, output: Path) -> dict:
    """Tokens/s of two peers that tune together, and bytes that one sends in an update."""
    last = SKIPPED + MEASURED
    logs = [output.with_name(f"{output.name}-{rank}.log") for rank in range(len(machines))]
    try:
        for rank, host in enumerate(machines):
            host.shape(mbit)
            meet = ["--master-addr", machines[0].address, "--master-port", 29500]
            meet += ["--rank", rank, "--world-size", 2]
            ends = ["--max-steps", last + 3, "--output-dir", output]
            host.start(PYTHON, "train.py", *words, *ends, *meet, log=logs[rank])
        deadline = time.monotonic() + LONGEST_RUN_S
        sent: list[int] = []
        while not line_of(output, last):
            if not sent and line_of(output, SKIPPED):
                sent = [machines[1].bytes_sent()]
            is_running = all(host.is_running() for host in machines)
            if not is_running or time.monotonic() > deadline:
                sys.exit("\n".join(log.read_text(errors="replace")[-2000:] for log in logs))
            time.sleep(0.1)
        sent.append(machines[1].bytes_sent())
        first, end = line_of(output, SKIPPED), line_of(output, last)
        assert first and end
        bytes_per_update = (sent[-1] - sent[0]) / MEASURED
        return {"tokens_per_s": speed_between(first, end), "bytes_per_update": bytes_per_update}
    finally:
        for host in machines:
            host.switch_off()
        shutil.rmtree(output, ignore_errors=True)


# --- memory ---------------------------------------------------------------------------------------


def measure_memory(
    flags: list[object], arguments: argparse.Namespace, folder: Path, results: dict[str, Any]
) -> None:
    """The peak of one process that tunes, by each method."""
    for name in arguments.methods:
        output = folder / f"memory-{name}"
        words = [*flags, *METHODS[name], "--max-steps", 3, "--output-dir", output]
        words += ["--micro-batch-size", arguments.micro_batch_size]
        words += ["--batch-size", arguments.blocks]
        log = folder / f"memory-{name}.log"
        with log.open("wb") as file:
            argv = [PYTHON, "train.py", *map(str, words)]
            pid = os.posix_spawn(
                PYTHON, argv, os.environ, file_actions=[
                    (os.POSIX_SPAWN_DUP2, file.fileno(), 1),
                    (os.POSIX_SPAWN_DUP2, file.fileno(), 2),
                ],
            )  # fmt: skip
            _, status, used = os.wait4(pid, 0)
        if status:
            sys.exit(log.read_text(errors="replace")[-2000:])
        results.setdefault("memory", {})[name] = used.ru_maxrss * 1024
        losses = [line["loss"] for line in read_lines(output)]
        print(f"{name:5} {used.ru_maxrss / 2**20:.2f} GiB at most, losses {losses}", flush=True)
        write(arguments.results, results)


# --- what came of it ------------------------------------------------------------------------------


def report(results: dict[str, Any]) -> str:
    """Markdown: medians of ratios with their range, bytes and memory."""
    memory = results.get("memory", {})
    lines = [
        f"{results['parameters'] / 1e6:.1f} M parameters, {results.get('settings', '')};"
        f" {results.get('machine', machine())}",
        "",
        "| tuned | times one peer alone | range | tokens/s | MB sent in an update | memory, GiB |",
        "|---|---|---|---|---|---|",
    ]
    for name in METHODS:
        runs = results["runs"].get(name, [])
        cells = ["", "", "", ""]
        if runs:
            times = sorted(run["tokens_per_s"] / run["alone"] for run in runs)
            speed = statistics.median(run["tokens_per_s"] for run in runs)
            sent = statistics.median(run["bytes_per_update"] for run in runs)
            cells = [f"{statistics.median(times):.2f}", f"{times[0]:.2f} to {times[-1]:.2f}"]
            cells += [f"{speed:,.0f}", f"{sent / 1e6:.1f}"]
        peak = f"{memory[name] / 2**30:.2f}" if name in memory else ""
        lines.append(f"| {name} | {' | '.join(cells)} | {peak} |")
    if len(memory) == len(METHODS):
        lines += ["", f"Memory of LoRA: {memory['lora'] / memory['full']:.2f} of full tuning's."]
    return "\n".join(lines)


if __name__ == "__main__":
    sys.exit(main())
