"""All ranks' part in the checkpoints of a run: saved while training continues, and resumed from."""

from __future__ import annotations

from collections.abc import Callable
from concurrent import futures
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import as_dict
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.sync.base import STAY_FINITE, SavedSync, Sync, SyncState
from p2p_llm_forge.sync.strategy import refuse_to_end_in_a_round, refuse_unfinished_round
from p2p_llm_forge.training import checkpoint, snapshot
from p2p_llm_forge.training.copies import Copies
from p2p_llm_forge.training.finite import bad_tensor, bad_weight
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.learner import Learner
from p2p_llm_forge.training.orthogonalising import facts_of, load_facts
from p2p_llm_forge.training.rank_files import RankFiles
from p2p_llm_forge.training.run_folder import RunFolder
from p2p_llm_forge.training.snapshot import moments


class Writer:
    """Runs one save at a time, in a thread of its own if asked to."""

    def __init__(self, in_background: bool) -> None:
        self._in_background = in_background
        self._thread = futures.ThreadPoolExecutor(1, "checkpoint writer")
        self._saves: list[futures.Future[object]] = []  # the last one, until it was asked about

    def start(self, save: Callable[[], object]) -> None:
        """Run `save` once the one before it is done; `failure` returns what went wrong in it."""
        self.wait()
        self._saves = [self._thread.submit(save)]
        if not self._in_background:
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written."""
        futures.wait(self._saves)

    def failure(self) -> ForgeError | None:
        """What went wrong in the last save, once; usually None.

        Anything but a full or broken disk is a mistake of ours and is raised.
        """
        failed = self._saves.pop().exception() if self._saves else None
        if failed is not None and not isinstance(failed, ForgeError):
            raise failed
        return failed


class Saving:
    """Saves what a run needs to resume. All ranks call alike; each writes what only it has.

    The main process writes the checkpoint. Ranks with a state of their own write a file each, which
    the main process collects, in its background thread, before the checkpoint is complete.
    """

    def __init__(self, job: Job, folder: RunFolder, learner: Learner, sync: Sync) -> None:
        self._job, self._folder, self._sync = job, folder, sync
        self._lm, self._optimizer = learner.lm, learner.bare_optimizer
        self._writer = Writer(job.config.save_in_background)
        self.after: Callable[[], object] = lambda: None  # what follows a checkpoint, in its thread
        self.copies = Copies(job.cluster)  # on other machines
        self._ranks_with_files = range(1, job.cluster.world_size if sync.has_own_state else 1)
        self._rank_files = None
        if self._ranks_with_files:
            self._rank_files = RankFiles(job.cluster, folder.keepers, folder.path)

    def save(
        self, step: int, state: dict[str, Any], then: Callable[[Path], object] | None = None
    ) -> ForgeError | None:
        """Save a checkpoint after `step` updates. state: JSON, the same on every rank. then: what
        the main process does with its folder once it is complete.

        Returns, on the main process, what has kept the save before from being written, if anything
        has. Raises ForgeError on all ranks if another process has taken the folder over.
        """
        cluster, held = self._job.cluster, self._sync.state()
        if self._sync.has_own_state:
            self._refuse_bad(step, held)
        scaler, failed = cluster.accelerator.scaler, None
        state = {
            **state,
            "step": step,
            # By rank: where ranks train alone, each finds its own scale.
            "scaler": None if scaler is None else cluster.gather_facts(scaler.state_dict()),
            "optimizer": facts_of(self._optimizer),
            "config": as_dict(self._job.config),
            "sync": {**held.facts, "settings": self._sync.settings()},
        }
        cluster.main_only(self._make_way)
        self._rank_files_collected()
        self.copies.begin(step)
        if cluster.is_main:
            failed = self._writer.failure()
            with self._sync.agreed_weights():
                taken = snapshot.Snapshot.take(self._lm, self._optimizer, state, held)
            self._writer.start(lambda: self._commit(step, taken, then))
        elif self._rank_files:
            files, own = self._rank_files, held.own
            if self._sync.trains_alone:
                moments = snapshot.optimizer_tensors(self._lm, self._optimizer)
                own = own | {snapshot.OF_OPTIMIZER + key: one for key, one in moments.items()}
            self._writer.start(lambda: files.write(step, own))
        return failed

    def bad_by_rank(self) -> dict[int, str]:
        """What is not finite, or too large, in the weights and moments of each rank that has such.

        All ranks must call.
        """
        bad = bad_weight(self._lm.named_parameters())
        if bad is None and self._sync.trains_alone:
            with self._sync.agreed_weights():
                bad = bad_weight(self._lm.named_parameters())
        bad = bad or bad_tensor(moments(self._lm, self._optimizer))
        facts = self._job.cluster.gather_facts({"bad": bad})
        return {rank: fact["bad"] for rank, fact in enumerate(facts) if fact["bad"]}

    def _refuse_bad(self, step: int, held: SyncState) -> None:
        """Raise ForgeError, on all ranks, if what a strategy keeps is not finite on one of them."""
        bad = bad_tensor([*held.shared.items(), *held.own.items()])
        for rank, fact in enumerate(self._job.cluster.gather_facts({"bad": bad})):
            if fact["bad"]:
                raise ForgeError(
                    f"step {step} is not saved: rank {rank} has {fact['bad']}; earlier checkpoints"
                    " are untouched",
                    STAY_FINITE,
                )

    def finish(self) -> None:
        """Return when the last checkpoint is on disk, and copied where it is to be.

        Raises ForgeError, everywhere, if it is not on disk.
        """

        def finish() -> None:
            self._make_way()
            if failed := self._writer.failure():
                problem = failed.problems[0]
                raise ForgeError(problem.found, f"{problem.fix}, then continue with --resume auto")

        self._job.cluster.main_only(finish)
        self._rank_files_collected()
        self.copies.finish()
        self._job.cluster.barrier()  # a launcher ends what still copies beside a rank that ends

    def close(self) -> None:
        """Return when this rank is writing nothing."""
        self._writer.wait()
        self.copies.close()

    def _rank_files_collected(self) -> None:
        """The main process has asked about the last save, and needs nothing more of this rank."""
        if self._rank_files:
            self._writer.wait()
            self._rank_files.collected()

    def _make_way(self) -> None:
        """The last save is over, and the next one may be written."""
        self._writer.wait()
        self._folder.confirm()

    def _commit(
        self, step: int, taken: snapshot.Snapshot, then: Callable[[Path], object] | None
    ) -> None:
        output_dir = self._folder.path

        def write(folder: Path) -> None:
            taken.write(folder, self._lm, self._job.data.tokenizer_dir)
            for rank in self._ranks_with_files:
                assert self._rank_files is not None
                self._rank_files.collect(step, rank, folder)

        config, confirm, saved = self._job.config, self._folder.confirm, None
        try:
            saved = checkpoint.commit(output_dir, step, write, config, confirm)
        finally:  # the other machines wait for word of it
            self.copies.saved(step, saved)
        self.after()
        if then:
            then(saved)


def resume(folder: Path, state: dict[str, Any], job: Job, learner: Learner, sync: Sync) -> None:
    """Put optimizer, loss scaling and strategy where the checkpoint in `folder` left them.

    state: of its trainer. Raises ForgeError where this run cannot continue from there.
    """
    cluster, step = job.cluster, state["step"]
    shared = snapshot.tensors_in(folder / snapshot.SYNC)
    saved = SavedSync(
        state["sync"], shared, lambda rank: snapshot.tensors_in(folder / snapshot.rank_file(rank))
    )
    refuse_unfinished_round(saved, sync, cluster.world_size, step)
    refuse_to_end_in_a_round(saved, step, job.plan.total_steps)
    # A rank that has joined takes the state of one that was there.
    both_alone = sync.trains_alone and saved.is_of(sync)
    of_rank = cluster.rank % saved.world_size if both_alone else 0
    snapshot.load_optimizer(folder, learner.lm, learner.bare_optimizer, of_rank)
    load_facts(learner.bare_optimizer, state.get("optimizer"))
    sync.load_state(saved)
    scaler, scales = cluster.accelerator.scaler, state.get("scaler")
    if scaler is not None and scales and scales[of_rank]:  # empty: of one that was switched off
        scaler.load_state_dict(scales[of_rank])
