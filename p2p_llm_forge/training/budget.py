"""The time of a run with `--minutes`: what is used, what is kept for the end, what is left."""

from __future__ import annotations

import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from typing import Any

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.launcher import first_started
from p2p_llm_forge.training import planner
from p2p_llm_forge.training.pace import MOST_UPDATES, Pace

# Of the whole time: between two decisions, and between two checkpoints.
BETWEEN_DECISIONS, BETWEEN_SAVES = 0.005, 0.05
LONGEST_BETWEEN_SAVES_S = 600.0
# Of the time so far, what an update takes is measured over the last part: machines slow down and
# recover within minutes.
RECENT = 0.3
SHORTEST_WINDOW_S = 3.0
CHANGE = 0.01  # of what is left; less is no new decision
EVALUATION = 0.45  # seconds of a token, over those of one that is trained on
FEWEST_UPDATES = 20  # worth a start


def process_began() -> float:
    """When this process was started, or its launcher if that is the first start: by
    `time.monotonic`."""
    return time.monotonic() - max(0.0, time.time() - first_started())


class Budget:
    """Decides, on the main process, after how many updates a run ends: see pace.py.

    seconds: of the whole run. used_s: by its sessions before this one. began: of this session, by
    `clock`. Other ranks have one too, and do not ask it.
    """

    def __init__(
        self,
        seconds: float,
        began: float,
        used_s: float = 0.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.seconds, self._began, self.used_s, self._clock = seconds, began, used_s, clock
        self.ending_s = 0.0  # what comes after the last update, but for evaluating
        self.evaluated_tokens = 0  # by each rank, in the evaluation at the end
        self.evaluation_s: float | None = None  # of the last one
        self.most_updates = MOST_UPDATES  # more would teach nothing
        self.plan: dict[str, Any] = {}  # what was chosen, and what more would bring: planner.py
        self.words: list[str] = []  # the same, for a person
        self._marks: deque[tuple[float, int]] = deque()  # seconds spent, updates done
        self._started_s = self._decided_s = self._saved_s = 0.0

    @property
    def spent_s(self) -> float:
        """Seconds that the run has used, of all its sessions."""
        return self.used_s + self._clock() - self._began

    @property
    def left_s(self) -> float:
        """Seconds that are left for updates, evaluations between them, and the end."""
        return self.seconds - self.spent_s

    def require_start(self, least_s: float = 0.0, updates: int = FEWEST_UPDATES) -> None:
        """Raise ForgeError if what is left does not suffice for so many seconds of training.

        updates: that they are for.
        """
        if self.left_s >= least_s + self.ending_s:
            return
        needed = 1.5 * (self.spent_s + least_s + self.ending_s) / 60
        rest_s = least_s + self.ending_s
        training = f", and {updates} updates and the end take {rest_s:.0f} s"
        raise ForgeError(
            f"--minutes {self.seconds / 60:g} is too short: starting took {self.spent_s:.0f} s"
            f"{training if rest_s else ''}",
            f"give it --minutes {math.ceil(10 * needed) / 10} or more",
        )

    def start(self, done: int) -> None:
        """The first update of this session is about to be taken."""
        self._started_s = self._decided_s = self._saved_s = self.spent_s
        self._marks = deque([(self._started_s, done)])

    def decide(self, done: int, pace: Pace, shares: Sequence[int]) -> int:
        """After how many updates the run is to end, seen after `done`; 0: as was decided.

        shares: tokens of each rank in an update.
        """
        spent_s, total_steps = self.spent_s, pace.total_steps
        (began_s, began_done), between_s = self._marks[0], BETWEEN_DECISIONS * self.seconds
        update_s = (spent_s - began_s) / (done - began_done)
        ends_soon = (total_steps - done) * update_s < 2 * between_s
        if done == total_steps or (spent_s - self._decided_s < between_s and not ends_soon):
            return 0
        self._decided_s = spent_s
        self._mark(spent_s, done)
        left_s = self.seconds - spent_s - self._end_s(update_s / min(shares))
        total = done + max(1, min(int(left_s / update_s), self.most_updates - done))
        is_as_before = abs(total - total_steps) <= CHANGE * (total_steps - done)
        return 0 if is_as_before else total

    def _mark(self, spent_s: float, done: int) -> None:
        """From here on what an update takes may be measured; long ago, no more.

        With what is between updates: evaluations, and saves.
        """
        window_s = max(SHORTEST_WINDOW_S, RECENT * (spent_s - self._started_s))
        self._marks.append((spent_s, done))
        while len(self._marks) > 2 and self._marks[1][0] < spent_s - window_s:
            self._marks.popleft()

    def _end_s(self, token_s: float) -> float:
        """Seconds that everything after the last update takes.

        token_s: of the slowest rank. All evaluate as much, however they share updates.
        """
        evaluation_s = self.evaluation_s
        if evaluation_s is None:
            evaluation_s = EVALUATION * token_s * self.evaluated_tokens
        return evaluation_s + self.ending_s

    def is_save_due(self) -> bool:
        """Whether so much time has passed since the last checkpoint that one is due."""
        return self.spent_s - self._saved_s >= self.between_saves_s

    @property
    def between_saves_s(self) -> float:
        """Seconds after which the next checkpoint is due."""
        return min(BETWEEN_SAVES * self.seconds, LONGEST_BETWEEN_SAVES_S)

    def saved(self) -> None:
        """A checkpoint has been made."""
        self._saved_s = self.spent_s

    def state(self, pace: Pace) -> dict[str, Any]:
        """What a resumed run needs, as JSON; see `pace.saved_pace`."""
        decisions = [list(pair) for pair in pace.decisions]
        most = {"most_updates": self.most_updates, "plan": self.plan}
        return {"seconds": self.spent_s, "decisions": decisions, **most}

    def resume(self, saved: dict[str, Any]) -> None:
        """Take over what `state` was in the checkpoint that the run resumes from."""
        self.used_s = float(saved["seconds"])
        self.most_updates = saved.get("most_updates") or MOST_UPDATES
        self.plan = saved.get("plan") or {}
        self.words = planner.words_of(self.plan)
