"""TrainConfig: all that train.py can be asked, built of the groups of options."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

from p2p_llm_forge.config.data import DataOptions
from p2p_llm_forge.config.fields import Options, listed, multiples_near
from p2p_llm_forge.config.launch import LaunchOptions
from p2p_llm_forge.config.model import ModelOptions
from p2p_llm_forge.config.saving import SavingOptions
from p2p_llm_forge.config.sync import SyncOptions
from p2p_llm_forge.config.update import UpdateOptions
from p2p_llm_forge.errors import Problems


# A dataclass takes the fields of its last base first: so the data come first, as in GROUPS.
@dataclass
class TrainConfig(
    LaunchOptions, SyncOptions, SavingOptions, UpdateOptions, ModelOptions, DataOptions
):
    """One training run: what it learns from, what it builds, how long."""

    GROUPS: ClassVar[tuple[type[Options], ...]] = (
        *(DataOptions, ModelOptions, UpdateOptions),
        *(SavingOptions, SyncOptions, LaunchOptions),
    )

    def check_together(self, problems: Problems) -> None:
        problems.require(
            bool(self.output_dir or (self.eval_only and self.model_name)),
            "no place for the run",
            "add --output-dir FOLDER",
        )
        problems.require(
            not (self.overwrite and self.model_name and _is_same(self.model_name, self.output_dir)),
            f"--overwrite would throw away --model-name {self.model_name}",
            "choose another --output-dir",
        )
        every = self.round_length()
        if self.sync == "diloco" and not self.is_streaming() and every > 0:
            problems.require(
                self.eval_every % every == 0,
                f"--eval-every {self.eval_every} is not a multiple of --sync-every {every}, and"
                " only there all ranks hold the same weights",
                f"use {listed(multiples_near(self.eval_every, every))}",
            )


def _is_same(one: str, other: str) -> bool:
    """Whether two names mean the same folder."""
    return Path(one).resolve() == Path(other).resolve()
