"""Two peers on a slow network: tokens/s of each way to keep them in step, predicted and measured.

    python benchmarks/slow_network.py [--mbit 50 200 1000] [--arms ddp diloco-100-int8 ...]

Two hosts (network namespaces joined by a switch, which need root) send at most so many Mbit/s each,
shaped by tc. On each a peer trains with one thread: a GPT-2 shape of 6 layers of 384, vocabulary
8192, blocks of 256 tokens, float32, two blocks per peer and update. A peer alone is measured with
the other host idle, and with another peer alone on it: both share this machine's memory.

Measured is the time of updates after the first few: of DDP several, of DiLoCo one whole round with
its exchange. Every arm is written to --results as soon as it is measured; arms that are there are
not measured again. The end prints a table and draws the PNG.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from p2p_llm_forge.advice import Measured, Strategy, forecast
from tests.multihost.hosts import PYTHON, ROOT, Host, hosts, why_not

SEQUENCE_LENGTH, BLOCKS_PER_PEER = 256, 2
MODEL = "n_layer=6,n_head=6,n_embd=384,vocab_size=8192"
PAYLOAD = 1448 / 1514  # of what goes over a full wire: the rest is Ethernet's, IP's and TCP's
LONGEST_RUN_S = 400.0


@dataclass(frozen=True)
class Arm:
    """A way to train, and how many updates are left out and measured."""

    strategy: Strategy | None  # None: one peer alone
    skipped: int
    measured: int


def diloco(every: int, compress: str, fragments: int = 1, overlap_steps: int = 0) -> Arm:
    """A whole round, from before its first exchange to after its last has landed."""
    strategy = Strategy("diloco", compress, every, fragments, overlap_steps)
    return Arm(strategy, skipped=10 if overlap_steps else 2, measured=every)


ALONE, BOTH_ALONE = "alone", "both-alone"
ARMS = {
    ALONE: Arm(None, 4, 12),
    BOTH_ALONE: Arm(None, 4, 12),
    "ddp": Arm(Strategy(), 2, 4),
    "ddp-fp16": Arm(Strategy(compress="fp16"), 2, 6),
    "ddp-int8": Arm(Strategy(compress="int8"), 2, 6),
    "ddp-powersgd": Arm(Strategy(compress="powersgd"), 4, 8),  # its first two send everything
    **{f"diloco-20-{how}": diloco(20, how) for how in ("none", "int8", "int4")},
    **{f"diloco-100-{how}": diloco(100, how) for how in ("none", "int8", "int4")},
    "streaming-100-int8": diloco(100, "int8", fragments=4, overlap_steps=5),
}


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
    parser.add_argument("--again", action="store_true", help="measure also what is known")
    return parser.parse_args()


def read(path: Path) -> dict[str, Any]:
    """What earlier calls have measured."""
    if path.exists():
        return json.loads(path.read_text(encoding="utf-8"))
    return {"alone": {}, "runs": {}}


def write(path: Path, results: dict[str, Any]) -> None:
    """Keep what is measured so far."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


# --- measuring ------------------------------------------------------------------------------------


def measure(arguments: argparse.Namespace, results: dict[str, Any]) -> list[str]:
    """Measure the arms; returns the names of those that failed."""
    todo = [(name, None) for name in arguments.arms if ARMS[name].strategy is None]
    todo += [
        (name, mbit) for mbit in arguments.mbit for name in arguments.arms if ARMS[name].strategy
    ]
    known = results["alone"].keys() | results["runs"].keys()
    todo = [entry for entry in todo if arguments.again or key_of(*entry) not in known]
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
        with hosts(2) as machines:
            for name, mbit in todo:
                began = time.monotonic()
                found = measure_arm(ARMS[name], name, mbit, machines, data, folder)
                spent = time.monotonic() - began
                if found is None:
                    failed.append(key_of(name, mbit))
                    continue
                results["alone" if mbit is None else "runs"][key_of(name, mbit)] = found
                results["machine"] = machine()
                write(arguments.results, results)
                speed = f"{found['tokens_per_s']:,.0f} tokens/s"
                print(f"{key_of(name, mbit):28} {speed:>16}  ({spent:.0f} s)", flush=True)
    return failed


def key_of(name: str, mbit: float | None) -> str:
    """What an arm's measurement is called in the results."""
    return name if mbit is None else f"{name}@{mbit:g}"


def machine() -> str:
    """What the figures were measured on."""
    import torch

    day = time.strftime("%Y-%m-%d")
    return f"{day}, {os.cpu_count()} cores, {platform.machine()}, torch {torch.__version__}"


def prepare_data(folder: Path) -> Path:
    """A small dataset of blocks; what it says does not matter to speed."""
    from p2p_llm_forge.config import PrepareConfig
    from prepare_data import prepare
    from tests.conftest import write_text

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


