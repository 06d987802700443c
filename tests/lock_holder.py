"""A program for tests: hold a lock, report by lines of JSON, and end when its input does.

    python -m tests.lock_holder PATH [CLOCK_LAG_S]

It prints {"held": true, "pid": ...}, or {"error": ...} if another process has the lock. For every
line of its input it confirms that it still has it. CLOCK_LAG_S: by how much the clock of its
machine is behind, as those see it who look at the files that it touches.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import only_writer


def report(**facts: object) -> None:
    print(json.dumps(facts), flush=True)


def lag(seconds: float) -> None:
    """Let this process touch files as one whose clock is behind."""
    touch = os.utime

    def touch_late(path: Path, times: object = None, **options: object) -> None:
        touch(path, (time.time() - seconds, time.time() - seconds), **options)

    os.utime = touch_late


def main() -> None:
    lag(float(sys.argv[2]) if len(sys.argv) > 2 else 0.0)
    try:
        with only_writer(Path(sys.argv[1]), "the folder") as lock:
            report(held=True, pid=os.getpid())
            for _ in sys.stdin:
                lock.confirm()
                report(confirmed=True, is_lost=lock.is_lost)
    except ForgeError as error:
        report(error=str(error))


if __name__ == "__main__":
    main()
