"""Elastic starts on loaded cores: how many of them fail, and how long they take.

    python benchmarks/elastic_starts.py [STARTS]

Each start: three launchers on this machine, one worker each, a run of five updates, while as many
processes as there are cores compute without an end. It is a failure when any launcher ends with
another status than 0, or the run had fewer than three peers.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from p2p_llm_forge.config import PrepareConfig
from prepare_data import prepare
from tests import ROOT
from tests.ports import free_port
from tests.runs import flags, results
from tests.texts import write_text

PEERS = 3


def main() -> None:
    """Start again and again, and print what came of it."""
    starts = int(sys.argv[1]) if len(sys.argv) > 1 else 20
    burners = [
        multiprocessing.Process(target=burn, daemon=True) for _ in range(os.cpu_count() or 1)
    ]
    for burner in burners:
        burner.start()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = write_text(folder / "text.txt", documents=100)
        data = folder / "data"
        prepare(PrepareConfig([str(text)], str(data), vocab_size=300, sequence_length=32))
        spent = [start(data, folder / f"run{number}") for number in range(starts)]
    good = [seconds for seconds in spent if seconds is not None]
    print(f"{starts - len(good)} of {starts} starts failed", end="")
    if good:
        print(f"; median {statistics.median(good):.0f} s, longest {max(good):.0f} s", end="")
    print(f" ({os.getloadavg()[0]:.0f} processes ready to run on {os.cpu_count()} cores)")


def start(data: Path, folder: Path) -> float | None:
    """Seconds from the first launcher's start to the end of all; None if anything failed."""
    began, log = time.monotonic(), folder.with_suffix(".log")
    words = [sys.executable, "launch/elastic.py", "--main=127.0.0.1", f"--port={free_port()}"]
    words += [f"--min-peers={PEERS}", "train.py", *flags(data, folder, max_steps=5, batch_size=6)]
    with log.open("w") as output:
        peers = [
            subprocess.Popen(words, cwd=ROOT, stdout=output, stderr=subprocess.STDOUT)
            for _ in range(PEERS)
        ]
        statuses = [peer.wait() for peer in peers]
    spent_s = time.monotonic() - began
    if any(statuses) or results(folder)["processes"] != PEERS:
        print(f"statuses {statuses}\n{log.read_text()}", flush=True)
        return None
    print(f"{spent_s:.0f} s", flush=True)
    return spent_s


def burn() -> None:
    """Keep a core busy."""
    while True:
        pass


if __name__ == "__main__":
    main()
