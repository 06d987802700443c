"""How fast files come from a peer while both train, and what it costs the training.

    python benchmarks/fetch.py [--mbit 100 1000] [--arms diloco-20-int8 ddp-int8] [--turns 3]

Two hosts (network namespaces joined by a switch, which need root) send at most so many Mbit/s each,
shaped by tc. On each a peer trains as in slow_network.py: 13.9 M parameters, one thread, float32.
Meanwhile rank 1 fetches files of rank 0, in pieces, verified and written to the disk, in its own
process beside the training: at full speed as at a start, and behind training's exchanges as copies
of checkpoints are. Turns of some seconds without a fetch, with one at full speed, with one behind,
and with a plain socket of Python in processes of its own, which carries as much and does nothing
with it, follow each other, so that all meet the machine as it is then.

A fetch is compared with what that socket carries over the same link while the peers are stopped,
and, as the training needs the link too, with what the training leaves of that. Printed are medians;
the cost is the median of ratios of updates/s, side by side. Both hosts, and the link itself, share
the processor: what the plain socket costs, no fetch can save.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import secrets
import signal
import statistics
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from benchmarks.slow_network import common_flags, machine, prepare_data, read_lines
from tests.multihost.hosts import PYTHON, ROOT, Host, hosts, why_not

ARMS = {
    "diloco-20-int8": ["--sync", "diloco", "--sync-every", 20, "--compress", "int8"],
    "ddp-int8": ["--sync", "ddp", "--compress", "int8"],
}
WARM_UP_LINES = 25  # updates: more than one round of DiLoCo
PLAIN = ROOT / "benchmarks" / "plain_socket.py"
MAIN_PORT = 29400  # beside that of plain_socket.py
GOAL = 0.8
LONGEST_S = 600.0
LINK_S = 3.0


@dataclass(frozen=True)
class Carrier:
    """What carries bytes over the link until it is stopped, which says how many in a second."""

    start: Callable[[], None]
    stop: Callable[[], float]


class Peers:
    """Two peers that train on and on, and fetch when they are asked to."""

    def __init__(self, machines: list[Host], folder: Path, words: list[object]) -> None:
        self.machines, self._folder, self._asks = machines, folder, 0
        self._output = folder / "run"
        self._logs = [folder / f"log-{rank}" for rank in range(2)]
        meeting = ["--master-addr", machines[0].address, "--master-port", MAIN_PORT]
        for rank, host in enumerate(machines):
            host.start(
                *(PYTHON, "benchmarks/fetch_peer.py", *words, *meeting),
                *("--world-size", 2, "--rank", rank, "--output-dir", self._output),
                log=self._logs[rank],
                environ={"FETCHES": str(folder)},
            )
        self._wait(lambda: self._count() >= WARM_UP_LINES)

    def beside(self, carrier: Carrier | None, seconds: float) -> dict[str, float]:
        """Updates/s, and the bytes/s that training sends, beside what carries bytes/s itself.

        It works from the end of one update to that of another, at least so many seconds later; with
        DiLoCo these are ends of rounds.
        """
        began, before = self._next_line()
        if carrier:
            carrier.start()
        time.sleep(seconds)
        ended, after = self._next_line()
        found = {"fetch": carrier.stop()} if carrier else {}
        found["updates"] = (after["step"] - before["step"]) / (ended - began)
        sent = [line["bytes_sent_per_update"] * line["step"] for line in (before, after)]
        found["training"] = (sent[1] - sent[0]) / (ended - began)
        return found

    def fetch(self, behind: bool) -> Carrier:
        """What has rank 1 fetch; the bytes/s are those that come to it."""

        def ask() -> None:
            self._asks += 1
            (self._folder / "ask").write_text(json.dumps({"behind": behind}))
            (self._folder / "ask").rename(self._folder / f"ask-{self._asks}")

        def stop() -> float:
            done = self._folder / f"done-{self._asks}"
            (self._folder / f"stop-{self._asks}").touch()
            self._wait(done.exists)
            fetched = json.loads(done.read_text())
            return float(fetched["bytes"] / fetched["seconds"])

        return Carrier(ask, stop)

    def pause(self) -> None:
        for host in self.machines:
            host.pause()

    def go_on(self) -> None:
        for host in self.machines:
            host.go_on()
        self._next_line()
        self._next_line()

    def _next_line(self) -> tuple[float, dict[str, Any]]:
        """When the next update ends, and what is logged of it."""
        known = self._count()
        self._wait(lambda: self._count() > known)
        return time.perf_counter(), self._lines()[-1]

    def _count(self) -> int:
        """How many lines there are; asked often, beside peers that need the processor."""
        file = self._output / "metrics.jsonl"
        return file.read_bytes().count(b"\n") if file.exists() else 0

    def _lines(self) -> list[dict[str, Any]]:
        return read_lines(self._output)

    def _wait(self, look: Any) -> None:
        deadline = time.monotonic() + LONGEST_S
        while not look():
            if not all(h.is_running() for h in self.machines) or time.monotonic() > deadline:
                ends = [log.read_text(errors="replace")[-2000:] for log in self._logs]
                sys.exit("error: peers failed:\n" + "\n".join(ends))
            time.sleep(0.02)


def main() -> int:
    """Measure the arms that are asked for and print a table."""
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # hosts and runs end with it
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--mbit", type=float, nargs="+", default=[100, 1000])
    parser.add_argument("--arms", nargs="+", choices=ARMS, default=list(ARMS), metavar="ARM")
    parser.add_argument("--turns", type=int, default=3, metavar="N")
    parser.add_argument("--seconds", type=float, default=20.0, help="of a turn")
    parser.add_argument("--config-overrides", help="a model of another size")
    parser.add_argument("--secret", action="store_true", help="with --cluster-secret-file")
    arguments = parser.parse_args()
    if why := why_not():
        sys.exit(f"error: hosts cannot be made here: {why}")
    rows, is_reached = [], True
    with tempfile.TemporaryDirectory(prefix="fetch-") as temporary:
        data = prepare_data(Path(temporary))
        for name in arguments.arms:
            for mbit in arguments.mbit:
                folder = Path(temporary) / f"{name}-{mbit:g}"
                turns = measure(name, mbit, arguments, data, folder)
                row, is_fast = summed_up(name, mbit, turns)
                rows.append(row)
                is_reached &= is_fast
    print(f"\n{machine()}; {arguments.turns} turns of {arguments.seconds:g} s\n")
    print(
        "| training | link, Mbit/s: shaped | measured | training sends | fetch: at full speed"
        " | of what is left | updates/s | behind | of what is left | updates/s"
        " | a plain socket | updates/s |"
    )
    print("|" + "---|" * 12, *rows, sep="\n")
    print(f"\ngoal, at least {GOAL:.0%} of what is left: {'reached' if is_reached else 'missed'}")
    return 0 if is_reached else 1


def measure(
    name: str, mbit: float, arguments: argparse.Namespace, data: Path, folder: Path
) -> list[dict[str, dict[str, float]]]:
    """What was found in each turn: alone, ahead, behind, plain, link."""
    make_files(folder, round(mbit * 1e6 / 8 * 4))  # 4 s of the link
    words: list[object] = [*common_flags(data, 2), *ARMS[name], "--max-steps", 1_000_000]
    words += ["--log-every", 1, "--peer-timeout", 600]
    if arguments.config_overrides:
        words += ["--config-overrides", arguments.config_overrides]
    if arguments.secret:
        (folder / "secret").touch(mode=0o600)
        (folder / "secret").write_text(secrets.token_hex(32))
        words += ["--cluster-secret-file", folder / "secret"]
    turns = []
    with hosts(2, mbit) as machines, bystanders(machines) as others:
        peers = Peers(machines, folder, words)
        for turn in range(arguments.turns):
            carriers = {
                "alone": None,
                "ahead": peers.fetch(behind=False),
                "behind": peers.fetch(behind=True),
                "plain": plain_socket(others, folder),
            }
            order = list(carriers) if turn % 2 == 0 else list(reversed(carriers))
            found = {name: peers.beside(carriers[name], arguments.seconds) for name in order}
            peers.pause()
            link = plain_socket(others, folder)
            link.start()
            time.sleep(LINK_S)
            found["link"] = {"bytes": link.stop()}
            peers.go_on()
            turns.append(found)
            shown = {
                key: {k: round(v * 8e-6 if k != "updates" else v, 2) for k, v in one.items()}
                for key, one in found.items()
            }
            print(f"{name} at {mbit:g} Mbit/s, {turn + 1}/{arguments.turns}: {shown}", flush=True)
    return turns


def make_files(folder: Path, size: int) -> None:
    """Random files of so many bytes in all, and their manifest."""
    (folder / "from").mkdir(parents=True)
    manifest = {}
    for number in range(4):
        content = os.urandom(size // 4)
        (folder / "from" / f"{number}.bin").write_bytes(content)
        manifest[f"{number}.bin"] = (len(content), hashlib.sha256(content).hexdigest())
    (folder / "manifest.json").write_text(json.dumps(manifest))


@contextlib.contextmanager
def bystanders(machines: list[Host]) -> Iterator[list[Host]]:
    """The same hosts for other processes, which end with the block."""
    others = [Host(host.name, host.address) for host in machines]
    try:
        yield others
    finally:
        for host in others:
            host.switch_off()


def plain_socket(machines: list[Host], folder: Path) -> Carrier:
    """A plain socket from the first host to the second, where nothing else of theirs runs."""
    log = folder / f"plain-{time.monotonic_ns()}"
    sender, receiver = machines

    def start() -> None:
        sender.start(PYTHON, PLAIN, "send", sender.address, log=log.with_suffix(".sender"))
        receiver.start(PYTHON, PLAIN, "receive", sender.address, log=log)

    def stop() -> float:
        sender.ask_to_stop()
        assert [*sender.wait(), *receiver.wait()] == [-signal.SIGTERM, 0]
        for host in machines:
            host.switch_off()  # forgets them
        return float(log.read_text())

    return Carrier(start, stop)


def summed_up(name: str, mbit: float, turns: list[dict[str, dict[str, float]]]) -> tuple[str, bool]:
    """A row of the table, and whether the goal is reached."""

    def median(of: Any) -> float:
        return statistics.median(of(turn) for turn in turns)

    link = median(lambda turn: turn["link"]["bytes"])
    cells = [f"{link * 8e-6:.0f}", f"{median(lambda t: t['alone']['training']) * 8e-6:.1f}"]
    shares = {}
    for kind in ("ahead", "behind"):
        shares[kind] = median(
            lambda t, k=kind: t[k]["fetch"] / (t["link"]["bytes"] - t[k]["training"])
        )
        ratio = median(lambda t, k=kind: t[k]["updates"] / t["alone"]["updates"])
        rate = median(lambda t, k=kind: t[k]["fetch"])
        cells += [f"{rate * 8e-6:.0f} ({rate / link:.2f})", f"{shares[kind]:.2f}", f"{ratio:.2f} x"]
    plain = median(lambda t: t["plain"]["fetch"])
    cells.append(f"{plain * 8e-6:.0f}")
    cells.append(f"{median(lambda t: t['plain']['updates'] / t['alone']['updates']):.2f} x")
    return f"| {name} | {mbit:g} | {' | '.join(cells)} |", min(shares.values()) >= GOAL


if __name__ == "__main__":
    sys.exit(main())
