"""What each strategy of agreeing on weights offers the loop, which does not know which one runs.

Strategies: gradients averaged in every update (ddp.py), or rounds in which every rank trains alone,
each ended by an exchange of how far the ranks have moved (diloco.py).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from p2p_llm_forge.shapes import is_count, is_flag, is_number, require_shape


@dataclass(frozen=True)
class Replica:
    """What a strategy keeps in step with the other ranks: this rank's copy of what is trained."""

    model: Any  # as Accelerate wraps it
    lm: Any  # the causal LM in it
    optimizer: Any
    total_steps: int  # updates of the whole run
    steps_done: int = 0  # updates taken before, by the run that is resumed
    tokens_per_update: float = math.inf  # of all ranks together


# What helps against values that are not finite, whoever finds them.
STAY_FINITE = (
    "lower --learning-rate and use --resume auto; if they come again, also raise --warmup-steps or"
    " set --max-grad-norm 1"
)


@dataclass(frozen=True)
class Discarded:
    """Updates of a round that all ranks have given up."""

    round: int  # from 1
    updates: range  # their numbers, from 1
    ranks: list[int]  # whose weights were not finite; none: what they agreed on was not

    def in_words(self) -> str:
        """What has happened, for the person who watches."""
        where = f"on rank {', '.join(map(str, self.ranks))}" if self.ranks else "where they met"
        return (
            f"round {self.round} is discarded: weights became NaN or infinite {where}; all ranks"
            f" are back at what they agreed on before, and updates {self.updates.start} to"
            f" {self.updates.stop - 1} do not count"
        )


@dataclass
class SyncReport:
    """What an update has cost in communication, or what all so far have that were added."""

    bytes_sent: int = 0  # payload that left this rank
    seconds: float = 0.0  # in which this rank waited for it
    discarded: Discarded | None = None  # the same on every rank

    def add(self, other: SyncReport) -> None:
        self.bytes_sent += other.bytes_sent
        self.seconds += other.seconds

    def figures(self, spent_s: float, updates: int) -> dict[str, Any]:
        """Fraction of the time, and bytes, of so many updates."""
        return {
            "communication": self.seconds / spent_s,
            "bytes_sent_per_update": self.bytes_sent / updates,
        }


@dataclass(frozen=True)
class SyncState:
    """What a checkpoint holds of a strategy, beside the agreed weights. Tensors on the CPU."""

    facts: dict[str, Any] = field(default_factory=dict)  # JSON, the same on every rank
    shared: dict[str, torch.Tensor] = field(default_factory=dict)  # the same on every rank
    own: dict[str, torch.Tensor] = field(default_factory=dict)  # of this rank


@dataclass(frozen=True)
class SavedSync:
    """What a checkpoint holds of a strategy, perhaps of another one or of other ranks."""

    facts: dict[str, Any]  # SyncState's, and the strategy's settings
    shared: dict[str, torch.Tensor]
    own_of: Callable[[int], dict[str, torch.Tensor]]  # of a rank of the saved run

    @property
    def world_size(self) -> int:
        """How many ranks have something of their own in it."""
        return int(self.facts.get("ranks", 0))

    @property
    def is_agreed(self) -> bool:
        """Whether all ranks held the same weights."""
        return bool(self.facts.get("is_agreed", True))

    def is_of(self, sync: Sync) -> bool:
        """Whether ranks kept something of their own by the same strategy."""
        return self.world_size > 0 and self.facts["settings"]["sync"] == sync.settings()["sync"]


# The facts of DiLoCo in a checkpoint, as `files.require_shape` takes it.
FACTS_OF_ROUNDS = {
    "settings": {"sync_every": is_count, "fragments": is_count, "overlap_steps": is_count},
    **dict.fromkeys(("is_agreed", "is_warming_up"), is_flag),
    **dict.fromkeys(("ranks", "bad_rounds", "warmup_steps"), is_count),
    **dict.fromkeys(("sent_at", "lands_at"), [is_count]),
    "outer": [[is_number]],
}


def require_facts(facts: Any) -> None:
    """Raise ValueError unless a checkpoint's facts are those of a strategy."""
    of_powersgd = dict.fromkeys(("powersgd_updates", "powersgd_rank"), (None, is_count))
    of_any = {"settings": {"sync": str}, "ranks": (None, is_count), "is_agreed": (None, is_flag)}
    require_shape(facts, of_any | of_powersgd, "sync")
    if ("powersgd_updates" in facts) != ("powersgd_rank" in facts):
        raise ValueError("of PowerSGD it holds a part only")
    if facts["settings"]["sync"] == "diloco":
        require_shape(facts, FACTS_OF_ROUNDS, "sync")
        fragments = facts["settings"]["fragments"]
        require_shape(facts, {"agreed_at": (None, [is_count])}, "sync")
        lists = [facts[key] for key in ("sent_at", "lands_at", "outer")]
        lists.append(facts.get("agreed_at") or lists[0])  # earlier versions did not keep it
        are_pairs = all(len(pair) == 2 for pair in facts["outer"])
        if {len(one) for one in lists} != {fragments} or not are_pairs:
            raise ValueError(f"it does not hold the rounds of {fragments} fragments")


class Sync(Protocol):
    """A strategy. All ranks call `after_update` after every update, and `state` together.

    What is done here suits those that keep the ranks' weights the same in every update.
    """

    has_own_state: bool  # whether ranks hold what others do not: checkpoints take a file of each
    trains_alone: bool = False  # whether optimizer states are among that
    rounds_begin_after: float = math.inf  # updates; weights that become NaN roll back from then on

    def context(self, is_last_micro_batch: bool) -> AbstractContextManager[Any]:
        """What forward and backward of a micro-batch run in."""

    def priming(self) -> AbstractContextManager[None]:
        """What a backward runs in whose gradients are thrown away."""

    def loss_scale(self, own_tokens: int, tokens_per_update: int) -> float:
        """By what a summed loss (nats) is multiplied before its backward."""

    def after_update(self, step: int, own_tokens: int) -> SyncReport:
        """Exchange what is due after update `step` (from 0) on `own_tokens` tokens of this rank."""

    def is_sync_point(self, done: int) -> bool:
        """Whether all ranks wait for each other after `done` updates, so that asking is cheap."""
        return True

    def end_after(self, total_steps: int) -> None:
        """The run is to end after so many updates, which are more than were taken."""
        return None

    def settings(self) -> dict[str, Any]:
        """The flags, as JSON, that must be the same where a round is resumed in its middle."""

    def give_up_round(self, ranks: list[int]) -> Discarded | None:
        """Undo a round whose weights are not finite on `ranks`; None where none can be undone.

        All ranks must call. Raises ForgeError when that has helped too often.
        """
        return None

    def agreed_weights(self) -> AbstractContextManager[None]:
        """Put the weights that all ranks agree on into the model, for as long as it is entered."""
        return nullcontext()

    def state(self) -> SyncState: ...

    def load_state(self, saved: SavedSync) -> None: ...
