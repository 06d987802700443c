"""What happens after an update: the arithmetic of every so many steps, and of what was asked."""

from __future__ import annotations

from dataclasses import dataclass

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.training.interruptions import NOTHING, SAVE_NOW


@dataclass(frozen=True)
class Due:
    """What the loop does between one update and the next."""

    evaluate: bool
    save: bool
    stop: bool


def is_due(step: int, every: int) -> bool:
    """Whether something that is done every so many steps (0: never) is done now."""
    return bool(every) and step % every == 0


def due_after(done: int, total_steps: int, config: TrainConfig, asked: int) -> Due:
    """What is due after `done` updates. asked: what the ranks ask for (interruptions.py)."""
    is_last = done == total_steps
    stop = asked not in (NOTHING, SAVE_NOW) and not is_last
    return Due(
        evaluate=is_last or (is_due(done, config.eval_every) and not stop),
        save=is_last or stop or asked == SAVE_NOW or is_due(done, config.save_every),
        stop=stop,
    )
