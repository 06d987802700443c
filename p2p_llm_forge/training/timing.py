"""What a run with `--minutes` is to be: all peers are measured, then a model and a batch chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.model.shape import learning_rate_of
from p2p_llm_forge.model.sizes import is_size_given
from p2p_llm_forge.peers.links import measure_links
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.sync.forecast import Measured, Strategy, choose, forecast
from p2p_llm_forge.training import planner
from p2p_llm_forge.training.budget import FEWEST_UPDATES, Budget
from p2p_llm_forge.training.forecast import candidates, in_short_rounds, round_length_for
from p2p_llm_forge.training.job import Job, make_plan
from p2p_llm_forge.training.law import SAMPLE_BYTES, compressed_bits
from p2p_llm_forge.training.learner import text_spec_of
from p2p_llm_forge.training.planner import Choice, Text
from p2p_llm_forge.training.settle import begun_in, settle
from p2p_llm_forge.training.trial import ALL_TRIALS, ONE_TRIAL, new_trial, take_turns
from p2p_llm_forge.training.tuning import with_warmup

FIRST_GUESS = 1000  # updates of a run that resumes, until its checkpoint says how many
FIRST_DEPTHS, MORE_DEPTHS = (1, 4), 2  # that are measured, and how many more if it comes to that
MEASURING, LONGEST_MEASURING_S = 0.012, 3.0  # of the time at least, for one depth
WARMUP = 0.02  # of the updates
FEWEST_ROUNDS = 3  # of a run that is to end on time
KEPT = 0.06  # of the time, for the end, until that is known better


@dataclass(frozen=True)
class Measurement:
    """How fast one depth is trained: as measured on the slowest peer."""

    parameters: int  # that a token is multiplied by
    trained: int  # of them: what peers exchange
    token_s: float  # forward and backward of a token
    update_s: float  # of an update, beside those


def timed(asked: TrainConfig, job: Job, began: float) -> Job:
    """The job with what `--minutes` has time for. All ranks must call.

    asked: what was given; what was not is chosen, unless the run has begun. began: when this
    session did, by `time.monotonic`. Raises ForgeError where that is no time, or no text.
    """
    cluster, minutes = job.cluster, job.config.minutes
    assert minutes is not None
    if asked.model_name:  # on whose width its rate depends
        asked = replace(asked, learning_rate=job.config.learning_rate)
    budget = Budget(minutes * 60, began)
    begun = cluster.main_only(lambda: begun_in(asked))
    if begun and "warmup_steps" in begun:  # it has a checkpoint
        names = ("warmup_steps", "batch_size")
        given: dict[str, Any] = {name: getattr(asked, name) for name in names}
        chosen = {name: begun[name] if one is None else one for name, one in given.items()}
        if asked.sync == begun.get("sync") == "diloco":
            chosen["sync_every"] = asked.sync_every or begun.get("sync_every")
        config = replace(job.config, **chosen)
        plan = replace(make_plan(config, cluster, job.data), total_steps=FIRST_GUESS)
        return replace(job, config=config, plan=plan, budget=budget)
    if begun:  # and ended before it had saved anything: run.json holds what it was
        is_given = asked.batch_size or asked.gradient_accumulation_steps
        batch_size = asked.batch_size if is_given else job.plan.batch_size
        kept = ("model_type", "depth", "dropout")
        before: dict[str, Any] = {name: getattr(job.config, name) for name in kept}
        asked = replace(asked, batch_size=batch_size, **before)
    cluster.main_only(budget.require_start)
    return Planning(asked, job, budget).planned()


class Planning:
    """Chooses what a run is to be, on all ranks alike."""

    def __init__(self, asked: TrainConfig, job: Job, budget: Budget) -> None:
        self.asked, self.job, self.budget = asked, job, budget
        self.cluster = job.cluster
        self.blocks = self.cluster.together(job.data.train_blocks)
        self.text = self._text()
        planner.require_text(self.text)
        self.links = measure_links(self.cluster) if self.cluster.world_size > 1 else None
        self.is_model_given, self.is_loaded = is_size_given(asked), bool(asked.model_name)
        # Ranks may differ in these, and all must come to the same answers.
        own: list[float] = [self.cluster.device.type == "cpu", asked.micro_batch() or 1]
        own += [self.cluster.launch.room]
        on_cpus, micro_batches, rooms = zip(*self.cluster.gather_numbers(own), strict=True)
        require_numbers("its micro-batch is", micro_batches, are_whole=True)
        require_numbers("it makes room for processes", rooms, are_whole=True)
        self.is_on_cpu = any(on_cpus)
        self.micro_batch = math.lcm(*map(int, micro_batches))
        self.least_batch = int(max(rooms))

    def planned(self) -> Job:
        """The job as chosen. Raises ForgeError where the time is too short for it."""
        measured = self._measured()
        left_s, peers = self._left_s(), self.cluster.world_size
        chosen = self._choice(measured, left_s)
        self._require_time(chosen)
        twice = self._choice(measured, left_s + self.budget.seconds)
        with_peer = self._choice(measured, left_s, speedup=(peers + 1) / peers)
        self.budget.words = planner.in_words(chosen, twice, with_peer)
        records = planner.as_record([chosen, twice, with_peer])
        self.budget.plan = dict(zip(planner.CHOICES, records, strict=True))
        return self._job_of(chosen, self._most_tokens(chosen, measured))

    def _text(self) -> Text:
        manifest = self.job.data.manifest
        split = manifest.splits["train"]
        tokens = split.blocks * manifest.sequence_length

        def compressed() -> float:
            from transformers import AutoTokenizer

            tokenizer = AutoTokenizer.from_pretrained(text_spec_of(self.job.data).tokenizer_dir)
            per_block = max(1, split.bytes // max(1, split.blocks))
            numbers = range(min(len(self.blocks), -(-SAMPLE_BYTES // per_block)))
            _, targets = self.blocks.inputs_and_targets(numbers)
            learned = targets[targets >= 0]
            return compressed_bits(str(tokenizer.decode(learned.tolist())).encode())

        return Text(
            tokens,
            bytes_per_token=split.bytes / max(1, tokens),
            vocabulary=manifest.vocab_size,
            sequence_length=manifest.sequence_length,
            compressed=self.cluster.main_only(compressed),
        )

    def _left_s(self) -> float:
        """Seconds for updates, as rank 0 sees them."""
        (left_s,) = self.cluster.gather_numbers([self.budget.left_s])[0]
        return max(1.0, (1 - KEPT) * left_s)

    # --- measuring --------------------------------------------------------------------------------

    def _measured(self) -> dict[int, Measurement]:
        """By depth; 0 stands for a model that was given. A depth that is chosen is measured."""
        if self.is_model_given:
            return self._measure([0])
        measured = self._measure(FIRST_DEPTHS)
        for _ in range(MORE_DEPTHS):
            depth = self._choice(measured, self._left_s()).depth
            assert depth is not None
            if depth <= max(measured):
                break
            measured |= self._measure([depth])
        return measured

    def _config_at(self, depth: int) -> TrainConfig:
        return settle(replace(self.asked, depth=depth) if depth else self.asked)

    def _measure(self, depths: Sequence[int]) -> dict[int, Measurement]:
        """What depths take on the slowest peer. All ranks must call.

        As many micro-batches as there is time for: a slow peer may come to fewer than others.
        """
        jobs = [replace(self.job, config=self._config_at(depth)) for depth in depths]
        most_s = (ALL_TRIALS if self.is_model_given else ONE_TRIAL) * self.budget.seconds
        trials = self.cluster.together(
            lambda: [new_trial(job, self.blocks, most_s) for job in jobs]
        )
        least_s = min(LONGEST_MEASURING_S, MEASURING * self.budget.seconds) * len(depths)
        self.cluster.together(lambda: take_turns(trials, least_s))
        found = {}
        for depth, trial in zip(depths, trials, strict=True):
            by_rank = self.cluster.gather_numbers(trial.figures())
            for figures in zip(*by_rank, strict=True):
                require_numbers("it computes in seconds", figures)
            slowest = [max(figures) for figures in zip(*by_rank, strict=True)]
            found[depth] = Measurement(trial.parameters, trial.trained, *slowest)
        return found

    # --- what that comes to -----------------------------------------------------------------------

    def _choice(
        self, measured: dict[int, Measurement], seconds: float, speedup: float = 1.0
    ) -> Choice:
        """What suits so many seconds of updates, with peers that are `speedup` times as fast."""
        found = self._token_s(measured, seconds)
        token_s = {depth: one / speedup for depth, one in found.items()}
        if self.is_loaded:
            choice = planner.choice_of_loaded(token_s[0], self.text, seconds)
        elif self.is_model_given:
            size = measured[0].parameters
            choice = planner.choice_at(None, size, token_s[0], self.text, seconds)
        else:
            choice = planner.choose(token_s, self.text, seconds)
        return planner.in_updates(choice, self._update_tokens(choice.tokens), FEWEST_UPDATES)

    def _most_tokens(self, chosen: Choice, measured: dict[int, Measurement]) -> int:
        """What it may read where the run turns out to be faster."""
        if chosen.is_cut_short:
            return chosen.tokens
        if self.is_loaded:
            return planner.MOST_READINGS * self.text.tokens
        if chosen.depth is None:
            return planner.most_tokens(measured[0].parameters, self.text)
        return planner.most_tokens(planner.products(chosen.depth, self.text), self.text)

    def _token_s(self, measured: dict[int, Measurement], left_s: float) -> dict[int, float]:
        """Seconds of a token of all peers together, by depth."""
        peers, found = self.cluster.world_size, {}
        for depth, one in measured.items():
            tokens = self._update_tokens(int(peers * left_s / one.token_s))
            update_s = tokens / peers * one.token_s + one.update_s
            found[depth] = self._with_exchange(one, update_s, tokens, left_s) / tokens
        return found if self.is_model_given else planner.token_seconds(found, self.text)

    def _update_tokens(self, tokens: int) -> int:
        """Of the batch that is taken where so many are read."""
        if self.asked.batch_size or self.asked.gradient_accumulation_steps:
            return self.job.plan.tokens_per_update
        length, unit = self.text.sequence_length, self.cluster.world_size * self.micro_batch
        best, least = planner.update_tokens_for(tokens), self.least_batch
        return length * planner.batch_size_for(best, length, unit, least)

    def _with_exchange(
        self, one: Measurement, update_s: float, tokens: int, left_s: float
    ) -> float:
        """Seconds of an update and of what the peers exchange for it."""
        if self.links is None:
            return update_s
        latencies = self.links.latency_s
        measured = Measured(
            parameters=one.trained,
            update_s=update_s,
            tokens_per_update=tokens,
            peers=self.cluster.world_size,
            bytes_per_s=self.links.slowest()[2],
            latency_s=max(s for row in latencies for s in row if s == s),
            is_on_cpu=self.is_on_cpu,
        )
        for _ in range(2):  # rounds follow from the number of updates, and that from the rounds
            strategies = self._strategies(left_s / update_s)
            fastest = choose([forecast(strategy, measured) for strategy in strategies])
            update_s = tokens / fastest.tokens_per_s
        return update_s

    def _strategies(self, updates: float) -> list[Strategy]:
        """How the peers may agree in a run of so many updates."""
        config = self.job.config
        if config.sync == "auto":
            return candidates(self.job, updates)
        every = config.round_length() if config.sync == "diloco" else 0
        compress = "none" if config.compress == "powersgd" else config.compress
        asked = Strategy(config.sync, compress, every, config.fragments, config.overlap_steps)
        shorter = None if config.sync_every else in_short_rounds(self.job, asked, updates)
        return [shorter or asked]

    def _require_time(self, chosen: Choice) -> None:
        updates = min(FEWEST_UPDATES, chosen.updates)
        least_s = updates * chosen.seconds / chosen.updates
        self.cluster.main_only(lambda: self.budget.require_start(least_s, updates))

    def _job_of(self, chosen: Choice, most_tokens: int) -> Job:
        asked, job = self.asked, self.job
        if chosen.depth is not None:
            asked = replace(asked, depth=chosen.depth)
        if not (asked.batch_size or asked.gradient_accumulation_steps):
            asked = replace(asked, batch_size=chosen.update_tokens // self.text.sequence_length)
        config = with_warmup(settle(asked), chosen.updates)
        if asked.weight_decay is None and config.depth is not None and config.optimizer == "muon":
            # Of a lower rate than it was measured with, a higher decay would leave small weights.
            rate = max(learning_rate_of("muon", config.depth), config.learning_rate or 0.0)
            config = replace(config, weight_decay=planner.weight_decay_for(chosen, rate))
        if config.warmup_steps is None:
            config = replace(config, warmup_steps=int(WARMUP * chosen.updates))
        config = self._in_rounds(config, chosen.updates)
        plan = replace(make_plan(config, self.cluster, job.data), total_steps=chosen.updates)
        self.budget.most_updates = max(chosen.updates, most_tokens // plan.tokens_per_update)
        return replace(job, config=config, plan=plan, budget=self.budget)

    def _in_rounds(self, config: TrainConfig, updates: int) -> TrainConfig:
        """The configuration with rounds that are short enough for so many updates, if it has any.

        Those that were asked for stay what they are.
        """
        if config.sync != "diloco":
            return config
        length = round_length_for(replace(self.job, config=config), updates)
        if config.sync_every is None:
            config = replace(config, sync_every=length)
        if updates < FEWEST_ROUNDS * config.round_length():
            shorter = f": --sync-every {length} would be short enough" if length else ""
            self.budget.words.append(
                f"note      {updates} updates are fewer than {FEWEST_ROUNDS} rounds of"
                f" {config.round_length()}; when the run ends is decided only where rounds"
                f" end{shorter}"
            )
        return config
