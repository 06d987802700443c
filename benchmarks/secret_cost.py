"""What a cluster secret costs: tokens/s of two peers at 1 Gbit/s, with it and without.

    python benchmarks/secret_cost.py [--pairs 12]

Two pairs of hosts (network namespaces joined by a switch, which need root) send at most so many
Mbit/s each, shaped by tc. On each a peer trains as in slow_network.py: 13.9 M parameters, one
thread, float32. One pair of peers has --cluster-secret-file. One pair is stopped while the other is
measured, in turns of some seconds, so both meet the machine as it is then; in every second turn the
other one begins. Printed are the medians of both speeds and of the ratios of turns side by side.
"""

from __future__ import annotations

import argparse
import os
import secrets
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
    LONGEST_RUN_S,
    common_flags,
    machine,
    prepare_data,
    read_lines,
    speed_between,
)
from tests.multihost.hosts import PYTHON, Host, hosts, why_not

# Flags of the strategy, updates of a line of metrics.jsonl, and lines of a turn.
ARMS = {
    "ddp": (["--sync", "ddp"], 4, 3),
    "diloco-20-int8": (["--sync", "diloco", "--sync-every", 20, "--compress", "int8"], 20, 1),
}
WARM_UP_LINES = 2
GOAL = 0.05


class Pair:
    """Two peers that train on and on, but are stopped except while they are measured."""

    def __init__(self, machines: list[Host], folder: Path, words: list[object]) -> None:
        self._machines, self._output = machines, folder / "run"
        self._logs = [folder / f"log-{rank}" for rank in range(2)]
        folder.mkdir()
        meeting = ["--master-addr", machines[0].address, "--master-port", 29500]
        for rank, host in enumerate(machines):
            host.start(
                *(PYTHON, "train.py", *words, *meeting, "--world-size", 2, "--rank", rank),
                *("--output-dir", self._output),
                log=self._logs[rank],
            )
        self._more_lines(WARM_UP_LINES)
        self._pause()

    def tokens_per_s(self, lines: int) -> float:
        """Their speed now, over so many lines of metrics.jsonl."""
        for host in self._machines:
            host.go_on()
        # The line that ends first contains the pause.
        first, *_, last = self._more_lines(1 + lines)
        self._pause()
        return speed_between(first, last)

    def end(self) -> None:
        for host in self._machines:
            host.switch_off()

    def _pause(self) -> None:
        for host in self._machines:
            host.pause()

    def _more_lines(self, count: int) -> list[dict[str, Any]]:
        known = len(read_lines(self._output))
        deadline = time.monotonic() + LONGEST_RUN_S
        while len(lines := read_lines(self._output)) < known + count:
            if not all(h.is_running() for h in self._machines) or time.monotonic() > deadline:
                ends = [log.read_text(errors="replace")[-2000:] for log in self._logs]
                sys.exit("error: peers failed:\n" + "\n".join(ends))
            time.sleep(0.05)
        return lines[known : known + count]


def main() -> int:
    """Measure the arms that are asked for and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts and runs end with it
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbit", type=float, default=1000)
    parser.add_argument("--pairs", type=int, default=12, metavar="N", help="turns of each")
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    arguments = parser.parse_args()
    if why := why_not():
        sys.exit(f"error: hosts cannot be made here: {why}")
    rows, is_reached = [], True
    with tempfile.TemporaryDirectory(prefix="secret_cost-") as temporary:
        folder = Path(temporary)
        data = prepare_data(folder)
        for name in arguments.arms:
            without, with_it = measure(name, arguments.mbit, arguments.pairs, data, folder)
            ratios = [b / a for a, b in zip(without, with_it, strict=True)]
            ratio = statistics.median(ratios)
            is_reached &= ratio >= 1 - GOAL
            rows.append(
                f"| {name} | {statistics.median(without):,.0f} | {statistics.median(with_it):,.0f}"
                f" | {1 - ratio:.1%} ({1 - max(ratios):.1%} to {1 - min(ratios):.1%}) |"
            )
    print(f"\n{machine()}; {arguments.mbit:g} Mbit/s, {arguments.pairs} pairs of turns\n")
    print("| | tokens/s without a secret | with it | cost: median (least to most) |")
    print("|---|---|---|---|", *rows, sep="\n")
    print(f"\ngoal, at most {GOAL:.0%}: {'reached' if is_reached else 'missed'}")
    return 0 if is_reached else 1


def measure(
    name: str, mbit: float, turns: int, data: Path, folder: Path
) -> tuple[list[float], list[float]]:
    """Tokens/s in each turn, without and with a secret."""
    strategy, updates, lines = ARMS[name]
    file = folder / f"{name}.secret"
    file.touch(mode=0o600)
    file.write_text(secrets.token_hex(32))
    words: list[object] = [*common_flags(data, 2), *strategy, "--max-steps", 1_000_000]
    words += ["--log-every", updates, "--peer-timeout", 3600]
    speeds: tuple[list[float], list[float]] = ([], [])
    with hosts(4, mbit) as machines:
        pairs = [
            Pair(machines[:2], folder / f"{name}-without", words),
            Pair(machines[2:], folder / f"{name}-with", [*words, "--cluster-secret-file", file]),
        ]
        for turn in range(turns):
            for which in (0, 1) if turn % 2 == 0 else (1, 0):
                speeds[which].append(pairs[which].tokens_per_s(lines))
            print(
                f"{name} {turn + 1}/{turns}: {speeds[0][-1]:,.0f} without,"
                f" {speeds[1][-1]:,.0f} with",
                flush=True,
            )
        for pair in pairs:
            pair.end()
    return speeds


if __name__ == "__main__":
    sys.exit(main())
