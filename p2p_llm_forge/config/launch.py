"""Where a run computes, and how its processes find each other."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from p2p_llm_forge.config.fields import Options, flag, require_above_0, require_at_least
from p2p_llm_forge.errors import Problems


@dataclass
class LaunchOptions(Options):
    """Where a run computes, and how its processes find each other."""

    _argument_group_name = "launch"
    PER_RANK: ClassVar[tuple[str, ...]] = (
        *("config", "rank", "world_size", "master_addr", "master_port", "cpu_threads"),
        *("cluster_secret_file", "allow_public_address"),
    )

    backend: Literal["auto", "gloo", "nccl"] = flag(
        "auto", "what carries gradients; auto: nccl between GPUs, else gloo"
    )
    peer_timeout: float = flag(
        30.0, "seconds that an exchange waits for a peer before the run ends"
    )
    cluster_secret_file: str | None = flag(
        None, "file with a secret that every peer must prove to know before anything is exchanged"
    )
    allow_public_address: bool = flag(
        False, "listen on an address that the internet can reach, because a firewall guards it"
    )
    cpu: bool = flag(False, "train on the CPU, also where a GPU is present")
    cpu_threads: int = flag(
        0, "threads of a process on the CPU; 0: the machine's cores over its processes"
    )
    rank: int | None = flag(None, "launch by hand: number of this process, from 0")
    world_size: int | None = flag(
        None, "launch by hand: processes in all; 1: train alone whatever the environment says"
    )
    master_addr: str | None = flag(None, "launch by hand: address of the machine of rank 0")
    master_port: int | None = flag(None, "launch by hand: a free port on that machine")
    dry_run: bool = flag(False, "check everything, report what would be done, and stop")
    config: str | None = flag(
        None, "recipe: a YAML file whose keys are these flags; the command line wins"
    )

    def check(self, problems: Problems) -> None:
        require_above_0(self, problems, "peer_timeout")
        require_at_least(0, self, problems, "cpu_threads")
        require_at_least(1, self, problems, "world_size")
