"""A run's folder: held by one run at a time, and belonging to one run only."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Lock, fsync, write_file, write_json
from p2p_llm_forge.model.lora import is_adapter_folder
from p2p_llm_forge.peers.keepers import Keepers, keep, on_keepers
from p2p_llm_forge.training import checkpoint, snapshot
from p2p_llm_forge.training.beginning import Beginning
from p2p_llm_forge.training.card import PICTURES, CardFacts, model_card
from p2p_llm_forge.training.identity import LOCK, claim, refuse_file_of_trackers
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.learner import merged, text_spec_of
from p2p_llm_forge.training.pace import saved_pace
from p2p_llm_forge.training.pruning import remove, superfluous
from p2p_llm_forge.training.publishing import CARD
from p2p_llm_forge.training.results import RESULTS, TrainResult
from p2p_llm_forge.training.run_record import Resumed, RunRecord, put_on_record
from p2p_llm_forge.training.starts import agreed_history, agreed_start, new_start

NOT_PUBLISHED = {checkpoint.MANIFEST, checkpoint.TRAINER_STATE, snapshot.OPTIMIZER, snapshot.SYNC}


# Files of a published model that would be read beside those of the other kind.
OF_A_MODEL = re.compile(r"(adapter_|base_|generation_)?(model|config)(\S*)\.(json|safetensors)")


class RunFolder:
    """The output directory while this run holds it: that of each machine, or a shared one.

    keepers: who keeps which; those ranks have its lock. What the run prints and publishes is in
    that of rank 0.
    """

    def __init__(
        self, job: Job, keepers: Keepers, lock: Lock | None, beginning: Beginning | None = None
    ) -> None:
        self._job, self._lock = job, lock
        self.path, self.keepers = job.output_dir, keepers
        self.on_keepers(job.refuse_another_run)
        # The checkpoint to resume from, and the result of a run that has nothing left to do.
        found, result = job.cluster.main_only(lambda: look_back(job, beginning))
        self.checkpoint = Path(found) if found else None
        if beginning and beginning.is_agreed:
            self.checkpoint = beginning.checkpoint  # where this rank has it
        self.result = TrainResult(**result) if result else None

    def on_keepers(self, act: Callable[[], object]) -> None:
        """Run `act` on every rank that keeps a folder. All ranks must call. See `on_keepers`."""
        on_keepers(self._job.cluster, self.keepers, act)

    @property
    def is_lost(self) -> bool:
        """Whether another process has taken the folder over, as far as this rank knows."""
        return self._lock is not None and self._lock.is_lost

    def confirm(self) -> None:
        """Raise ForgeError if another process has taken it over; call it before writing there."""
        if self._lock is not None:
            self._lock.confirm()

    def may_write(self, name: str) -> bool:
        """Whether a file of this name is this run's to write, and nobody has taken it over."""
        with contextlib.suppress(ForgeError):
            self.confirm()
            return not self._of_others([name])
        return False

    def claim(self) -> None:
        """Make the folder this run's own. All ranks must call, when all else is known to work."""
        cluster, config = self._job.cluster, self._job.config
        known: str | None = None
        resumed: Resumed = ()
        if not config.overwrite:
            known = agreed_start(cluster, self.keepers, self.path)
            resumed = agreed_history(cluster, self.keepers, self.path)
        if self._leaves_later_ones():
            known, resumed = None, ()  # a machine that is absent may have some too
        started, token = cluster.main_only(lambda: [known or new_start(), new_start()])
        step = int(self.checkpoint.name.rpartition("-")[2]) if self.checkpoint else 0
        if self.checkpoint or known:  # known: from the start, without those who may have saved
            resumed = (*resumed, (str(token), step))

        def write() -> None:
            self.confirm()
            if cluster.is_main:
                refuse_file_of_trackers(self.path, config.report_to)
            claim(self.path, self._job.identity(), config.overwrite, str(started), resumed)
            if not cluster.is_main and self.checkpoint:
                self._drop_fetched(step)

        self.on_keepers(write)

    def _leaves_later_ones(self) -> bool:
        """Whether the run goes on from a checkpoint that was asked for, and not from the newest."""
        newer, asked = [], self._job.config.resume
        if self.checkpoint and asked != "auto" and self.keepers.keeps(self._job.cluster.rank):
            step = int(self.checkpoint.name.rpartition("-")[2])
            newer = [one for one in checkpoint.steps_saved(self.path) if one > step]
        return any(fact["has"] for fact in self._job.cluster.gather_facts({"has": bool(newer)}))

    def _drop_fetched(self, step: int) -> None:
        """Remove what earlier starts have fetched here, as rank 0 prunes its own; resumed from
        `step`, which was asked for, also what came after it."""
        config = self._job.config
        old = superfluous(self.path, step, config)
        remove(self.path, [one for one in old if one < step or config.resume != "auto"])

    def write_results(self, result: TrainResult, facts: CardFacts) -> str | None:
        """Write figures and model card. Returns a note where there is a README.md of others.

        Raises ForgeError when the disk does not take them, or when others have such figures there.
        """
        with self._writing("the results", [RESULTS]):
            write_json(self.path / RESULTS, vars(result))
        if self._of_others([CARD]):
            return f"{self.path / CARD} is not of this run and stays as it is: no model card"
        with self._writing("the model card", [CARD]):
            write_file(self.path / CARD, self.card(result, facts))
        return None

    def card(self, result: TrainResult, facts: CardFacts) -> str:
        """The model card, with the pictures that are there."""
        return model_card(result, facts, [one for one in PICTURES if (self.path / one).is_file()])

    def publish(self, saved: Path) -> None:
        """Copy the model of a checkpoint into the folder itself, where users of the Hub look.

        Raises ForgeError when the disk does not take it, or when files of others are in its place.
        """
        with contextlib.ExitStack() as opened:
            config, folder = self._job.config, saved
            if config.merge_lora:
                text = text_spec_of(self._job.data)
                folder = opened.enter_context(merged(saved, text, config.trust_remote_code))
            self._publish([folder / name for name in published_names(folder)], saved)

    def _publish(self, sources: list[Path], saved: Path) -> None:
        names = [source.name for source in sources]
        with self._writing(f"the model, which lies in {saved},", names):
            for name in self._of_other_kind(names):
                (self.path / name).unlink(missing_ok=True)
            for source in sources:
                partial = self.path / f"tmp-{source.name}.{os.getpid()}.0"
                shutil.copyfile(source, partial)
                fsync(partial)
                self.confirm()
                partial.replace(self.path / source.name)
            fsync(self.path)

    def _of_other_kind(self, names: list[str]) -> list[str]:
        """What a run of ours has published here as adapters, or as a whole model, if not both."""
        record = RunRecord.read(self.path)
        wrote = record.wrote if record else ()
        return [one for one in wrote if OF_A_MODEL.fullmatch(one) and one not in names]

    def _of_others(self, names: list[str]) -> list[str]:
        """Those that exist and that no run of ours has written."""
        record = RunRecord.read(self.path)
        wrote = record.wrote if record else frozenset()
        return [name for name in names if os.path.lexists(self.path / name) and name not in wrote]

    @contextlib.contextmanager
    def _writing(self, what: str, names: list[str]) -> Iterator[None]:
        """Put names on record and write them inside. Raises ForgeError where that fails."""
        self.confirm()
        if others := self._of_others(names):
            raise ForgeError(
                f"{self.path / others[0]} is not of this run, so {what} cannot be put in its place",
                "move it out of --output-dir and use --resume auto",
            )
        try:
            put_on_record(self.path, names)
            yield
        except OSError as error:
            for name in names:
                (self.path / f"tmp-{name}.{os.getpid()}.0").unlink(missing_ok=True)
            fix = f"make {self.path} writable"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                fix = "make room on the disk"
            elif folders := [name for name in names if (self.path / name).is_dir()]:
                fix = f"move the folder {self.path / folders[0]} out of --output-dir"
            raise ForgeError(
                f"{what} could not be written into {self.path}: {error.strerror or error}",
                f"{fix} and use --resume auto: nothing is trained again",
            ) from error


