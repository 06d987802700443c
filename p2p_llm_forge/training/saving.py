"""All ranks' part in the checkpoints of a run: saved while training goes on, and taken up again."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.sync.base import SavedSync, Sync
from p2p_llm_forge.sync.resume import refuse_to_end_in_a_round, refuse_unfinished_round
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.tracking import Silent


class Saving:
    """Saves what a run needs to go on. All ranks call alike; each writes what only it has.

    The main process writes the checkpoint. Ranks with a state of their own hand over a file each,
    which the main process waits for, in its background thread, before the checkpoint is complete.
    """

    def __init__(
        self,
        config: TrainConfig,
        cluster: Cluster,
        lm: Any,
        optimizer: torch.optim.Optimizer,
        sync: Sync,
        tokenizer_dir: Path,
        tracking: Silent,
    ) -> None:
        self._config, self._cluster, self._sync = config, cluster, sync
        self._lm, self._optimizer = lm, optimizer
        self._tokenizer_dir, self._tracking = tokenizer_dir, tracking
        self._output_dir = Path(config.output_dir)
        self._writer = checkpoint.Writer(config.save_in_background)
        others = range(1, cluster.world_size)
        self._handing_over = others if sync.has_own_state else range(0)

    def save(self, step: int, state: dict[str, Any]) -> None:
        """Save a checkpoint after `step` updates. state: JSON, the same on every rank."""
        cluster, held, scaler = self._cluster, self._sync.state(), self._cluster.accelerator.scaler
        state = {
            **state,
            "step": step,
            # By rank: where ranks train alone, each finds its own scale.
            "scaler": None if scaler is None else cluster.gather_facts(scaler.state_dict()),
            "config": as_dict(self._config),
            "sync": {**held.facts, "settings": self._sync.settings()},
        }
        cluster.main_only(self._writer.wait)  # the last save is out of the way, on every rank
        if cluster.is_main:
            self._tell_failed_save()
            with self._sync.agreed_weights():
                snapshot = checkpoint.Snapshot.take(
                    self._lm, self._optimizer, state, held.shared, held.own
                )
            self._writer.start(lambda: self._commit(step, snapshot))
        elif cluster.rank in self._handing_over:
            own = held.own
            if self._sync.trains_alone:
                moments = checkpoint.optimizer_tensors(self._lm, self._optimizer)
                own = own | {checkpoint.OF_OPTIMIZER + key: one for key, one in moments.items()}
            self._writer.start(lambda: self._hand_over(step, own))

    def finish(self) -> None:
        """Return when the last checkpoint is on disk. Raises ForgeError, everywhere, if not."""

        def finish() -> None:
            self._writer.wait()
            failure = self._writer.failure()
            if failure:
                raise ForgeError(f"{failure}, then go on with --resume auto")

        self._cluster.main_only(finish)

    def wait(self) -> None:
        """Return when this rank is writing nothing."""
        self._writer.wait()

    def _commit(self, step: int, snapshot: checkpoint.Snapshot) -> None:
        def write(folder: Path) -> None:
            snapshot.write(folder, self._lm, self._tokenizer_dir)
            for rank in self._handing_over:
                if wrong := self._cluster.wait_for(f"saved/{step}", rank):
                    raise ForgeError(wrong)
                checkpoint.take_over(folder, self._output_dir, step, rank)

        config = self._config
        checkpoint.commit(self._output_dir, step, write, config.keep_checkpoints, config.keep_best)

    def _hand_over(self, step: int, own: dict[str, torch.Tensor]) -> None:
        rank = self._cluster.rank
        wrong = f"rank {rank} could not write its file of the checkpoint"
        try:
            wrong = checkpoint.hand_over(self._output_dir, step, rank, own)
        finally:  # the main process waits for the word, whatever happens
            self._cluster.post(f"saved/{step}", wrong)

    def _tell_failed_save(self) -> None:
        """Say that a save has failed: the run goes on, its older checkpoints are untouched."""
        failure = self._writer.failure()
        if failure:
            self._tracking.say(f"warning: {failure}; training goes on")


def take_up(
    folder: Path,
    state: dict[str, Any],
    sync: Sync,
    cluster: Cluster,
    lm: Any,
    optimizer: torch.optim.Optimizer,
    total_steps: int,
) -> None:
    """Put optimizer, loss scaling and strategy where the checkpoint in `folder` left them.

    state: of its trainer; total_steps: after how many updates this run ends. Raises ForgeError
    where this run cannot go on from there.
    """
    saved = SavedSync(
        state.get("sync", {}),
        checkpoint.read_shared(folder),
        lambda rank: checkpoint.read_own(folder, rank),
    )
    refuse_unfinished_round(saved, sync, cluster.world_size, state["step"])
    refuse_to_end_in_a_round(saved, state["step"], total_steps)
    # A rank that has joined takes over from one that was there.
    both_alone = sync.trains_alone and saved.is_of(sync)
    of_rank = cluster.rank % saved.world_size if both_alone else 0
    checkpoint.load_optimizer(folder, lm, optimizer, of_rank)
    sync.load_state(saved)
    if cluster.accelerator.scaler is not None and (scaler := state.get("scaler")):
        # Older checkpoints hold that of rank 0 alone.
        of_this_rank = scaler if isinstance(scaler, dict) else scaler[of_rank]
        if of_this_rank:  # that of a scaler that is switched off is empty
            cluster.accelerator.scaler.load_state_dict(of_this_rank)
