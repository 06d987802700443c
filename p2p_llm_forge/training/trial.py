"""How fast a rank computes: a model takes a few updates by a clock, and is thrown away."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from typing import Any

from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.model.build import recompute_activations
from p2p_llm_forge.model.dropout import add_dropout
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.model.optimizer import build_optimizer
from p2p_llm_forge.peers.rank_failure import is_out_of_memory
from p2p_llm_forge.training.balance import device_clock
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.learner import first_micro_batch, new_model
from p2p_llm_forge.training.micro_batch import give_back, measured_memory, refuse_one_block
from p2p_llm_forge.training.numbers import active_parameters

# Of the time of --minutes, what trials may take: all that there are, and one of several.
ALL_TRIALS, ONE_TRIAL = 0.1, 0.025
OF_ONE_BLOCK, FEWEST = 2, 3  # micro-batches: the first makes buffers, and the last are timed
FEWEST_UPDATES = 3
START_S = 3.0  # of a first micro-batch, that need not be the model's


def new_trial(job: Job, blocks: Blocks, most_s: float = math.inf) -> Trial:
    """Of the model that a run of this job begins with."""
    lm = new_model(job)
    add_dropout(lm, job.config.dropout or 0)
    return Trial(job, lm, blocks, most_s)


def take_turns(trials: Sequence[Trial], least_s: float, enough: float = math.inf) -> None:
    """Run all, for `least_s` together or `enough` times each, as far as their own time goes.

    They take turns, so that all are measured while the machine is equally busy.
    """
    turns = 0
    while running := [one for one in trials if one.may_run()]:
        for trial in running:
            trial.run()
        turns += 1
        is_long = turns >= enough or sum(one.spent_s for one in trials) >= least_s
        if is_long and all(one.has_enough() for one in running):
            break


class Trial:
    """A model that takes a few updates to be timed, and is thrown away. Needs no other rank.

    It begins with one block at a time, and goes on with as many as the run would take, or as there
    is time and memory for. lm: as the run would train it; most_s: about what all may take.
    """

    def __init__(self, job: Job, lm: Any, blocks: Blocks, most_s: float = math.inf) -> None:
        if job.config.gradient_checkpointing:
            recompute_activations(lm)
        self._job, self._blocks, self._most_s = job, blocks, most_s
        self._model = NextTokenLoss(lm.to(job.cluster.device), job.document_end).train()
        self._optimizer = build_optimizer(job.config, lm)
        products = active_parameters(lm)  # None: how many experts a token takes is not known
        self.parameters = int(products or sum(p.numel() for p in lm.parameters()))
        self.trained = sum(p.numel() for p in lm.parameters() if p.requires_grad)
        self.spent_s = self._last_s = 0.0  # by all micro-batches and updates, and by the last ones
        self._forwards_s: list[float] = []  # of as many blocks as now
        self._updates_s: list[float] = []
        self._token_s_before = math.nan  # with another number of blocks
        self._most_blocks, self._is_grown = min(job.plan.micro_batch_size, len(blocks)), False
        self._take(1)

    def may_run(self) -> bool:
        """Whether there is time for one more micro-batch like the last.

        The very first starts libraries, too: where that is what took long, there is a second.
        """
        is_start = len(self._updates_s) == 1 and self.spent_s <= START_S
        return is_start or self.spent_s + self._last_s <= self._most_s

    def has_enough(self) -> bool:
        """Whether the figures are no longer those of the beginning."""
        return self._is_grown and len(self._forwards_s) >= FEWEST

    def run(self) -> None:
        """One more micro-batch, and an update after each of the first.

        With --micro-batch-size auto half as many blocks where memory is too small. Raises
        ForgeError, saying what would fit, where it is too small for one.
        """
        if not self._is_grown and len(self._forwards_s) == OF_ONE_BLOCK:
            self._grow()
        is_too_large = False
        try:
            self._last_s = self._micro_batch_and_update()
        except Exception as error:
            is_too_large = self._job.config.micro_batch_size == "auto" and is_out_of_memory(error)
            if not is_too_large:
                raise
        if is_too_large:  # the error holds what has failed no more
            self._go_smaller()
        self.spent_s += self._last_s

    def figures(self) -> list[float]:
        """Seconds of a token and of an update; the first of each makes buffers and moments."""
        return [self._token_s(), min(self._updates_s[1:] or self._updates_s)]

    def _token_s(self) -> float:
        """With as many blocks at a time as last, or as before where those have not run yet."""
        if not self._forwards_s:
            return self._token_s_before
        return median(self._forwards_s[1:] or self._forwards_s) / self._batch.targets.numel()

    def _take(self, blocks: int) -> None:
        """That many in a micro-batch from now on."""
        self._token_s_before = self._token_s()
        self._batch = first_micro_batch(self._job, self._blocks, blocks)
        self._forwards_s = []

    def _grow(self) -> None:
        """As many blocks as the run would take, as far as time and memory go."""
        self._is_grown, block_s = True, max(min(self._forwards_s), 1e-9)

        def affordable() -> int:
            return int(min(self._most_blocks, (self._most_s - self.spent_s) / (FEWEST * block_s)))

        if affordable() > 1 and self._job.config.micro_batch_size == "auto":
            self.spent_s += seconds(self._look_at_memory)
        if affordable() > 1:
            self._take(affordable())

    def _look_at_memory(self) -> None:
        memory = measured_memory(self._job, self._model, moments=0)  # an update has made them
        self._most_blocks = min(self._most_blocks, memory.blocks_that_fit())

    def _go_smaller(self) -> None:
        blocks = len(self._batch.inputs)
        give_back(self._model)
        if blocks > 1:
            self._take(-(-blocks // 2))
        else:
            self._optimizer.state.clear()
            seen = replace(measured_memory(self._job, self._model), seen=0)
            refuse_one_block(self._job, self._model, seen)

    def _micro_batch_and_update(self) -> float:
        """Its seconds."""
        self._forwards_s.append(seconds(self._micro_batch))
        if len(self._updates_s) == FEWEST_UPDATES:
            return self._forwards_s[-1]
        self._updates_s.append(seconds(self._update))
        return self._forwards_s[-1] + self._updates_s[-1]

    def _micro_batch(self) -> None:
        with self._job.cluster.accelerator.autocast():
            nats, _ = self._model(*self._batch)
        (nats / self._batch.targets.numel()).backward()

    def _update(self) -> None:
        self._optimizer.step()
        self._optimizer.zero_grad()


def seconds(act: Callable[[], object]) -> float:
    """How long `act` takes, with all that it leaves to a device."""
    began = device_clock()
    act()
    return device_clock() - began
