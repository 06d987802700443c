"""Rounds of updates that every rank takes alone, each ended by one exchange: DiLoCo."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.sync.base import SavedSync, SyncReport, SyncState, units_of
from p2p_llm_forge.sync.compress import CODECS
from p2p_llm_forge.sync.compressed_allreduce import (
    Averager,
    dealt_out,
    is_finite,
    joined,
    split_by_name,
)
from p2p_llm_forge.sync.ddp import AllReduce
from p2p_llm_forge.sync.outer import (
    fragment_due,
    fragments_of,
    outer_lr_of,
    outer_settings,
    outer_step,
)

LOST_ROUNDS_IN_A_ROW = 3  # until the run ends


class Fragment:
    """A part of the model that is synchronised at one moment. Tensors: flat float32, on the CPU."""

    def __init__(self, parameters: list[tuple[str, torch.nn.Parameter]], averager: Averager):
        self.parameters = parameters
        self.parts = [(name, parameter.numel()) for name, parameter in parameters]
        self.averager = averager
        self.anchor = self.weights()  # what all ranks agreed on last
        self.velocity: torch.Tensor | None = None
        self.tokens = 0  # that this rank has trained on since
        self.share = 1.0  # of this rank, of all ranks' tokens
        self.move: Future[torch.Tensor] | None = None  # of all ranks, on its way
        self.start = self.anchor  # this rank's weights when it was sent
        self.sent_at = self.lands_at = 0  # updates done when it was sent, and when it is applied
        self.outer = (1.0, 0.0)  # rate and momentum of the step that it is for

    def weights(self) -> torch.Tensor:
        """A copy of this rank's weights."""
        return torch.cat([p.detach().flatten().float().cpu() for _, p in self.parameters])

    def put(self, weights: torch.Tensor) -> None:
        """Write weights into the model."""
        parts = weights.split([size for _, size in self.parts])
        for (_, parameter), part in zip(self.parameters, parts, strict=True):
            parameter.data.copy_(part.view_as(parameter))


