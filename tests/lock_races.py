"""A program for tests: races of two starters for one lock; prints how many of them had it, by race.

    python -m tests.lock_races FOLDER RACES

Every second race begins where there is no lock, the others where a process that was killed left
its own. A small process of its own, because every starter is a fork of it.
"""

from __future__ import annotations

import json
import os
import shutil
import sys
from pathlib import Path

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Lock


def start(path: Path, go: int, answer: int, stay: int) -> None:
    """One starter: takes the lock as soon as `go` is closed, and has it until `stay` is."""
    lock = Lock(path, "the folder", None)
    os.read(go, 1)
    try:
        lock.acquire()
        lock.confirm()
        os.write(answer, b"1")
    except ForgeError:
        os.write(answer, b"0")
    os.read(stay, 1)
    os._exit(0)  # without a word, as by a crash


def race(path: Path) -> int:
    """Let two start at once; how many of them have the lock while both live."""
    (go, starts), (answers, answer), (stay, ends) = os.pipe(), os.pipe(), os.pipe()
    starters = []
    for _ in range(2):
        starters.append(os.fork())
        if not starters[-1]:
            os.close(starts)
            os.close(ends)
            start(path, go, answer, stay)
    os.close(starts)
    held = sum(int(os.read(answers, 1)) for _ in starters)
    os.close(ends)
    for pid in starters:
        os.waitpid(pid, 0)
    for end in (go, answers, answer, stay):
        os.close(end)
    return held


def main() -> None:
    path, outcomes = Path(sys.argv[1]) / "run.lock", []
    for number in range(int(sys.argv[2])):
        if number % 2 == 0:
            shutil.rmtree(path, ignore_errors=True)
        assert path.exists() == bool(number % 2)
        outcomes.append(race(path))
    print(json.dumps(outcomes))


if __name__ == "__main__":
    main()
