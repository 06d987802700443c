"""The arms of benchmarks/slow_network.py, and what is written and drawn of their measurements."""

from __future__ import annotations

import statistics
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2p_llm_forge.sync.forecast import CPU_COSTS, Measured, Strategy, forecast

SEQUENCE_LENGTH, BLOCKS_PER_PEER = 256, 2
PAYLOAD = 1448 / 1514  # of what goes over a full wire: the rest is Ethernet's, IP's and TCP's


@dataclass(frozen=True)
class Arm:
    """A strategy, and how many updates are left out and measured."""

    strategy: Strategy | None  # None: each peer for itself
    skipped: int
    measured: int


def diloco(every: int, compress: str, fragments: int = 1, overlap_steps: int = 0) -> Arm:
    """A whole round, from before its first exchange to after its last has landed."""
    strategy = Strategy("diloco", compress, every, fragments, overlap_steps)
    return Arm(strategy, skipped=10 if overlap_steps else 2, measured=every)


APART = "apart"
ARMS = {
    APART: Arm(None, 4, 40),
    "ddp": Arm(Strategy(), 2, 4),
    "ddp-bf16": Arm(Strategy(compress="bf16"), 2, 6),
    "ddp-int8": Arm(Strategy(compress="int8"), 2, 8),
    "ddp-powersgd": Arm(Strategy(compress="powersgd"), 4, 12),  # its first two send everything
    **{f"diloco-20-{how}": diloco(20, how) for how in ("none", "int8", "int4")},
    **{f"diloco-100-{how}": diloco(100, how) for how in ("none", "int8", "int4")},
    "diloco-100-int8-overlap": diloco(100, "int8", overlap_steps=5),
    "streaming-100-int8": diloco(100, "int8", fragments=4, overlap_steps=5),
}


def key_of(name: str, mbit: float) -> str:
    """What an arm's measurements are called in the results."""
    return f"{name}@{mbit:g}" if ARMS[name].strategy else name


def predicted(strategy: Strategy, mbit: float, alone: float, results: dict[str, Any]) -> float:
    """The tokens/s that sync/forecast.py expects, knowing only the speed of a peer alone, the model
    and the bandwidth."""
    tokens = BLOCKS_PER_PEER * SEQUENCE_LENGTH
    measured = Measured(
        parameters=results["parameters"],
        update_s=tokens / alone,
        tokens_per_update=2 * tokens,
        peers=2,
        bytes_per_s=mbit * 1e6 / 8 * PAYLOAD,
    )
    return forecast(strategy, measured).tokens_per_s