def published_names(saved: Path) -> list[str]:
    """The files of a checkpoint that users of the model need."""
    return [
        source.name
        for source in sorted(saved.iterdir())
        if source.is_file() and not source.name.startswith("rank-")
        if source.name not in NOT_PUBLISHED
    ]


@contextlib.contextmanager
def run_folder(job: Job, beginning: Beginning | None = None) -> Iterator[RunFolder]:
    """Hold the output directory against other runs while entered. All ranks must call.

    beginning: what the peers have agreed on; without it, rank 0 looks into its own folder.
    Raises ForgeError if another run holds it, or if it belongs to another one.
    """
    path, what = job.output_dir / LOCK, f"--output-dir {job.output_dir}"
    with keep(job.cluster, path, what) as (keepers, lock):
        yield RunFolder(job, keepers, lock, beginning)


def look_back(
    job: Job, beginning: Beginning | None = None
) -> tuple[str | None, dict[str, Any] | None]:
    """The checkpoint to resume from, if any, and the run's result, if nothing is left to do.

    Raises ForgeError if the folder holds a run that has gone further than asked.
    """
    if beginning and beginning.is_agreed:
        newest = beginning.checkpoint
    elif job.config.overwrite:
        newest = None
    else:
        newest = checkpoint.find(job.output_dir, job.config.resume)
    if newest is None:
        return None, None
    state = checkpoint.read_state(newest)
    step, total_steps = state["step"], end_of(newest, state, job)
    result = TrainResult.load(job.output_dir)
    is_asked_for = job.config.merge_lora != is_adapter_folder(job.output_dir)
    if (
        result is None
        or {result.updates_taken, step} != {total_steps}
        or not (result.is_published and (is_asked_for or not job.config.lora_rank))
    ):
        return str(newest), None
    print(f"finished already; --overwrite starts from scratch\n{result.summary()}", flush=True)
    return str(newest), vars(result)


def end_of(saved: Path, state: dict[str, Any], job: Job) -> int:
    """After how many updates the run in a checkpoint is to end. state: of its trainer.

    Raises ForgeError where the job cannot go on from there.
    """
    step, paced = state["step"], saved_pace(state)
    refuse_other_end(saved, job.config, is_paced=paced is not None)
    total_steps = paced.total_steps if paced else job.plan.total_steps
    if step > total_steps:
        raise ForgeError(
            f"{saved} is after step {step}, this run was asked to end at {total_steps}",
            "raise --max-steps or --epochs, or start from scratch with --overwrite",
        )
    last = checkpoint.checkpoint_dir(job.output_dir, total_steps)
    if step < total_steps and checkpoint.is_in_the_way(last):
        raise checkpoint.in_the_way(last)
    return total_steps


def refuse_other_end(saved: Path, config: TrainConfig, is_paced: bool) -> None:
    """Raise ForgeError if a run that ends by the clock is to end by a number, or the reverse.

    Its learning rate would follow another schedule. is_paced: the run in the checkpoint.
    """
    if is_paced and config.minutes is None:
        raise ForgeError(
            f"{saved} is of a run that ends by the clock (--minutes)",
            "give its --minutes again, without --epochs and --max-steps",
        )
    if config.minutes is not None and not is_paced:
        raise ForgeError(
            f"{saved} is of a run that ends after a number of updates, not by --minutes",
            "leave --minutes out, or choose another --output-dir",
        )
