"""Where a run computes, and how its processes find each other: options of train.py."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from p2p_llm_forge.config.fields import (
    Options,
    flag,
    option,
    require_at_least,
    require_between,
    require_seconds,
)
from p2p_llm_forge.errors import Problems

MOST_RANKS, MOST_THREADS = 10**5, 4096  # beyond these a value is a slip of the keys


@dataclass
class LaunchOptions(Options):
    """Where a run computes, and how its processes find each other."""

    heading = "launch"
    COMMON = ["backend", "cluster_secret_file", "cpu", "dry_run", "config"]
    PER_RANK = [
        *("config", "rank", "world_size", "master_addr", "master_port", "cpu", "cpu_threads"),
        *("cluster_secret_file", "allow_public_address", "allow_unauthenticated"),
    ]

    backend: Literal["auto", "gloo", "nccl"] = flag(
        "auto", "what carries gradients; auto: nccl between GPUs, else gloo"
    )
    peer_timeout: float = flag(
        10.0, "seconds without a sign of life after which a peer is lost; a slow one is waited for"
    )
    rendezvous_timeout: float | None = flag(
        None,
        "seconds to wait until all processes have come; default: 3 times --peer-timeout, of an"
        " elastic launch at least 300",
    )
    cluster_secret_file: str | None = flag(
        None, "file with a secret that every peer must prove to know; encrypts what travels on gloo"
    )
    allow_public_address: bool = flag(
        False, "listen on an address that the internet can reach, because a firewall guards it"
    )
    allow_unauthenticated: bool = flag(
        False, "run under torchrun's elastic launch, which runs what anyone sends to its port"
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
        require_seconds(self, problems, "peer_timeout", "rendezvous_timeout")
        require_between((0, MOST_THREADS), self, problems, "cpu_threads")
        require_between((0, 65535), self, problems, "master_port")
        require_at_least(0, self, problems, "rank")
        require_between((1, MOST_RANKS), self, problems, "world_size")
        given = self.master_addr != ""
        problems.require(given, "--master-addr is empty", "give the address of rank 0's machine")
        by_hand = ("rank", "world_size", "master_addr", "master_port")
        missing = [option(name) for name in by_hand if getattr(self, name) is None]
        problems.require(
            len(missing) in (0, len(by_hand)) or self.world_size == 1,
            f"a launch by hand needs all of {', '.join(map(option, by_hand))}",
            f"add {' and '.join(missing)}",
        )
        ranks = self.world_size if self.world_size is not None else math.inf
        problems.require(
            self.rank is None or self.rank < max(1, ranks),
            f"--rank {self.rank} is not one of the {ranks} ranks of --world-size",
            f"use 0 to {ranks - 1}",
        )
