"""How far something is that takes a while, and when it is done: a bar on a terminal, else lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from types import TracebackType

from tqdm import tqdm

from p2p_llm_forge.training.numbers import duration

BETWEEN_LINES_S = 5.0


class Progress:
    """Shown while entered, and gone afterwards. is_shown: on the main process alone."""

    def __init__(
        self,
        what: str,
        total: int,
        unit: str,
        is_shown: bool = True,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._what, self._total, self._unit = what, total, unit
        self._is_shown, self._clock = is_shown, clock

    def __enter__(self) -> Progress:
        self._began_s = self._shown_s = self._clock()
        is_hidden = not (self._is_shown and sys.stderr.isatty())
        self._bar = tqdm(
            desc=self._what,
            total=self._total,
            unit=f" {self._unit}",
            leave=False,
            disable=is_hidden,
        )
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._bar.close()

    def reached(self, done: int) -> None:
        """So much of the total is done."""
        now = self._clock()
        if not self._bar.disable:
            self._bar.update(done - self._bar.n)
        elif self._is_shown and now - self._shown_s >= BETWEEN_LINES_S and done < self._total:
            self._shown_s = now
            left_s = (now - self._began_s) / done * (self._total - done)
            counts = f"{done:,} of {self._total:,} {self._unit}"
            print(f"{self._what} {counts}, {duration(left_s)} left", flush=True)
