"""Rounds of updates that every rank takes alone, each ended by one exchange: DiLoCo."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager
from typing import Any

import torch
from torch import Tensor

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.channel import Channel
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.plausible import entry, require_numbers
from p2p_llm_forge.sync import outer
from p2p_llm_forge.sync.base import (
    STAY_FINITE,
    Discarded,
    Replica,
    SavedSync,
    Sync,
    SyncReport,
    SyncState,
)
from p2p_llm_forge.sync.compress import CODECS, Codec
from p2p_llm_forge.sync.compressed_allreduce import (
    CompressedAllReduce,
    is_finite,
    joined_by_name,
    redistributed_residuals,
    split_by_name,
)
from p2p_llm_forge.sync.ddp import GradientAveraging

BAD_ROUNDS_IN_A_ROW = 3  # until the run ends
MOMENTUM, PSEUDO_GRADIENT = "momentum.", "pseudo_gradient."  # and the parameter's name
WEIGHTS, WEIGHTS_SENT = "weights.", "weights_sent."


class Fragment:
    """A part of the model that is synchronised at one moment. Tensors: flat float32, on the CPU."""

    def __init__(self, parameters: outer.Unit, channel: Channel, codec: Codec) -> None:
        self.parameters = parameters
        self.parts = [(name, parameter.numel()) for name, parameter in parameters]
        self.reduction = CompressedAllReduce(channel, codec, self.parts)
        self.anchor = self.weights()  # what all ranks agreed on last
        self.momentum_buffer: Tensor | None = None
        self.tokens = 0  # that this rank has trained on since
        self.token_weight = 1.0  # of this rank, of all ranks' tokens
        self.pseudo_gradient: Future[Tensor] | None = None  # of all ranks, on its way
        self.weights_sent = self.anchor  # this rank's weights when it was sent
        self.sent_at = self.lands_at = 0  # updates done when it was sent, and when it is applied
        self.agreed_at = 0  # updates done that the anchor holds, or that are given up
        self.outer = (1.0, 0.0)  # rate and momentum of the step that it is for

    def weights(self) -> Tensor:
        """A copy of this rank's weights."""
        return torch.cat([p.detach().flatten().float().cpu() for _, p in self.parameters])

    def put(self, weights: Tensor) -> None:
        """Write weights into the model."""
        parts = weights.split([size for _, size in self.parts])
        for (_, parameter), part in zip(self.parameters, parts, strict=True):
            parameter.data.copy_(part.view_as(parameter))

    def take_outer_step(self) -> bool:
        """The outer step with the pseudo-gradient that has arrived; False if it is not finite.

        All ranks compute it on the same bits, so it is finite on all or on none.
        """
        assert self.pseudo_gradient is not None
        gradient, self.pseudo_gradient = self.pseudo_gradient.result(), None
        anchor, buffer = outer.outer_step(self.anchor, gradient, self.momentum_buffer, *self.outer)
        if not is_finite(anchor):
            self.reduction.drop_residuals()
            return False
        self.anchor, self.momentum_buffer, self.agreed_at = anchor, buffer, self.sent_at
        return True

    def resume_round(self, saved: SavedSync, own: dict[str, Tensor], number: int) -> None:
        """Put it where fragment `number` of the checkpoint was in its round."""
        self.tokens = int(own["tokens"][number])
        self.agreed_at = (saved.facts.get("agreed_at") or saved.facts["sent_at"])[number]
        if not saved.is_agreed:
            self.put(joined_by_name(own, WEIGHTS, self.parts))
        self.sent_at, self.lands_at = (saved.facts[key][number] for key in ("sent_at", "lands_at"))
        if self.lands_at:
            self.weights_sent = joined_by_name(own, WEIGHTS_SENT, self.parts)
            self.receive_saved(saved, number)

    def receive_saved(self, saved: SavedSync, number: int) -> None:
        """The pseudo-gradient that was on its way, as arrived; number: as in `resume_round`."""
        self.outer = tuple(saved.facts["outer"][number])
        self.pseudo_gradient = Future()
        self.pseudo_gradient.set_result(joined_by_name(saved.shared, PSEUDO_GRADIENT, self.parts))


