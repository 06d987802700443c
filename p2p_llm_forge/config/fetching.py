"""What machines without a shared folder bring each other: options of train.py."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2p_llm_forge.config.fields import Options, flag, require_between
from p2p_llm_forge.errors import Problems

UNASKED = 10 * 10**9  # bytes that one machine fetches without being asked to: an evening's download


@dataclass
class FetchingOptions(Options):
    """What a machine fetches from its peers, and on how many of them a checkpoint lies."""

    heading = "without a shared folder"

    fetch: Literal["auto", "never", "yes"] = flag(
        "auto",
        "data, model and checkpoints that a machine lacks come from its peers; auto: up to 10 GB"
        " for each machine; yes: also more",
    )
    replicate_checkpoints: int | None = flag(
        None,
        "machines that hold each checkpoint, the main one among them; default: 2 where copying"
        " takes at most a tenth of the time between two saves, else 1",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # YAML reads a bare yes and no as true and false.
        switches = {"true": "yes", "false": "never"}
        self.fetch = switches.get(str(self.fetch).lower(), self.fetch)  # type: ignore[assignment]

    def check(self, problems: Problems) -> None:
        require_between((1, 1024), self, problems, "replicate_checkpoints")
