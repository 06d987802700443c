"""Two peers on a slow network: tokens/s of each strategy, predicted and measured.

    python benchmarks/slow_network.py [--mbit 50 200 1000] [--arms ddp diloco-100-int8 ...]

Two hosts (network namespaces joined by a switch, which need root) send at most so many Mbit/s each,
shaped by tc. On each a peer trains with one thread: a GPT-2 shape of 6 layers of 384, vocabulary
8192, blocks of 256 tokens, float32, two blocks per peer and update.

A machine's speed drifts from minute to minute, so one peer alone, on a host of its own, is measured
before and after every arm (it is stopped meanwhile), and an arm is a multiple of the mean of both.
The arm "apart" is two peers that never hear of each other: they share this machine's
memory and caches, so what stands above it is noise.

Measured is the time of updates after the first few: of DDP several, of DiLoCo one whole round with
its exchange. Every measurement is written to --results at once; what is there counts as a repeat.
The end prints a table of medians and draws the PNG.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.slow_network_report import (
    ARMS,
    BLOCKS_PER_PEER,
    SEQUENCE_LENGTH,
    Arm,
    draw,
    key_of,
    report,
)
from tests.multihost.hosts import PYTHON, ROOT, Host, hosts, why_not

MODEL = "n_layer=6,n_head=6,n_embd=384,vocab_size=8192,resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"
LONGEST_RUN_S = 400.0
ALONE_UPDATES = 20  # before and after an arm


def main() -> int:
    """Measure what is asked for and not known yet; print and draw all that is known."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts and runs end with it
    arguments = parse()
    results = read(arguments.results)
    failed = measure(arguments, results)
    text = report(results)
    print(text)
    arguments.table.write_text(text, encoding="utf-8")
    draw(results, arguments.plot)
    return 1 if failed else 0


def parse() -> argparse.Namespace:
    """The command line."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[50, 200, 1000])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    artifacts = ROOT / "artifacts"
    parser.add_argument("--results", type=Path, default=artifacts / "slow_network.json")
    parser.add_argument("--table", type=Path, default=artifacts / "slow_network.md")
    parser.add_argument("--plot", type=Path, default=ROOT / "benchmarks" / "slow_network.png")
    parser.add_argument("--repeats", type=int, default=3, metavar="N")
    return parser.parse_args()


def read(path: Path) -> dict[str, Any]:
    """What earlier calls have measured."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"parameters": None, "runs": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """Keep what is measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


# --- measuring ------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    """Measure the arms; returns the names of those that failed."""
    todo = [
        (name, mbit)
        for repeat in range(arguments.repeats)
        for mbit in arguments.mbit
        for name in arguments.arms
        if len(results["runs"].get(key_of(name, mbit), [])) <= repeat
        and (ARMS[name].strategy or mbit == arguments.mbit[0])
    ]
    if not todo:
        return []
    if why := why_not():
        sys.exit(f"error: hosts cannot be made here: {why}")
    if (load := os.getloadavg()[0]) > 0.5:
        print(f"warning: {load:.1f} programs were at work before the start; they slow all down")
    failed: list[str] = []
    with tempfile.TemporaryDirectory(prefix="slow_network-") as temporary:
        folder = Path(temporary)
        data = prepare_data(folder)
        results["parameters"] = results["parameters"] or parameters_of_model(data)
        with hosts(3) as (*machines, lonely):
            flags = [*common_flags(data, 1), "--log-every", 2]
            alone = Alone(lonely, flags, folder / "alone", ALONE_UPDATES // 2)
            before = alone.tokens_per_s()
            for name, mbit in todo:
                began = time.monotonic()
                found = measure_arm(ARMS[name], name, mbit, machines, data, folder)
                after = alone.tokens_per_s()
                beside, before = (before + after) / 2, after
                if found is None:
                    failed.append(key_of(name, mbit))
                    continue
                found["alone"] = beside
                results["runs"].setdefault(key_of(name, mbit), []).append(found)
                results["machine"] = machine()
                write(arguments.results, results)
                speed, times = found["tokens_per_s"], found["tokens_per_s"] / found["alone"]
                print(
                    f"{key_of(name, mbit):28} {speed:>8,.0f} tokens/s  {times:.2f}x alone"
                    f"  ({time.monotonic() - began:.0f} s)",
                    flush=True,
                )
    return failed


class Alone:
    """One peer that trains on and on, but is stopped except while it is measured."""

    def __init__(self, host: Host, flags: list[object], output: Path, lines: int) -> None:
        """lines: of metrics.jsonl, which a measurement takes."""
        self._host, self._output, self._lines = host, output, lines
        self._log = output.with_suffix(".log")
        words = [*flags, "--max-steps", 1_000_000, "--output-dir", output, "--world-size", 1]
        host.start(PYTHON, "train.py", *words, log=self._log)
        self._more_lines(2)
        host.pause()

    def tokens_per_s(self) -> float:
        """Its speed now."""
        self._host.go_on()
        # The line that ends first contains the pause.
        first, *_, last = self._more_lines(1 + self._lines)
        self._host.pause()
        return speed_between(first, last)

    def _more_lines(self, count: int) -> list[dict[str, Any]]:
        known = len(read_lines(self._output))
        deadline = time.monotonic() + LONGEST_RUN_S
        while len(lines := read_lines(self._output)) < known + count:
            if not self._host.is_running() or time.monotonic() > deadline:
                sys.exit(f"error: a peer alone failed:\n{self._log.read_text(errors='replace')}")
            time.sleep(0.1)
        return lines[known : known + count]


def machine() -> str:
    """What the figures were measured on."""
    import torch

    day = time.strftime("%Y-%m-%d")
    return f"{day}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


def prepare_data(folder: Path) -> Path:
    """A small dataset of blocks; its text does not matter to speed."""
    from p2p_llm_forge.config import PrepareConfig
    from prepare_data import prepare
    from tests.texts import write_text

    text, data = write_text(folder / "text.txt", documents=3000), folder / "data"
    prepare(
        PrepareConfig(
            [str(text)],
            str(data),
            vocab_size=300,
            sequence_length=SEQUENCE_LENGTH,
            validation_fraction=0.01,
        )
    )
    return data


def parameters_of_model(data: Path) -> int:
    """How many parameters the model has that is trained."""
    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.data.dataset import open_prepared
    from p2p_llm_forge.model.build import build_model
    from p2p_llm_forge.training.learner import text_spec_of

    config = TrainConfig(str(data), model_type="gpt2", config_overrides=MODEL)
    lm = build_model(config, text_spec_of(open_prepared(data)))
    return sum(p.numel() for p in lm.parameters())


def measure_arm(
    arm: Arm, name: str, mbit: float, machines: list[Host], data: Path, folder: Path
) -> dict[str, Any] | None:
    """Run one arm on the hosts; None, after the end of its log, if it failed."""
    for host in machines:
        host.shape(mbit)
    outputs = [folder / f"run-{number}" for number in range(len(machines))]
    logs = [folder / f"{name}-{number}.log" for number in range(len(machines))]
    try:
        for number, host in enumerate(machines):
            words = run_flags(arm, data)
            if arm.strategy is None:
                words += ["--output-dir", outputs[number], "--world-size", 1]
            else:
                words += ["--output-dir", outputs[0], "--world-size", 2, "--rank", number]
                words += ["--master-addr", machines[0].address, "--master-port", 29500]
                words += arm.strategy.flags.split()
            host.start(PYTHON, "train.py", *words, log=logs[number])
        logged = outputs if arm.strategy is None else outputs[:1]  # rank 0 alone logs
        if not measured_all(arm, logged, machines):
            ends = [log.read_text(errors="replace")[-1500:] for log in logs]
            print(f"{key_of(name, mbit)} failed:", *ends, sep="\n", flush=True)
            return None
        return steady_state(arm, [read_lines(output) for output in logged])
    finally:
        for host in machines:
            host.switch_off()
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)