def measure_arm(
    arm: Arm, name: str, mbit: float | None, machines: list[Host], data: Path, folder: Path
) -> dict[str, Any] | None:
    """Run one arm on the hosts; None, after the end of its log, if it failed."""
    if mbit is not None:
        for host in machines:
            host.shape(mbit)
    used = machines if name != ALONE else machines[:1]
    outputs = [folder / f"run-{name}-{number}" for number in range(len(used))]
    logs = [folder / f"{name}-{number}.log" for number in range(len(used))]
    try:
        for number, host in enumerate(used):
            words = run_flags(arm, data)
            if arm.strategy is None:
                words += ["--output-dir", outputs[number], "--world-size", 1]
            else:
                words += ["--output-dir", outputs[0], "--world-size", 2, "--rank", number]
                words += ["--master-addr", machines[0].address, "--master-port", 29500]
                words += arm.strategy.flags.split()
            host.start(PYTHON, "train.py", *words, log=logs[number])
        telling = outputs if arm.strategy is None else outputs[:1]  # rank 0 alone tells
        if not measured_all(arm, telling, used):
            ends = [log.read_text(errors="replace")[-1500:] for log in logs]
            print(f"{key_of(name, mbit)} failed:", *ends, sep="\n", flush=True)
            return None
        found = steady_state(arm, [read_lines(output) for output in telling])
        if name == ALONE:
            used[0].wait(LONGEST_RUN_S)  # until its model is saved
            found["shapes"] = shapes_of(outputs[0])
        return found
    finally:
        for host in used:
            host.switch_off()
        for output in outputs:
            shutil.rmtree(output, ignore_errors=True)


def measured_all(arm: Arm, outputs: list[Path], used: list[Host]) -> bool:
    """Wait until the runs have told of the last update that counts; False if they ended before."""
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
    """What all arms have in common."""
    peers = 1 if arm.strategy is None else 2
    # A line of metrics at both ends of what is measured. A run's last update ends its last round,
    # which is not measured.
    steps = arm.skipped + arm.measured + (arm.strategy is not None and arm.strategy.sync != "ddp")
    every = arm.skipped
    assert arm.measured % every == 0
    return [
        *("--dataset-path", data, "--config-overrides", MODEL, "--mixed-precision", "no"),
        *("--batch-size", peers * BLOCKS_PER_PEER, "--micro-batch-size", BLOCKS_PER_PEER),
        *("--max-steps", steps, "--log-every", every, "--report-to", "none"),
        *("--cpu", "--cpu-threads", 1, "--peer-timeout", 60),
    ]


def line_of(output: Path, step: int) -> dict[str, Any] | None:
    """What a run has told of an update; None before that."""
    return next((line for line in read_lines(output) if line["step"] == step), None)


def read_lines(output: Path) -> list[dict[str, Any]]:
    """The lines of metrics.jsonl that updates wrote."""
    file = output / "metrics.jsonl"
    text = file.read_text(encoding="utf-8") if file.exists() else ""
    whole = [line for line in text.splitlines(keepends=True) if line.endswith("\n")]
    return [line for line in map(json.loads, whole) if "tokens_per_second" in line]


def steady_state(arm: Arm, runs: list[list[dict[str, Any]]]) -> dict[str, Any]:
    """Figures between two lines of metrics.jsonl, whose own are those since the run began.

    Of several runs (two peers, each alone) the mean.
    """
    speeds, shares, sent = [], [], []
    for lines in runs:
        by_step = {line["step"]: line for line in lines}
        first, last = by_step[arm.skipped], by_step[arm.skipped + arm.measured]
        spent = [line["tokens"] / line["tokens_per_second"] for line in (first, last)]
        speeds.append((last["tokens"] - first["tokens"]) / (spent[1] - spent[0]))
        if "communication" in last:
            waited = [
                line["communication"] * seconds
                for line, seconds in zip((first, last), spent, strict=True)
            ]
            shares.append((waited[1] - waited[0]) / (spent[1] - spent[0]))
            total = [line["bytes_sent_per_update"] * line["step"] for line in (first, last)]
            sent.append((total[1] - total[0]) / arm.measured)
    return {
        "tokens_per_s": sum(speeds) / len(speeds),
        "communication": sum(shares) / len(shares) if shares else None,
        "bytes_per_update": sum(sent) / len(sent) if sent else None,
    }


def shapes_of(output: Path) -> list[list[int]]:
    """The shapes of the trained model's parameters."""
    from safetensors import safe_open

    with safe_open(output / "model.safetensors", framework="np") as file:
        return [file.get_slice(name).get_shape() for name in file.keys()]  # noqa: SIM118


# --- telling --------------------------------------------------------------------------------------


def predicted(strategy: Strategy, mbit: float, results: dict[str, Any]) -> dict[str, Any]:
    """What advice.py says, knowing only the speed of a peer alone, the model and the bandwidth."""
    alone = results["alone"][ALONE]
    shapes = tuple(tuple(shape) for shape in alone["shapes"])
    tokens = BLOCKS_PER_PEER * SEQUENCE_LENGTH
    measured = Measured(
        parameters=sum(map(math.prod, shapes)),
        update_s=tokens / alone["tokens_per_s"],
        tokens_per_update=2 * tokens,
        peers=2,
        bytes_per_s=mbit * 1e6 / 8 * PAYLOAD,
        shapes=shapes,
    )
    return asdict(forecast(strategy, measured))