class DiLoCo:
    """Rounds of `--sync-every` updates that every rank takes alone, each ended by an outer step.

    DiLoCo, arXiv 2311.08105 (and OpenDiLoCo, arXiv 2407.07852): the peers' moves (weights agreed on
    last minus weights now) are averaged by the tokens they were trained on, and an outer SGD with
    Nesterov momentum takes the average as its gradient. A round is all or nothing: unless every
    rank's move is finite, all go back to the weights they agreed on last.

    With `--fragments` one part of the layers is synchronised at a time, and with `--overlap-steps`
    training goes on while the move travels (Streaming DiLoCo, arXiv 2501.18512). The outer step is
    then added to the weights that the rank has by then, so its updates meanwhile count in the next
    round.
    """

    has_own_state = trains_alone = True

    def __init__(
        self,
        config: TrainConfig,
        cluster: Cluster,
        model: Any,
        lm: Any,
        optimizer: Any,
        total: int,
        done: int,
    ) -> None:
        self._cluster, self._config, self._optimizer = cluster, config, optimizer
        self._every = config.round_length()
        self._outer_lr = outer_lr_of(config.outer_lr, cluster.world_size)
        self._warmup, self._total, self._done = config.ddp_warmup_steps, total, done
        self._warm = AllReduce(cluster, model, CODECS["none"])
        self._channel = cluster.open_channel()
        codec = CODECS[config.compress]
        units = units_of(lm)
        if config.fragments > len(units):
            raise ForgeError(
                f"--fragments {config.fragments} was asked, but this model has {len(units)} parts"
                f" (its layers, and what lies before and behind): use {len(units)} or fewer"
            )
        sizes = [sum(p.numel() for _, p in unit) for unit in units]
        self._fragments = []
        for numbers in fragments_of(sizes, config.fragments):
            parameters = [entry for number in numbers for entry in units[number]]
            count = sum(p.numel() for _, p in parameters)
            self._fragments.append(Fragment(parameters, Averager(self._channel, codec, count)))
        self._bytes_before = 0
        self._lost_rounds = 0  # in a row

    @property
    def loses_rounds_after(self) -> float:
        """See `Sync`: in the warm-up there is nothing to go back to."""
        return self._warmup

    def context(self, is_last_micro_batch: bool) -> AbstractContextManager[Any]:
        """No gradient is exchanged after the warm-up."""
        if self._cluster.world_size == 1:
            return nullcontext()
        return self._warm.context(is_last_micro_batch and self._done < self._warmup)

    def priming(self) -> AbstractContextManager[None]:
        """See `AllReduce.priming`."""
        return self._warm.priming()

    def loss_scale(self, own_tokens: int, tokens_per_update: int) -> float:
        """The mean over the tokens of this rank alone, but for the warm-up."""
        if self._done < self._warmup:
            return self._warm.loss_scale(own_tokens, tokens_per_update)
        return 1 / own_tokens

    def after_update(self, step: int, own_tokens: int) -> SyncReport:
        """Apply the move that lands now, send that which is due. All at once after the last."""
        self._done = done = step + 1
        if done <= self._warmup:
            if done == self._warmup:
                self._agree()
            return self._warm.after_update(step, own_tokens)
        for fragment in self._fragments:
            fragment.tokens += own_tokens
        is_last = done == self._total
        waited = sum(
            self._land(fragment)
            for fragment in self._fragments
            if fragment.move and (is_last or fragment.lands_at == done)
        )
        due = self._due(done)
        if due and self._all_finite(due):
            for fragment in due:
                self._send(fragment, done + (0 if is_last else self._config.overlap_steps))
            waited += sum(self._land(f) for f in due if f.move and f.lands_at == done)
        sent = self._channel.bytes_sent - self._bytes_before
        self._bytes_before += sent
        return SyncReport(sent, waited, self._cluster.world_size)

    def _due(self, done: int) -> list[Fragment]:
        if done == self._total:
            return self._fragments
        numbers = fragment_due(done, self._every, len(self._fragments))
        return [self._fragments[number] for number in numbers]

    def _all_finite(self, due: list[Fragment]) -> bool:
        """Whether the round may go on; else every rank goes back. Waits for slower ranks."""
        are_finite = all(is_finite(fragment.weights()) for fragment in due)
        tokens = [fragment.tokens for fragment in due]
        # Over the store: it waits for as long as a slow rank that lives needs.
        told = self._cluster.gather_facts({"is_finite": are_finite, "tokens": tokens})
        for number, fragment in enumerate(due):
            fragment.share = fragment.tokens / sum(fact["tokens"][number] for fact in told)
        bad = [rank for rank, fact in enumerate(told) if not fact["is_finite"]]
        self._lost_rounds = self._lost_rounds + 1 if bad else 0
        if self._lost_rounds == LOST_ROUNDS_IN_A_ROW:
            raise ForgeError(
                f"weights became NaN or infinite in {LOST_ROUNDS_IN_A_ROW} rounds in a row (now on"
                f" rank {bad[0]}); earlier checkpoints are untouched. Lower --learning-rate, raise"
                " --warmup-steps or set --max-grad-norm 1, then go on with --resume auto"
            )
        if bad:
            self._go_back()
        return not bad

    def _send(self, fragment: Fragment, lands_at: int) -> None:
        fragment.start = fragment.weights()
        fragment.sent_at, fragment.lands_at = self._done, lands_at
        fragment.outer = self._outer_settings(self._done)
        move = (fragment.anchor - fragment.start).mul_(fragment.share)
        fragment.tokens = 0
        fragment.move = self._channel.in_background(
            lambda: fragment.averager.begin(move), fragment.averager.finish
        )

    def _land(self, fragment: Fragment) -> float:
        """Take the outer step with the move that was sent. Returns the seconds that it waited."""
        assert fragment.move is not None
        began = time.perf_counter()
        fragment.move.result()
        waited = time.perf_counter() - began
        before = fragment.start
        if not self._step(fragment):
            self._go_back()
        elif fragment.sent_at == self._done:
            fragment.put(fragment.anchor)
        else:
            fragment.put(fragment.weights() + (fragment.anchor - before))
        return waited

    def _step(self, fragment: Fragment) -> bool:
        """The outer step of a fragment whose move has arrived; False if its result is not finite.

        All ranks compute it on the same bits, so it is so on all or on none.
        """
        assert fragment.move is not None
        move, fragment.move = fragment.move.result(), None
        anchor, velocity = outer_step(fragment.anchor, move, fragment.velocity, *fragment.outer)
        if not is_finite(anchor):
            fragment.averager.forget()
            return False
        fragment.anchor, fragment.velocity = anchor, velocity
        return True

    def _go_back(self) -> None:
        """Give up the updates since the last agreement, on all ranks."""
        for fragment in self._fragments:
            if fragment.move:
                self._step(fragment)
            fragment.put(fragment.anchor)
            fragment.tokens = 0
        state = self._optimizer.state
        if not all(
            is_finite(value)
            for entries in state.values()
            for value in entries.values()
            if isinstance(value, torch.Tensor)
        ):
            state.clear()

    def _agree(self) -> None:
        """Take the weights, which are the same on all ranks, as agreed on.

        Raises ForgeError where they are not finite: no round could go back to them.
        """
        for fragment in self._fragments:
            fragment.anchor = fragment.weights()
        if not all(is_finite(fragment.anchor) for fragment in self._fragments):
            raise ForgeError(
                f"weights became NaN or infinite in the first {self._done} updates; nothing was"
                " saved after it and earlier checkpoints are untouched. Lower --learning-rate,"
                " raise --warmup-steps or set --max-grad-norm 1, then go on with --resume auto"
            )

    def _outer_settings(self, sent_at: int) -> tuple[float, float]:
        """Rate and momentum for a move that is sent after so many updates."""
        config = self._config
        rounds_done = max(0, sent_at - 1 - self._warmup) // self._every
        return outer_settings(
            rounds_done, self._outer_lr, config.outer_momentum, config.outer_warmup_rounds
        )

    def meets(self, done: int) -> bool:
        """The ranks wait for each other where something is sent."""
        return done <= self._warmup or bool(self._due(done))

    def is_agreed(self) -> bool:
        """Whether nobody has trained alone since the last agreement."""
        return not any(fragment.tokens or fragment.move for fragment in self._fragments)

    @contextlib.contextmanager
    def agreed_weights(self) -> Iterator[None]:
        """See `Sync`."""
        if self._done <= self._warmup or self.is_agreed():
            yield
            return
        own = [fragment.weights() for fragment in self._fragments]
        for fragment in self._fragments:
            fragment.put(fragment.anchor)
        try:
            yield
        finally:
            for fragment, weights in zip(self._fragments, own, strict=True):
                fragment.put(weights)

    def state(self) -> SyncState:
        """The velocity, and of each rank what it has done alone. Waits for what is sent."""
        fragments, is_agreed = self._fragments, self.is_agreed()
        for fragment in fragments:
            if fragment.move:
                fragment.move.result()  # the exchange changes what is owed
        shared: dict[str, torch.Tensor] = {}
        own = {"tokens": torch.tensor([fragment.tokens for fragment in fragments])}
        for fragment in fragments:
            if fragment.velocity is not None:
                shared |= split_by_name(fragment.velocity, "velocity.", fragment.parts)
            own |= fragment.averager.lost(fragment.parts)
            if not is_agreed:
                own |= split_by_name(fragment.weights(), "weights.", fragment.parts)
            if fragment.move:
                shared |= split_by_name(fragment.move.result(), "move.", fragment.parts)
                own |= split_by_name(fragment.start, "start.", fragment.parts)
        facts = {
            "is_agreed": is_agreed,
            "ranks": self._cluster.world_size,
            "lost_rounds": self._lost_rounds,
            "is_warming_up": self._done <= self._warmup,
            "warmup_steps": self._warmup,
            "sent_at": [fragment.sent_at for fragment in fragments],
            "lands_at": [fragment.lands_at if fragment.move else 0 for fragment in fragments],
            "outer": [fragment.outer for fragment in fragments],
        }
        # Parts of one flat tensor: the file format wants each to have memory of its own.
        return SyncState(
            facts,
            {key: tensor.clone() for key, tensor in shared.items()},
            {key: tensor.clone() for key, tensor in own.items()},
        )

    def settings(self) -> list[Any]:
        """What must be the same where a round is taken up in its middle."""
        return ["diloco", self._every, len(self._fragments), self._config.overlap_steps]

    def load_state(self, saved: SavedSync) -> None:
        """See `state`. The weights in the model are those that all agree on.

        Other ranks than those that were saved go on from there, after a move that was on its way. A
        warm-up is over where rounds have begun: ranks that have trained alone have other moments.
        """
        self._agree()
        if not saved.is_of(self):
            return
        if not saved.facts.get("is_warming_up", False):
            self._warmup = saved.facts["warmup_steps"]
        self._lost_rounds = saved.facts["lost_rounds"]
        is_same = (
            saved.facts["strategy"] == self.settings()
            and saved.world_size == self._cluster.world_size
        )
        own = saved.own_of(self._cluster.rank) if is_same else dealt_out(saved, self._cluster)
        for number, fragment in enumerate(self._fragments):
            fragment.averager.restore(own, fragment.parts)
            if any(key.startswith("velocity.") for key in saved.shared):
                fragment.velocity = joined(saved.shared, "velocity.", fragment.parts)
            if not is_same:
                self._land_for_all(fragment, saved)
                continue
            fragment.tokens = int(own["tokens"][number])
            if not saved.facts["is_agreed"]:
                fragment.put(joined(own, "weights.", fragment.parts))
            fragment.sent_at = saved.facts["sent_at"][number]
            fragment.lands_at = saved.facts["lands_at"][number]
            if fragment.lands_at:
                fragment.start = joined(own, "start.", fragment.parts)
                self._take_move(fragment, saved, number)

    def _land_for_all(self, fragment: Fragment, saved: SavedSync) -> None:
        """Take the outer step of the move that was on its way, if one was: of the whole model."""
        if not any(saved.facts["lands_at"]):
            return
        self._take_move(fragment, saved, number=0)
        if self._step(fragment):
            fragment.put(fragment.anchor)

    def _take_move(self, fragment: Fragment, saved: SavedSync, number: int) -> None:
        """Take over a move that was on its way; number: its fragment's in the checkpoint."""
        # Older checkpoints do not tell what the step is taken with.
        sent_at, told = saved.facts["sent_at"][number], saved.facts.get("outer")
        fragment.outer = tuple(told[number]) if told else self._outer_settings(sent_at)
        fragment.move = Future()
        fragment.move.set_result(joined(saved.shared, "move.", fragment.parts))
