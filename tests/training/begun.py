"""Machines that begin a run together: ranks as threads, folders of their own, real sockets."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.beginning import Beginning
from p2p_llm_forge.training.job import identity_without_data
from p2p_llm_forge.training.run_record import Resumed, RunRecord
from p2p_llm_forge.training.settle import settle
from p2p_llm_forge.training.starts import new_start
from tests.memory_channel import clusters, run_ranks
from tests.training.saved import writer

START = new_start()
# Of a run that was asked for nothing else.
IDENTITY = identity_without_data(settle(TrainConfig("data", "run", learning_rate=1.0)))


def machine(
    folder: Path,
    *steps: int,
    started: str | None = START,
    fill: float = 1.0,
    resumed: Resumed = (),
    **changed: object,
) -> Path:
    """The folder of a run on one machine, with these checkpoints; other weights by `fill`.

    changed: what the run's record says otherwise of its settings.
    """
    folder.mkdir()
    RunRecord({**IDENTITY, **changed}, frozenset(), started, resumed).write(folder)
    for step in steps:
        checkpoint.complete(folder, step, writer(step, fill, config=IDENTITY))
    return folder


def begin(folders: Sequence[Path], resume: Any = "auto", **settings: Any) -> list[Beginning]:
    """Where each rank begins from; `resume` may differ by rank."""
    asked = resume if isinstance(resume, list) else [resume] * len(folders)

    def act(cluster: Any) -> Beginning:
        folder = folders[cluster.rank]
        config = TrainConfig("data", str(folder), resume=asked[cluster.rank], **settings)
        beginning = Beginning(config)
        beginning.agree(cluster)
        return beginning

    with clusters(len(folders)) as ranks:
        return run_ranks(ranks, act)


def begun(folders: Sequence[Path], **settings: Any) -> list[Path | None]:
    """The same, as paths; after it nothing is left beside the run."""
    found = [one.checkpoint for one in begin(folders, **settings)]
    for folder in folders:
        assert not [*folder.glob("tmp-*"), *folder.glob("run.lock")]
    return found


def at(folders: Sequence[Path], step: int) -> list[Path]:
    """Where the checkpoint of a step lies in each folder."""
    return [folder / f"checkpoint-{step}" for folder in folders]