def runs_of(results: dict[str, Any]) -> dict[float, dict[str, dict[str, Any]]]:
    """What was measured, by bandwidth and arm, in the order of ARMS."""
    found: dict[float, dict[str, dict[str, Any]]] = {}
    for name in ARMS:
        for key, run in results["runs"].items():
            arm, _, mbit = key.partition("@")
            if arm == name:
                found.setdefault(float(mbit), {})[name] = run
    return dict(sorted(found.items()))


def report(results: dict[str, Any]) -> str:
    """All that was measured as Markdown."""
    if ALONE not in results["alone"]:
        return "one peer alone is not measured yet: --arms alone\n"
    alone = results["alone"][ALONE]["tokens_per_s"]
    lines = [results["machine"] + ".", "", f"One peer alone: {alone:,.0f} tokens/s."]
    if BOTH_ALONE in results["alone"]:
        both = results["alone"][BOTH_ALONE]["tokens_per_s"]
        lines.append(f"While another trains alone beside it: {both:,.0f} tokens/s.")
    deviations = []
    for mbit, runs in runs_of(results).items():
        lines += ["", f"{mbit:g} Mbit/s:", ""]
        lines.append(
            "| strategy | tokens/s | x one alone | predicted | predicted / measured |"
            " communication | MB sent per update |"
        )
        lines.append("|---|---|---|---|---|---|---|")
        for name, run in runs.items():
            strategy = ARMS[name].strategy
            assert strategy is not None
            hoped = predicted(strategy, mbit, results)["tokens_per_s"]
            deviations.append((abs(hoped / run["tokens_per_s"] - 1), key_of(name, mbit)))
            lines.append(
                f"| `{strategy.flags}` | {run['tokens_per_s']:,.0f} |"
                f" {run['tokens_per_s'] / alone:.2f} | {hoped:,.0f} |"
                f" {hoped / run['tokens_per_s']:.2f} | {percent(run['communication'])} |"
                f" {megabytes(run['bytes_per_update'])} |"
            )
    lines += ["", *goals(results, alone, deviations)]
    return "\n".join(lines) + "\n"


def percent(share: float | None) -> str:
    return "-" if share is None else f"{share:.1%}"


def megabytes(count: float | None) -> str:
    return "-" if count is None else f"{count / 1e6:.2f}"


def goals(results: dict[str, Any], alone: float, deviations: list[tuple[float, str]]) -> list[str]:
    """What was to be reached, and what was, as far as it is measured."""
    runs, lines = results["runs"], []
    if run := runs.get("diloco-100-int8@50"):
        lines.append(
            f"- diloco, int8, 100 updates a round at 50 Mbit/s: {run['tokens_per_s'] / alone:.2f}x"
            f" one peer alone (goal: 1.9), communication {percent(run['communication'])} (goal:"
            " under 5 %)"
        )
    if "ddp@50" in runs and "ddp-int8@50" in runs:
        gain = runs["ddp-int8@50"]["tokens_per_s"] / runs["ddp@50"]["tokens_per_s"]
        lines.append(f"- int8 gradients at 50 Mbit/s: {gain:.2f}x plain ddp (goal: 3.5)")
    if deviations:
        worst, where = max(deviations)
        lines.append(f"- predictions are off by at most {worst:.0%}, {where} (goal: 25 %)")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """Tokens/s against bandwidth, a line for every strategy."""
    by_rate = runs_of(results)
    if not by_rate or ALONE not in results["alone"]:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install 'matplotlib>=3.8,<4'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    alone = results["alone"][ALONE]["tokens_per_s"]
    styles = {"ddp": ("-", "o"), "diloco-20": ("--", "s"), "diloco-100": ("-.", "^")}
    colours = {"none": "C0", "fp16": "C1", "int8": "C2", "int4": "C3", "powersgd": "C4"}
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for name, arm in ARMS.items():
        points = [
            (rate, runs[name]["tokens_per_s"]) for rate, runs in by_rate.items() if name in runs
        ]
        if not points or arm.strategy is None:
            continue
        family = name.removesuffix("-" + arm.strategy.compress)
        line, marker = styles.get(family, (":", "D"))
        colour = colours[arm.strategy.compress]
        axes.plot(*zip(*points, strict=True), line, marker=marker, color=colour, label=name)
    for times, text in ((1, "one peer alone"), (2, "twice one peer")):
        axes.axhline(times * alone, color="grey", linewidth=0.8)
        axes.annotate(
            text, (min(by_rate), times * alone), (0, 3), textcoords="offset points", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xticks(list(by_rate), [f"{rate:g}" for rate in by_rate])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Mbit/s of each peer's link")
    axes.set_ylabel("tokens/s of two peers")
    axes.set_title("Two peers, 13.9 M parameters, float32")
    figure.legend(loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")


if __name__ == "__main__":
    sys.exit(main())
