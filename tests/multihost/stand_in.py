"""A program for tests that stands for a training on two hosts: it prints that it runs, then one of

--success: both end well; --failure: rank 1 fails once rank 0 runs; --signal: both run until they
are asked to stop.
"""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path

READY = Path(__file__).with_suffix(".ready")  # each test has a copy of this file
RANK = sys.argv[sys.argv.index("--rank") + 1]


def stop(*_: object) -> None:
    last = [f"rank {RANK} writes file {number}" for number in range(200)]
    # A print may be under way.
    os.write(1, "\n".join([*last, f"rank {RANK} saved\n"]).encode())
    os._exit(143)


def main() -> None:
    signal.signal(signal.SIGTERM, stop)
    print("running", ascii(sys.argv[1:]), flush=True)
    if "--failure" in sys.argv and RANK == "1":
        while not READY.exists():
            time.sleep(0.01)
        sys.exit(5)
    READY.touch()
    if "--success" in sys.argv:
        sys.exit(0)
    signal.pause()


if __name__ == "__main__":
    main()
