"""Several ranks prepare one dataset: their signs of life and failures, as files beside it.

    output-dir/unfinished/rank-0          is touched every second while that rank lives
    output-dir/unfinished/rank-1.failed   why it gave up

No clock is compared with another machine's: a rank is gone when its file has not changed for
GONE_AFTER_S of watching.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from p2p_llm_forge.errors import ForgeError, Problem
from p2p_llm_forge.files import Pulse, beating, read_json, write_json

COMES_WITHIN_S = 30.0  # after the main rank has begun
GONE_AFTER_S = 30.0


@dataclass(frozen=True)
class Ranks:
    """Which of the processes of one launch this is."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def mark_of(folder: Path, rank: int) -> Path:
    """The file that a rank touches while it lives."""
    return folder / f"rank-{rank}"


def lives(pulse: Pulse) -> bool:
    """Whether the rank behind a mark has shown a sign of life lately."""
    return pulse.is_beating(GONE_AFTER_S)


@contextlib.contextmanager
def alive(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Show the other ranks that this one lives, while entered. Raises OSError."""
    mark = mark_of(folder, ranks.rank)
    mark.touch()
    try:
        with beating(mark):
            yield
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()


class Helpers:
    """The ranks but the main one, as the main one sees them."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        self._pulses = [Pulse(mark_of(folder, rank)) for rank in range(1, ranks.world_size)]
        self._started = time.monotonic()

    def are_working(self) -> bool:
        """Whether one lives or may still come. Raises the ForgeError that ended one."""
        for path in sorted(self._folder.glob("rank-*.failed")):
            raise ForgeError.of(Problem(**problem) for problem in read_json(path))
        may_come = time.monotonic() - self._started < COMES_WITHIN_S
        # All are looked at, for a pulse is as old as the last look at it.
        working = [lives(pulse) or (may_come and not pulse.has_changed()) for pulse in self._pulses]
        return any(working)


@contextlib.contextmanager
def failure_posted(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Have the main rank, the only one that prints, raise the ForgeError that ends this one."""
    try:
        yield
    except ForgeError as error:
        problems = [asdict(problem) for problem in error.problems]
        with contextlib.suppress(OSError):
            write_json(folder / f"rank-{ranks.rank}.failed", problems, durable=False)
        raise
