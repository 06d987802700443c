"""On how many machines a checkpoint is to lie, and how long copying it may take.

What nobody has asked for may take a tenth of the time between two saves, measured on the copy
itself: beyond that it is given up, and this is said, with the --save-every that would allow it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Callable

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.fetching import UNASKED
from p2p_llm_forge.training.numbers import duration

USUAL = 2  # machines that hold a checkpoint
SHARE = 0.1  # of the time between two saves that a copy by default may take
MEASURED_S = 1.0  # that one may take in any case, so that it is known what it takes
END_S = 10.0  # at the end, where no training waits for it
MARGIN = 1.2  # a --save-every is named with which copies take that much less than allowed


class Limits:
    """Decides, on rank 0, which checkpoints are copied and for how long.

    total_steps: of the run. longest_s: between two saves, where the clock decides that. Of a copy
    that was given up, the next but one is tried, then only every fourth, eighth, ...
    """

    def __init__(
        self,
        config: TrainConfig,
        total_steps: int,
        longest_s: float | None = None,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._config, self._total_steps = config, total_steps
        self._longest_s, self._clock = math.inf if longest_s is None else longest_s, clock
        self.is_by_default = config.replicate_checkpoints is None
        self.wanted = config.replicate_checkpoints or USUAL  # machines, that of rank 0 among them
        self._first_step, self._began, self._update_s = 0, clock(), 0.0
        self._pauses, self._left_out = 0, 0  # saves without a copy: next time, and by now

    def start(self, first_step: int) -> None:
        """The first update is about to be taken."""
        self._first_step, self._began = first_step, self._clock()

    def mark(self, step: int) -> None:
        """So many updates are done now, and a checkpoint follows."""
        if step > self._first_step:
            self._update_s = (self._clock() - self._began) / (step - self._first_step)

    @property
    def between_saves_s(self) -> float:
        """Seconds between two saves, as fast as until now."""
        updates = self._config.save_every or self._total_steps
        return min(updates * self._update_s, self._longest_s)

    def limit_s(self, is_at_end: bool = False) -> float | None:
        """How long copying a checkpoint to one machine may take; None: as long as it does."""
        if not self.is_by_default:
            return None
        return max(self._allowed_s, END_S if is_at_end else MEASURED_S)

    @property
    def _allowed_s(self) -> float:
        return SHARE * self.between_saves_s

    def is_too_large(self, size: int) -> bool:
        """Whether a checkpoint of so many bytes travels only where that was asked for."""
        return self.is_by_default and size > UNASKED and self._config.fetch != "yes"

    def is_turn(self) -> bool:
        """Whether the next checkpoint is copied."""
        self._left_out += 1
        if self._left_out <= self._pauses:
            return False
        self._left_out = 0
        return True

    def is_too_slow(self, seconds: float) -> bool:
        """Whether a copy that was made has taken longer than it may at every save."""
        return self.is_by_default and seconds > self._allowed_s

    def copied(self) -> None:
        """A checkpoint was copied in time."""
        self._pauses = 0

    def given_up(self) -> None:
        """A copy took longer than allowed."""
        self._pauses = 2 * self._pauses + 1

    def too_slow(self, seconds: float, done: int, total: int) -> str:
        """Why there is no copy at every save, if so many bytes came, and what would allow it."""
        between, size = in_words(self.between_saves_s), f"{total / 1e6:,.1f} MB"
        ways = ["--replicate-checkpoints 2 copies it however long that takes"]
        if not done:
            return f"of its {size} nothing had come after {in_words(seconds)}; {ways[0]}"
        rate, takes_s = done / seconds, total * seconds / done
        every = self._allowed_by(takes_s)
        if every < self._total_steps and math.isinf(self._longest_s):
            ways = [f"--save-every {every} would allow it", *ways]
        return (
            f"its {size} at {rate / 1e6:,.1f} MB/s take about {in_words(takes_s)}, and a copy that"
            f" nobody has asked for takes at most a tenth of the {between} between two saves;"
            f" {', '.join(ways)}"
        )

    def _allowed_by(self, takes_s: float) -> int:
        """The --save-every with which a copy that takes so long is made: a round number."""
        least = MARGIN * takes_s / (SHARE * max(self._update_s, 1e-9))
        unit = 10 ** max(0, math.floor(math.log10(max(least, 1))) - 1)
        if self._config.sync == "diloco":
            unit = math.lcm(unit, max(1, self._config.round_length()))
        if self._config.keep_best:
            unit = math.lcm(unit, max(1, self._config.eval_every))
        return unit * math.ceil(least / unit)


def in_words(seconds: float) -> str:
    """Seconds for a person, also short ones."""
    return f"{seconds:.2g} s" if seconds < 10 else duration(seconds)