def medians(runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Of every figure, and of the ratio to one peer alone; with how far that ratio ranged."""
    found = {
        name: statistics.median(run[name] for run in runs)
        for name in runs[0]
        if runs[0][name] is not None
    }
    times = sorted(run["tokens_per_s"] / run["alone"] for run in runs)
    return {**found, "times": statistics.median(times), "least": times[0], "most": times[-1]}


def runs_of(results: dict[str, Any]) -> dict[float, dict[str, dict[str, Any]]]:
    """The medians of what was measured, by bandwidth and arm, in the order of ARMS."""
    found: dict[float, dict[str, dict[str, Any]]] = {}
    for name in ARMS:
        for key, runs in results["runs"].items():
            arm, _, mbit = key.partition("@")
            if arm == name and mbit:
                found.setdefault(float(mbit), {})[name] = {**medians(runs), "repeats": len(runs)}
    return dict(sorted(found.items()))


def report(results: dict[str, Any]) -> str:
    """All that was measured as Markdown."""
    if not results["runs"]:
        return "nothing is measured yet\n"
    speeds = sorted(run["alone"] for runs in results["runs"].values() for run in runs)
    lines = [
        results["machine"] + ".",
        "",
        (
            f"One peer alone: {statistics.median(speeds):,.0f} tokens/s ({speeds[0]:,.0f} to"
            f" {speeds[-1]:,.0f} from one measurement to another)."
        ),
    ]
    if APART in results["runs"]:
        apart = medians(results["runs"][APART])
        lines.append(
            f"Two that never hear of each other: {times_text(apart)}x one alone, in"
            f" {len(results['runs'][APART])} measurements."
        )
    deviations = []
    for mbit, runs in runs_of(results).items():
        lines += ["", f"{mbit:g} Mbit/s:", ""]
        lines.append(
            "| strategy | tokens/s | x one alone | measured | predicted x | predicted / measured |"
            " communication | MB sent per update |"
        )
        lines.append("|---|---|---|---|---|---|---|---|")
        for name, run in runs.items():
            strategy = ARMS[name].strategy
            assert strategy is not None
            forecast_times, by_measured = "-", "-"
            if strategy.compress in CPU_COSTS:  # PowerSGD is never chosen, so never forecast
                hoped = predicted(strategy, mbit, run["alone"], results) / run["alone"]
                deviations.append((abs(hoped / run["times"] - 1), key_of(name, mbit)))
                forecast_times, by_measured = f"{hoped:.2f}", f"{hoped / run['times']:.2f}"
            lines.append(
                f"| `{strategy.flags}` | {run['tokens_per_s']:,.0f} | {times_text(run)} |"
                f" {run['repeats']}x | {forecast_times} | {by_measured} |"
                f" {percent(run['communication'])} | {megabytes(run['bytes_per_update'])} |"
            )
    lines += ["", *goals(results, deviations)]
    return "\n".join(lines) + "\n"


def times_text(run: dict[str, Any]) -> str:
    """The median ratio to one peer alone, and how far it ranged if that is known."""
    if run["least"] == run["most"]:
        return f"{run['times']:.2f}"
    return f"{run['times']:.2f} ({run['least']:.2f} to {run['most']:.2f})"


def percent(part: float) -> str:
    return f"{part:.1%}"


def megabytes(count: float) -> str:
    return f"{count / 1e6:.2f}"


def goals(results: dict[str, Any], deviations: list[tuple[float, str]]) -> list[str]:
    """What was to be reached, and what was, as far as it is measured."""
    runs, lines = runs_of(results).get(50, {}), []
    for name in ("diloco-100-int8", "diloco-100-int8-overlap"):
        if run := runs.get(name):
            lines.append(
                f"- {name} at 50 Mbit/s: {times_text(run)}x one peer alone (goal: 1.9),"
                f" communication {percent(run['communication'])} (goal: under 5 %)"
            )
    if "ddp" in runs and "ddp-int8" in runs:
        # Not as multiples of one peer alone: the limit of both is the link.
        gain = runs["ddp-int8"]["tokens_per_s"] / runs["ddp"]["tokens_per_s"]
        lines.append(f"- int8 gradients at 50 Mbit/s: {gain:.2f}x plain ddp (goal: 3.5)")
    if deviations:
        worst, where = max(deviations)
        lines.append(f"- predictions are off by at most {worst:.0%}, {where} (goal: 25 %)")
    return lines


def draw(results: dict[str, Any], path: Path) -> None:
    """Speed against bandwidth, a line for every strategy."""
    by_rate = runs_of(results)
    if not by_rate:
        return
    try:
        import matplotlib
    except ImportError:
        print("no plot: pip install 'matplotlib>=3.8,<4'")
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    styles = {"ddp": ("-", "o"), "diloco-20": ("--", "s"), "diloco-100": ("-.", "^")}
    styles["diloco-100-int8-overlap"] = (":", "v")
    colours = {"none": "C0", "bf16": "C1", "int8": "C2", "int4": "C3", "powersgd": "C4"}
    figure, axes = pyplot.subplots(figsize=(9, 5.5), layout="constrained")
    for name, arm in ARMS.items():
        points = [(rate, runs[name]["times"]) for rate, runs in by_rate.items() if name in runs]
        if not points or arm.strategy is None:
            continue
        family = name.removesuffix("-" + arm.strategy.compress)
        line, marker = styles.get(family, (":", "D"))
        colour = colours[arm.strategy.compress]
        axes.plot(*zip(*points, strict=True), line, marker=marker, color=colour, label=name)
    lines = {1.0: "one peer alone"}
    if APART in results["runs"]:
        lines[medians(results["runs"][APART])["times"]] = "two apart"
    for times, text in lines.items():
        axes.axhline(times, color="grey", linewidth=0.8)
        axes.annotate(
            text, (0.15, times), (0, 3), ("axes fraction", "data"), "offset points", fontsize=8
        )
    axes.set_xscale("log")
    axes.set_xticks(list(by_rate), [f"{rate:g}" for rate in by_rate])
    axes.minorticks_off()
    axes.set_ylim(bottom=0)
    axes.set_xlabel("Mbit/s of each peer's link")
    axes.set_ylabel("tokens/s of two peers, in those of one alone")
    axes.set_title("Two peers, 13.9 M parameters, float32")
    figure.legend(loc="outside right upper", fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    print(f"drawn: {path}")
