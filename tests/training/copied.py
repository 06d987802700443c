"""Machines for tests of copies: folders of their own, and ranks as threads with real sockets."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.copies import Copies, Following
from p2p_llm_forge.training.copy_leader import Leading
from p2p_llm_forge.training.copy_limits import Limits
from p2p_llm_forge.training.run_folder import RunFolder
from p2p_llm_forge.training.run_record import METRICS, SAMPLES, RunRecord
from tests.memory_channel import clusters, run_ranks
from tests.training.saved import writer


class KeptFolder(RunFolder):
    """The folder of a run on one machine, without the run."""

    def __init__(self, path: Path) -> None:
        self.path, self._lock = path, None
        path.mkdir(parents=True)
        RunRecord({}, frozenset({METRICS, SAMPLES})).write(path)


@dataclass
class Machines:
    """A run on several machines, each a rank with a folder of its own."""

    config: TrainConfig
    folders: list[Path]
    exchanges: list[Any]
    clusters: list[Any]
    copies: list[Copies] = field(default_factory=list)
    said: list[str] = field(default_factory=list)

    @property
    def limits(self) -> Limits:
        return self.copies[0]._limits  # type: ignore[attr-defined]

    def begin(self, step: int) -> None:
        """All ranks come to a save."""
        for one in self.copies:
            one.begin(step)

    def save(self, step: int) -> Path:
        """All ranks save; rank 0 writes."""
        self.begin(step)
        metrics = self.folders[0] / METRICS
        with metrics.open("a") as file:
            file.write(f'{{"step": {step}, "loss": 2.5}}\n')
        fill, config = float(step), self.config
        saved = checkpoint.commit(self.folders[0], step, writer(step, fill), config)
        self.copies[0].saved(step, saved)
        return saved

    def finish(self) -> None:
        """All ranks come to the end."""
        run_ranks(self.copies, lambda one: one.finish())

    def held_back(self, rank: int) -> Held:
        """What keeps all fetches of a rank back, until it is set."""
        held = Held(self.exchanges[rank].fetch)
        self.exchanges[rank].fetch = held.fetch
        return held


class Held:
    """A fetch that waits until it may go on, or is given up."""

    def __init__(self, real: Any) -> None:
        self._real = real
        self.has_begun, self.may_go_on = threading.Event(), threading.Event()

    def fetch(self, files: Any, sources: Any, into: Any, watch: Any, **how: Any) -> Any:
        self.has_begun.set()
        while not self.may_go_on.wait(0.005) and not watch.is_given_up:
            pass
        return self._real(files, sources, into, watch, **how)


@contextlib.contextmanager
def machines(folder: Path, count: int = 3, **settings: Any) -> Iterator[Machines]:
    """So many machines whose checkpoints are to be copied."""
    folders = [KeptFolder(folder / f"machine {rank}") for rank in range(count)]
    config, others = TrainConfig(**settings), list(range(1, count))
    with clusters(count) as ranks:
        exchanges = run_ranks(ranks, lambda rank: rank.open_files())
        run = Machines(config, [one.path for one in folders], exchanges, ranks)
        limits = Limits(config, 10_000)
        run.copies.append(Leading(ranks[0], exchanges[0], others, limits, run.said.append))
        for rank in others:
            job = SimpleNamespace(cluster=ranks[rank], config=config)
            run.copies.append(Following(job, folders[rank], exchanges[rank]))
        for one in run.copies:
            one.start(0)
        try:
            yield run
        finally:
            run_ranks(run.copies, lambda one: one.close())
