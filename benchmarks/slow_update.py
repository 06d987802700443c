"""One peer's update takes two minutes of computing: the others wait, with the default timeout.

    python benchmarks/slow_update.py [--sync ddp diloco] [--seconds 120] [--slow-rank 1]

Two ranks train by hand, without --peer-timeout. After a few updates one of them is slowed, by
stopping it for parts of a second, so far that the processor time of its next update takes longer
than asked; then it is fast again, and the run has to end as if nothing had been. A round of DiLoCo
is one update here, so that the other rank waits as long in its exchange.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import signal
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from prepare_data import prepare
from tests.runs import flags, read, start_ranks, step_logged
from tests.texts import write_text
from tests.waiting import wait_until
from tests.zygote import Zygote

FAST_UPDATES = 2  # before the slow one, and one after it
SPARE = 1.35  # the slowed update is to last at least as long as asked
SETTINGS = {
    **{"config_overrides": "n_layer=6,n_head=6,n_embd=384,vocab_size=8192"},
    **{"batch_size": 32, "micro_batch_size": 2, "log_every": 1, "save_every": 0},
}
STRATEGIES = {"ddp": {"sync": "ddp"}, "diloco": {"sync": "diloco", "sync_every": 1}}


def main() -> int:
    """Measure each strategy and print how long its slow update took, and how the run ended."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--sync", nargs="+", choices=STRATEGIES, default=list(STRATEGIES))
    parser.add_argument("--seconds", type=float, default=120.0)
    parser.add_argument("--slow-rank", type=int, choices=(0, 1), default=1)
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, data = write_text(folder / "text.txt", documents=2000), folder / "data"
        prepare(PrepareConfig([str(text)], str(data), vocab_size=300, sequence_length=128))
        zygote = Zygote()
        try:
            statuses = [
                slow_update(zygote, data, folder / sync, asked.seconds, asked.slow_rank)
                for sync in asked.sync
            ]
        finally:
            zygote.close()
    return 0 if not any(statuses) else 1


def slow_update(zygote: Zygote, data: Path, folder: Path, seconds: float, slow_rank: int) -> int:
    """One run, whose folder is called like its strategy; 0 if it ended as it should."""
    settings = {**SETTINGS, **STRATEGIES[folder.name], "max_steps": FAST_UPDATES + 2}
    log = folder.with_suffix(".log")
    ranks = start_ranks(zygote, flags(data, folder, **settings), 2, log)
    slow = psutil.Process(ranks[slow_rank])

    def reached(step: int) -> tuple[float, float]:
        """When the step was logged, and the processor time that the slow rank had by then."""
        wait_until(lambda: step_logged(folder) >= step or has_ended(zygote, ranks), 4 * seconds)
        return time.monotonic(), used_s(slow)

    _, before_s = reached(1)
    began, fast_s = reached(FAST_UPDATES)
    of_update_s = (fast_s - before_s) / (FAST_UPDATES - 1)
    with slowed_to(slow, of_update_s / seconds / SPARE):
        ended, after_s = reached(FAST_UPDATES + 1)
    statuses = [zygote.wait(pid, 4 * seconds) for pid in ranks]
    print(
        f"{folder.name}: an update of {ended - began:.0f} s on rank {slow_rank} (with"
        f" {after_s - fast_s:.1f} s of computing), --peer-timeout {TrainConfig.peer_timeout:g};"
        f" the ranks ended with {statuses} after {step_logged(folder)} updates",
        flush=True,
    )
    if any(statuses) or ended - began < seconds:
        print(read(log))
        return 1
    return 0


def used_s(process: psutil.Process) -> float:
    """The processor time that a process has used; 0 when it has ended."""
    with contextlib.suppress(psutil.NoSuchProcess):
        return sum(process.cpu_times()[:2])
    return 0.0


@contextlib.contextmanager
def slowed_to(process: psutil.Process, share: float) -> Iterator[None]:
    """Let a process have only this share of a core, also where others leave it less than one."""
    over, began, first_s = threading.Event(), time.monotonic(), used_s(process)

    def stop_and_go() -> None:
        while not over.wait(0.01):
            has_had = used_s(process) - first_s
            is_ahead = has_had > share * (time.monotonic() - began)
            with contextlib.suppress(psutil.NoSuchProcess):
                process.send_signal(signal.SIGSTOP if is_ahead else signal.SIGCONT)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        with contextlib.suppress(psutil.NoSuchProcess):
            process.send_signal(signal.SIGCONT)


def has_ended(zygote: Zygote, ranks: list[int]) -> bool:
    return any([zygote.has_ended(pid) for pid in ranks])


if __name__ == "__main__":
    sys.exit(main())