class DiLoCo(Sync):
    """Rounds of `--sync-every` updates that every rank takes alone, each ended by an outer step.

    DiLoCo, arXiv 2311.08105 (and OpenDiLoCo, arXiv 2407.07852): the ranks' pseudo-gradients
    (weights agreed on last minus weights now) are averaged by the tokens they were trained on, and
    an outer SGD with Nesterov momentum takes the average as its gradient. A round is all or
    nothing: unless every rank's weights are finite, all roll back to those they agreed on last.

    With `--fragments` one part of the layers is synchronised at a time, and with `--overlap-steps`
    training continues while the pseudo-gradient travels (Streaming DiLoCo, arXiv 2501.18512). The
    outer step is then added to the weights that the rank has by then, so its updates meanwhile
    count in the next round.
    """

    has_own_state = trains_alone = True

    def __init__(self, config: TrainConfig, cluster: Cluster, replica: Replica) -> None:
        """Raises ForgeError where the model has fewer parts than `--fragments`."""
        self._cluster, self._config, self._optimizer = cluster, config, replica.optimizer
        self._every = config.round_length()
        asked = config.outer_lr, config.outer_momentum
        self._outer = outer.settings_of_rounds(
            *asked, cluster.world_size, self._every, config.optimizer
        )
        self.rounds_begin_after: int = config.ddp_warmup_steps
        self._total, self._done = replica.total_steps, replica.steps_done
        self._most_tokens = self._every * replica.tokens_per_update  # of a rank in a round
        self._warmup = GradientAveraging(cluster, replica.model, CODECS["none"])
        self._channel = cluster.open_channel()
        units = outer.units_of(replica.lm)
        sizes = [sum(p.numel() for _, p in unit) for unit in units]
        self._fragments = []
        for numbers in outer.fragments_of(sizes, config.fragments):
            parameters = [entry for number in numbers for entry in units[number]]
            self._fragments.append(Fragment(parameters, self._channel, CODECS[config.compress]))
        self._bytes_before = 0
        self._bad_rounds = 0  # in a row
        self._discarded: Discarded | None = None  # since the last report

    def context(self, is_last_micro_batch: bool) -> AbstractContextManager[Any]:
        """No gradient is exchanged after the warm-up."""
        return self._warmup.context(is_last_micro_batch and self._done < self.rounds_begin_after)

    def priming(self) -> AbstractContextManager[None]:
        return self._warmup.priming()

    def loss_scale(self, own_tokens: int, tokens_per_update: int) -> float:
        """The mean over the tokens of this rank alone, but for the warm-up."""
        if self._done < self.rounds_begin_after:
            return self._warmup.loss_scale(own_tokens, tokens_per_update)
        return 1 / own_tokens

    def after_update(self, step: int, own_tokens: int) -> SyncReport:
        """Apply what lands now, send what is due; after the last update all at once."""
        self._done = done = step + 1
        if done <= self.rounds_begin_after:
            if done == self.rounds_begin_after:
                self._set_anchors()
            return self._warmup.after_update(step, own_tokens)
        for fragment in self._fragments:
            fragment.tokens += own_tokens
        is_last = done == self._total
        waited = sum(
            self._land(fragment)
            for fragment in self._fragments
            if fragment.pseudo_gradient and (is_last or fragment.lands_at == done)
        )
        due = self._due(done)
        if due and self._all_finite(due):
            for fragment in due:
                self._send(fragment, done + (0 if is_last else self._config.overlap_steps))
            waited += sum(self._land(f) for f in due if f.pseudo_gradient and f.lands_at == done)
        sent = self._channel.bytes_sent - self._bytes_before
        self._bytes_before += sent
        discarded, self._discarded = self._discarded, None
        return SyncReport(sent, waited, discarded)

    def _due(self, done: int) -> list[Fragment]:
        fragments = self._fragments
        numbers = outer.fragment_due(done, self._every, len(fragments))
        return fragments if done == self._total else [fragments[number] for number in numbers]

    def _all_finite(self, due: list[Fragment]) -> bool:
        """Whether the round may be sent; else every rank rolls back."""
        own = {
            "is_finite": all(is_finite(fragment.weights()) for fragment in due),
            "tokens": [fragment.tokens for fragment in due],
        }
        # Over the store: it waits for as long as a slow rank that lives needs.
        by_rank = self._cluster.gather_facts(own)
        for number, fragment in enumerate(due):
            # What a rank says here decides how much its weights count. All have none after a
            # roll-back.
            tokens = [entry(facts.get("tokens"), number) for facts in by_rank]
            what = "the tokens that it trained on are"
            least = min(1, fragment.tokens)
            require_numbers(what, tokens, least, self._most_tokens, are_whole=True)
            fragment.token_weight = fragment.tokens / (sum(tokens) or 1)
        bad = [rank for rank, facts in enumerate(by_rank) if facts.get("is_finite") is not True]
        if bad:
            self._give_up(bad)
        else:
            self._bad_rounds = 0
        return not bad

    def _give_up(self, bad: list[int]) -> None:
        """Roll back for ranks with bad weights. Raises ForgeError when that has helped too often.

        Then, too, the ranks are back at what they agreed on.
        """
        self._bad_rounds += 1
        if self._bad_rounds == BAD_ROUNDS_IN_A_ROW:
            raise ForgeError(
                f"weights became NaN or infinite in {self._bad_rounds} rounds in a row (now on rank"
                f" {bad[0]}); earlier checkpoints are untouched",
                STAY_FINITE,
            )
        self._roll_back(bad)

    def give_up_round(self, ranks: list[int]) -> Discarded | None:
        if self._done <= self.rounds_begin_after or self.is_agreed():
            return None
        self._give_up(ranks)
        discarded, self._discarded = self._discarded, None
        return discarded

    def _send(self, fragment: Fragment, lands_at: int) -> None:
        config = self._config
        fragment.weights_sent = fragment.weights()
        fragment.sent_at, fragment.lands_at = self._done, lands_at
        rounds_done = max(0, self._done - 1 - self.rounds_begin_after) // self._every
        fragment.outer = outer.outer_settings(rounds_done, *self._outer, config.outer_warmup_rounds)
        own = (fragment.anchor - fragment.weights_sent).mul_(fragment.token_weight)
        fragment.tokens = 0
        fragment.pseudo_gradient = self._channel.in_background(
            lambda: fragment.reduction.begin(own), fragment.reduction.finish
        )

    def _land(self, fragment: Fragment) -> float:
        """Take the outer step with what was sent. Returns the seconds that it waited."""
        assert fragment.pseudo_gradient is not None
        began = time.perf_counter()
        fragment.pseudo_gradient.result()
        waited = time.perf_counter() - began
        if not fragment.take_outer_step():
            self._roll_back([])
        elif fragment.sent_at == self._done:
            fragment.put(fragment.anchor)
        else:
            fragment.put(fragment.weights() + (fragment.anchor - fragment.weights_sent))
        return waited

    def _roll_back(self, bad: list[int]) -> None:
        """Give up the updates since the last agreement, on all ranks. bad: ranks at fault."""
        for fragment in self._fragments:
            if fragment.pseudo_gradient:
                fragment.take_outer_step()
            fragment.put(fragment.anchor)
            fragment.tokens = 0
        # With fragments, updates that one of them holds count.
        kept = max(fragment.agreed_at for fragment in self._fragments)
        for fragment in self._fragments:
            fragment.agreed_at = self._done
        number = (self._done - 1 - self.rounds_begin_after) // self._every + 1
        self._discarded = Discarded(number, range(kept + 1, self._done + 1), bad)
        entries = [entry for one in self._optimizer.state.values() for entry in one.values()]
        if not all(is_finite(entry) for entry in entries if isinstance(entry, Tensor)):
            self._optimizer.state.clear()

    def _set_anchors(self) -> None:
        """Take the weights, which are the same on all ranks, as agreed on.

        Raises ForgeError where they are not finite: no round could roll back to them.
        """
        for fragment in self._fragments:
            fragment.anchor, fragment.agreed_at = fragment.weights(), self._done
        if not all(is_finite(fragment.anchor) for fragment in self._fragments):
            raise ForgeError(
                f"weights became NaN or infinite in the first {self._done} updates; nothing was"
                " saved after it and earlier checkpoints are untouched",
                STAY_FINITE,
            )

    def is_sync_point(self, done: int) -> bool:
        return done <= self.rounds_begin_after or bool(self._due(done))

    def end_after(self, total_steps: int) -> None:
        self._total = total_steps

    def is_agreed(self) -> bool:
        """Whether nobody has trained alone since the last agreement."""
        return not any(fragment.tokens or fragment.pseudo_gradient for fragment in self._fragments)

    @contextlib.contextmanager
    def agreed_weights(self) -> Iterator[None]:
        own = [] if self.is_agreed() else [(one, one.weights()) for one in self._fragments]
        for fragment, _ in own:
            fragment.put(fragment.anchor)
        try:
            yield
        finally:
            for fragment, weights in own:
                fragment.put(weights)

    def state(self) -> SyncState:
        """The momentum, and of each rank what it has done alone. Waits for what is sent."""
        fragments, is_agreed = self._fragments, self.is_agreed()
        shared: dict[str, Tensor] = {}
        own = {"tokens": torch.tensor([fragment.tokens for fragment in fragments])}
        for fragment in fragments:
            parts = fragment.parts
            if fragment.pseudo_gradient:
                gradient = fragment.pseudo_gradient.result()  # the exchange changes the residuals
                shared |= split_by_name(gradient, PSEUDO_GRADIENT, parts)
                own |= split_by_name(fragment.weights_sent, WEIGHTS_SENT, parts)
            if fragment.momentum_buffer is not None:
                shared |= split_by_name(fragment.momentum_buffer, MOMENTUM, parts)
            own |= fragment.reduction.residuals()
            if not is_agreed:
                own |= split_by_name(fragment.weights(), WEIGHTS, parts)
        facts = {
            "is_agreed": is_agreed,
            "ranks": self._cluster.world_size,
            "bad_rounds": self._bad_rounds,
            "is_warming_up": self._done <= self.rounds_begin_after,
            "warmup_steps": self.rounds_begin_after,
            "sent_at": [fragment.sent_at for fragment in fragments],
            "lands_at": [f.lands_at if f.pseudo_gradient else 0 for f in fragments],
            "outer": [fragment.outer for fragment in fragments],
            "agreed_at": [fragment.agreed_at for fragment in fragments],
        }
        return SyncState(facts, shared, own)

    def settings(self) -> dict[str, Any]:
        return {
            "sync": "diloco",
            "sync_every": self._every,
            "fragments": len(self._fragments),
            "overlap_steps": self._config.overlap_steps,
        }

    def load_state(self, saved: SavedSync) -> None:
        """See `state`. The weights in the model are those that all agree on.

        Other ranks than those that were saved resume from there, after a pseudo-gradient that was
        on its way. A warm-up is over where rounds have begun: ranks that have trained alone have
        other moments.
        """
        self._set_anchors()
        if not saved.is_of(self):
            return
        if not saved.facts["is_warming_up"]:
            self.rounds_begin_after = saved.facts["warmup_steps"]
        self._bad_rounds = saved.facts["bad_rounds"]
        rank, world_size = self._cluster.rank, self._cluster.world_size
        is_same = saved.facts["settings"] == self.settings() and saved.world_size == world_size
        own = saved.own_of(rank) if is_same else redistributed_residuals(saved, rank, world_size)
        for number, fragment in enumerate(self._fragments):
            fragment.reduction.restore(own)
            if any(key.startswith(MOMENTUM) for key in saved.shared):
                fragment.momentum_buffer = joined_by_name(saved.shared, MOMENTUM, fragment.parts)
            if is_same:
                fragment.resume_round(saved, own, number)
            elif any(saved.facts["lands_at"]):  # the pseudo-gradient of the whole model
                fragment.receive_saved(saved, number=0)
                if fragment.take_outer_step():
                    fragment.put(fragment.anchor)
