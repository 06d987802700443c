"""How far a run is along at every update, where the time decides how many there are.

How fast machines are changes from minute to minute, so the number of updates is decided again and
again while a run lasts. What is left of the schedule is then spread over what is left of the
updates: the learning rate never jumps, and reaches its end with the last update.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.shapes import is_count, require_shape

GRAIN = 100_000  # steps of a schedule that is a function of progress
MOST_UPDATES = 10**9

SHAPE = {
    **{"seconds": (int, float), "decisions": [[is_count]]},
    **{"most_updates": (None, is_count), "plan": (None, dict)},
}


class Pace:
    """The decisions of a run so far: pairs of updates done, and the updates after which it ends.

    The same on every rank. `progress` is a function of these pairs alone.
    """

    def __init__(self, decisions: Sequence[Sequence[int]]) -> None:
        """Raises ValueError for pairs that cannot follow on each other."""
        self.decisions: list[tuple[int, int]] = []
        self._progress: list[float] = []  # at each of them
        for done, total_steps in decisions:
            self.decide(done, total_steps)
        if not self.decisions or self.decisions[0][0]:
            raise ValueError("the updates are not decided from the first one on")

    @property
    def total_steps(self) -> int:
        """Updates after which the run ends, as was decided last."""
        return self.decisions[-1][1]

    def decide(self, done: int, total_steps: int) -> None:
        """After `done` updates, now the run ends after `total_steps`. Raises ValueError."""
        if self.decisions and self.decisions[-1][0] == done:
            self.decisions.pop()
            self._progress.pop()
        is_later = not self.decisions or self.decisions[-1][0] < done <= self.total_steps
        if not is_later or not done < total_steps <= MOST_UPDATES:
            raise ValueError(f"after {done} updates a run cannot end at {total_steps}")
        self._progress.append(self.progress(done) if self.decisions else 0.0)
        self.decisions.append((done, total_steps))

    def progress(self, step: int) -> float:
        """The part of the schedule, 0 to 1, that lies before update `step` (from 0)."""
        number = len(self.decisions) - 1
        while number and self.decisions[number][0] > step:
            number -= 1
        (done, total_steps), before = self.decisions[number], self._progress[number]
        return min(1.0, before + (1 - before) * (step - done) / (total_steps - done))


def paced_learning_rate(config: TrainConfig, pace: Pace) -> Callable[[int], float]:
    """The fraction of the peak learning rate at an update (from 0), by progress.

    The warm-up counts updates; the schedule, by default linear, goes by how far the run is along.
    """
    from p2p_llm_forge.model.optimizer import learning_rate_factor  # torch: --help cannot wait

    name = config.lr_scheduler or "linear"
    schedule = learning_rate_factor(replace(config, lr_scheduler=name, warmup_steps=0), GRAIN)

    def factor(step: int) -> float:
        warm = min(1.0, (step + 1) / ((config.warmup_steps or 0) + 1))
        return warm * float(schedule(int(pace.progress(step) * GRAIN)))

    return factor


def saved_pace(state: dict[str, Any]) -> Pace | None:
    """The pace of the run that a trainer's state belongs to.

    None where its updates were counted. Raises ValueError for what no run of ours has saved.
    """
    if (saved := state.get("budget")) is None:
        return None
    require_shape(saved, SHAPE, "budget")
    if any(len(pair) != 2 for pair in saved["decisions"]):
        raise ValueError("a decision in its budget is no pair")
    if not 0 <= saved["seconds"] < math.inf:
        raise ValueError("the seconds in its budget are no time")
    return Pace(saved["decisions"])