def measured_all(arm: Arm, outputs: list[Path], used: list[Host]) -> bool:
    """Wait until the runs have logged the last update that counts; False if they ended before."""
    wanted = arm.skipped + arm.measured
    deadline = time.monotonic() + LONGEST_RUN_S
    while time.monotonic() < deadline:
        is_running = all(host.is_running() for host in used)
        if all(line_of(output, wanted) for output in outputs):
            return True
        if not is_running:
            return False
        time.sleep(0.25)
    return False


def run_flags(arm: Arm, data: Path) -> list[object]:
    """What makes a run of a peer one of that arm."""
    # A line of metrics at both ends of what is measured, and some updates more: the last one ends
    # a round early, and no peer should end while another is measured.
    steps = arm.skipped + arm.measured + 20
    every = arm.skipped
    assert arm.measured % every == 0
    peers = 1 if arm.strategy is None else 2
    return [*common_flags(data, peers), "--max-steps", steps, "--log-every", every]


def common_flags(data: Path, peers: int) -> list[object]:
    """What all runs have in common."""
    return [
        *("--dataset-path", data, "--model-type", "gpt2", "--config-overrides", MODEL),
        *("--optimizer", "adamw", "--learning-rate", 1e-3, "--mixed-precision", "no"),
        *("--batch-size", peers * BLOCKS_PER_PEER, "--micro-batch-size", BLOCKS_PER_PEER),
        *("--report-to", "none", "--save-every", 0, "--cpu", "--cpu-threads", 1),
        *("--peer-timeout", 60),
    ]


def line_of(output: Path, step: int) -> dict[str, Any] | None:
    """What a run has logged of an update; None before that."""
    return next((line for line in read_lines(output) if line["step"] == step), None)


def read_lines(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that updates wrote."""
    file = output / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in map(json.loads, whole) if "tokens_per_second" in line]


def steady_state(arm: Arm, runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures of all peers between two lines of metrics.jsonl; runs: one, or one of each peer."""
    by_step = [{line["step"]: line for line in lines} for lines in runs]
    ends = [(run[arm.skipped], run[arm.skipped + arm.measured]) for run in by_step]
    found = {"tokens_per_s": sum(speed_between(*both) for both in ends)}
    if arm.strategy is None:
        return found
    [(first, last)] = ends
    spent = [seconds_until(line) for line in (first, last)]
    waited = [line["communication"] * s for line, s in zip((first, last), spent, strict=True)]
    sent = [line["bytes_sent_per_update"] * line["step"] for line in (first, last)]
    found["communication"] = (waited[1] - waited[0]) / (spent[1] - spent[0])
    found["bytes_per_update"] = (sent[1] - sent[0]) / arm.measured
    return found


def speed_between(first: dict[str, Any], last: dict[str, Any]) -> float:
    """Tokens/s between two lines of metrics.jsonl, whose own are those since the run began."""
    spent_s = seconds_until(last) - seconds_until(first)
    return (last["tokens"] - first["tokens"]) / spent_s


def seconds_until(line: dict[str, Any]) -> float:
    """From the first update to a line."""
    return line["tokens"] / line["tokens_per_second"]


if __name__ == "__main__":
    sys.exit(main())
