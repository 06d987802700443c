"""A checkpoint on its way from the ranks that have its files to those that lack some."""

from __future__ import annotations

import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Lock
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileExchange, FileFacts, Watch
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.training import checkpoint
from p2p_llm_forge.training.fetching import Trip, announce
from p2p_llm_forge.training.manifest import checkpoint_dir, require_files


@dataclass(frozen=True)
class Delivery:
    """What travels. files: as the manifest names them. here: where this rank has some of them.

    holds: by rank that keeps a folder, the names that are good there; wanting: those that fetch.
    """

    step: int
    digest: str
    files: dict[str, Any]
    here: Path | None
    holds: Mapping[int, frozenset[str]]
    wanting: tuple[int, ...]

    @property
    def key(self) -> str:
        """Under which its files are offered."""
        return f"checkpoint/{self.step}/{self.digest[:8]}"

    def sources(self, rank: int) -> dict[int, str]:
        """Who else has something of it."""
        return {one: self.key for one, names in self.holds.items() if names and one != rank}

    def bytes_for(self, rank: int) -> int:
        """What a rank lacks."""
        lacking = self.files.keys() - self.holds.get(rank, frozenset())
        return sum(self.files[name]["size"] for name in lacking)

    def partial(self, output_dir: Path) -> Path:
        """Where it lies until it is whole: the same after a kill."""
        return output_dir / f"tmp-fetched-{self.step}-{self.digest[:8]}"


def deliver(delivery: Delivery, config: TrainConfig, cluster: Cluster, lock: Lock | None) -> None:
    """Bring a checkpoint to the ranks that want it. All ranks must call. lock: of the own folder.

    Raises ForgeError, on all ranks, where that is not allowed, has no room, or fails.
    """
    if not delivery.wanting:
        return
    output_dir, rank = Path(config.output_dir), cluster.rank
    cluster.together(lambda: require_harmless(delivery, config))
    folders = [fact["folder"] for fact in cluster.gather_facts({"folder": str(output_dir)})]
    trips = [
        Trip(
            "checkpoint",
            to,
            tuple(delivery.sources(to)),
            delivery.bytes_for(to),
            f"{folders[to]}/checkpoint-{delivery.step}",
        )
        for to in delivery.wanting
    ]
    if config.fetch == "never":
        cluster.together(lambda: refuse(trips, rank))
    cluster.together(lambda: require_place(delivery, output_dir, rank))
    announce(config, cluster, [trip for trip in trips if trip.sources])
    exchange = cluster.open_files()
    if delivery.here and delivery.holds.get(rank):
        exchange.offer(delivery.key, delivery.here, delivery.holds[rank])
    cluster.barrier()  # all offer what they have
    cluster.together(lambda: fetch(delivery, exchange, output_dir, lock))
    exchange.withdraw(delivery.key)


def require_harmless(delivery: Delivery, config: TrainConfig) -> None:
    """Raise ForgeError if what is to travel holds what nobody should read."""
    sender = next(rank for rank, names in delivery.holds.items() if names)
    with as_sent_by(f"rank {sender}"):
        require_files(delivery.files, config.trust_remote_code)


def refuse(trips: list[Trip], rank: int, purpose: str = "to resume from") -> None:
    """Raise ForgeError if this rank would have to fetch."""
    for trip in trips:
        if trip.to == rank:
            raise ForgeError(
                f"the checkpoint {purpose} is not whole in {trip.where}, and --fetch never was"
                " given",
                "leave --fetch out, or copy the folder there by hand from a machine that has it",
            )


def require_place(delivery: Delivery, output_dir: Path, rank: int) -> None:
    """Raise ForgeError if something that no run of ours has written is in the way."""
    final = checkpoint_dir(output_dir, delivery.step)
    if rank in delivery.wanting and checkpoint.is_in_the_way(final):
        raise checkpoint.in_the_way(final)


def fetch(delivery: Delivery, exchange: FileExchange, output_dir: Path, lock: Lock | None) -> None:
    """Fetch what this rank lacks, and make a checkpoint of it. Raises ForgeError."""
    if exchange.rank not in delivery.wanting:
        return
    assert lock is not None
    partial = delivery.partial(output_dir)
    try:
        for name in delivery.holds.get(exchange.rank, ()):
            assert delivery.here is not None
            link(delivery.here / name, partial / name)
    except OSError as error:
        raise checkpoint.not_written(f"{partial} could not be written", error) from error
    files = {name: FileFacts(one["size"], one["sha256"]) for name, one in delivery.files.items()}
    watch = Watch(f"checkpoint-{delivery.step}")
    exchange.fetch(files, delivery.sources(exchange.rank), partial, watch)

    def write(folder: Path) -> None:
        for name in delivery.files:
            link(partial / name, folder / name)

    checkpoint.complete(output_dir, delivery.step, write, lock.confirm, delivery.files)
    shutil.rmtree(partial, ignore_errors=True)


def link(source: Path, target: Path) -> None:
    """Let a file be found at another place as well, or copy it where that is not possible."""
    target.parent.mkdir(parents=True, exist_ok=True)
    target.unlink(missing_ok=True)
    try:
        os.link(source, target)
    except OSError:  # another file system, or one without links
        shutil.copyfile(source, target)
