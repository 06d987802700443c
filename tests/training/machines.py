"""Ranks with folders of their own, and what lies in them."""

from __future__ import annotations

import contextlib
import shutil
from dataclasses import replace
from pathlib import Path

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data.prepare import prepare
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import job
from p2p_llm_forge.training.job import identity_without_data
from p2p_llm_forge.training.run_record import RunRecord
from tests.folders import tree
from tests.memory_channel import clusters, run_ranks


class Machines:
    """Ranks with folders of their own, which are given the same flags but for these."""

    def __init__(self, config, folder: Path, count: int) -> None:
        self.config, self.count = config, count
        self.homes = [folder / f"machine {rank}" for rank in range(count)]
        for home in self.homes:
            home.mkdir(parents=True, exist_ok=True)
        self.data = [home / "data" for home in self.homes]

    def open_data(self, secret=None, launch=None, **settings):
        """What each rank opens. Raises the ForgeError that all have raised alike.

        launch: fields of `peers.launch.Launch`.
        """

        def act(cluster):
            own = {"dataset_path": self.data[cluster.rank]}
            own["output_dir"] = str(self.homes[cluster.rank] / "run")
            own["dataset_path"] = str(own["dataset_path"])
            with contextlib.closing(cluster):
                try:
                    return job.open_data(replace(self.config, **own, **settings), cluster)
                except ForgeError as error:
                    return error

        with clusters(self.count, secret=secret, **launch or {}) as ranks:
            found = run_ranks(ranks, act)
        errors = [one for one in found if isinstance(one, ForgeError)]
        assert not errors or len(errors) == self.count, "all ranks end alike"
        for error in errors:
            raise error
        return found


def same_dataset(one: Path, other: Path) -> bool:
    """Bit for bit, and beside it nothing but a note that it was fetched."""
    there = tree(other)
    there.pop("fetched.json", None)
    return tree(one) == there


def of_text(machines, text_file, having, count=3):
    """Machines of which some have the text."""
    home = machines(count)
    home.data = [folder / text_file.name for folder in home.homes]
    for rank in having:
        shutil.copy(text_file, home.data[rank])
    return home


def other_data(text_file: Path, folder: Path, length: int = 16) -> Path:
    prepare(PrepareConfig([str(text_file)], str(folder), vocab_size=300, sequence_length=length))
    return folder


def on_record(home: Machines, fingerprint: str, ranks=None) -> None:
    """Machines, by default all, have on record a run that is trained on this dataset."""
    for folder in [home.homes[rank] for rank in ranks or range(home.count)]:
        (folder / "run").mkdir(exist_ok=True)
        identity = {**identity_without_data(home.config), "dataset": fingerprint}
        RunRecord(identity, started="1" * 32).write(folder / "run")
