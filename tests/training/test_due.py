"""What happens after an update follows from its number and from what was asked."""

from __future__ import annotations

import signal

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.training.due import Due, due_after, is_due
from p2p_llm_forge.training.interruptions import NOTHING, OUT_OF_TIME, SAVE_NOW

CONFIG = TrainConfig(eval_every=4, save_every=6)


@pytest.mark.parametrize(
    ("done", "asked", "expected"),
    [
        (1, NOTHING, Due(evaluate=False, save=False, stop=False)),
        (4, NOTHING, Due(evaluate=True, save=False, stop=False)),
        (6, NOTHING, Due(evaluate=False, save=True, stop=False)),
        (12, NOTHING, Due(evaluate=True, save=True, stop=False)),
        (1, SAVE_NOW, Due(evaluate=False, save=True, stop=False)),
        # Asked to stop, a run saves at once and evaluates nothing first.
        (4, signal.SIGTERM, Due(evaluate=False, save=True, stop=True)),
        (1, OUT_OF_TIME, Due(evaluate=False, save=True, stop=True)),
        # The last update is evaluated and saved, and ends the run in peace.
        (13, NOTHING, Due(evaluate=True, save=True, stop=False)),
        (13, signal.SIGTERM, Due(evaluate=True, save=True, stop=False)),
    ],
)
def test_what_is_due(done, asked, expected):
    assert due_after(done, 13, CONFIG, asked) == expected


def test_never_is_never():
    assert not any(is_due(step, 0) for step in range(1, 100))
    assert [step for step in range(1, 10) if is_due(step, 3)] == [3, 6, 9]
