"""A run's folder: held by one run at a time, and belonging to one run only."""

from __future__ import annotations

import contextlib
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Lock, fsync, only_writer
from p2p_llm_forge.training import checkpoint, snapshot
from p2p_llm_forge.training.identity import claim
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.results import TrainResult

NOT_PUBLISHED = {checkpoint.MANIFEST, checkpoint.TRAINER_STATE, snapshot.OPTIMIZER, snapshot.SYNC}


class RunFolder:
    """The output directory while this run holds it. The main process has the lock."""

    def __init__(self, job: Job, lock: Lock | None) -> None:
        self._job, self._lock = job, lock
        self.path = job.output_dir
        # The checkpoint to resume from, and the result of a run that has nothing left to do.
        found, result = job.cluster.main_only(lambda: look_back(job))
        self.checkpoint = Path(found) if found else None
        self.result = TrainResult(**result) if result else None

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the folder over, as far as this rank knows."""
        return self._lock is not None and self._lock.is_lost

    def confirm(self) -> None:
        """Raise ForgeError if another process has taken it over; call it before writing there."""
        if self._lock is not None:
            self._lock.confirm()

    def claim(self) -> None:
        """Make the folder this run's own. All ranks must call, when all else is known to work."""

        def write() -> None:
            self.confirm()
            claim(self.path, self._job.identity(), self._job.config.overwrite)

        self._job.cluster.main_only(write)

    def publish(self, saved: Path) -> None:
        """Copy the model of a checkpoint into the folder itself, where users of the Hub look."""
        for source in sorted(saved.iterdir()):
            is_of_the_model = source.is_file() and not source.name.startswith("rank-")
            if is_of_the_model and source.name not in NOT_PUBLISHED:
                partial = self.path / f"tmp-{source.name}.{os.getpid()}.0"
                shutil.copyfile(source, partial)
                fsync(partial)
                self.confirm()
                partial.rename(self.path / source.name)


@contextlib.contextmanager
def run_folder(job: Job) -> Iterator[RunFolder]:
    """Hold the output directory against other runs while entered. All ranks must call.

    Raises ForgeError if another run holds it, or if it belongs to another one.
    """
    locks: list[Lock] = []
    with contextlib.ExitStack() as held:

        def lock() -> None:
            path, what = job.output_dir / "run.lock", f"--output-dir {job.output_dir}"
            locks.append(held.enter_context(only_writer(path, what, job.cluster.launch.run_id)))

        job.cluster.main_only(lock)
        yield RunFolder(job, locks[0] if locks else None)


def look_back(job: Job) -> tuple[str | None, dict[str, Any] | None]:
    """The checkpoint to resume from, if any, and the run's result, if nothing is left to do.

    Raises ForgeError if the folder holds another run, or one that has gone further than asked.
    """
    job.refuse_another_run()
    newest = None if job.config.overwrite else checkpoint.find(job.output_dir, job.config.resume)
    if newest is None:
        return None, None
    step, total_steps = checkpoint.read_state(newest)["step"], job.plan.total_steps
    if step > total_steps:
        raise ForgeError(
            f"{newest} is after step {step}, this run was asked to end at {total_steps}",
            "raise --max-steps or --epochs, or start from scratch with --overwrite",
        )
    result = TrainResult.load(job.output_dir)
    if result is None or result.steps != total_steps or step != total_steps:
        return str(newest), None
    print(f"finished already; --overwrite starts from scratch\n{result.summary()}", flush=True)
    return str(newest), vars(result)
