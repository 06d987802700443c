"""Who keeps a folder: of the ranks that see the same one, the one rank that writes there.

A folder at the same path may be one for all machines (a network share), one on each, or anything
between. Which it is, a lock in it decides: a file system gives it to one caller, and whoever finds
that another rank of this start has it sees the same folder.
"""

from __future__ import annotations

import contextlib
import secrets
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from p2p_llm_forge.files import Lock
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.shapes import is_count


@dataclass(frozen=True)
class Keepers:
    """of: by rank, the rank that keeps the folder it sees. Rank 0 keeps its own."""

    of: list[int]

    def keeps(self, rank: int) -> bool:
        """Whether the rank writes into its folder, for all that see it."""
        return self.of[rank] == rank

    @property
    def ranks(self) -> list[int]:
        """Those that keep a folder, in order: one for each folder there is."""
        return sorted(set(self.of))

    @property
    def is_shared(self) -> bool:
        """Whether all ranks see the folder of rank 0."""
        return self.ranks == [0]

    def sharing(self, rank: int) -> list[int]:
        """The ranks that see the same folder as this one, which is among them."""
        return [one for one, keeper in enumerate(self.of) if keeper == self.of[rank]]


def on_keepers(cluster: Cluster, keepers: Keepers, act: Callable[[], object]) -> None:
    """Run `act` on every rank that keeps a folder. All ranks must call.

    A ForgeError in it is raised on all of them; where there are several folders, those of all, each
    with its rank.
    """

    def alone() -> None:
        act()

    if keepers.is_shared:
        cluster.main_only(alone)
    else:
        cluster.together(lambda: act() if keepers.keeps(cluster.rank) else None)


@contextlib.contextmanager
def keep(cluster: Cluster, path: Path | None, what: str) -> Iterator[tuple[Keepers, Lock | None]]:
    """Hold the lock at `path` in every folder there is while entered. All ranks must call.

    Yields who keeps which, and the lock, on the ranks that have one. path: None on a rank that
    writes nowhere, which counts as one with a folder of its own. what: the locked thing, for
    messages. Raises ForgeError, on all ranks, if other processes hold one of the locks, or if a
    folder cannot be written: each with the rank that has found it.
    """
    lock = Lock(path, what, cluster.launch.run_id) if path else None
    own = lock.token if lock else secrets.token_hex(8)
    tokens = [str(fact["token"]) for fact in cluster.gather_facts({"token": own})]
    with contextlib.ExitStack() as held:

        def acquire() -> int:
            if lock is None:
                return cluster.rank
            # Of an elastic launch, an earlier start is taken over from, a rank of this one is not.
            holder = lock.acquire(friends=[one for one in tokens if one != own])
            if holder == own:
                held.enter_context(lock.held())
            return tokens.index(holder)

        cluster.main_only(acquire)  # before the others, which may see its folder
        keeper = cluster.together(lambda: 0 if cluster.is_main else acquire())
        facts = cluster.gather_facts({"keeper": keeper})
        keepers = kept_by([fact["keeper"] for fact in facts])
        yield keepers, lock if keepers.keeps(cluster.rank) else None


def kept_by(keepers: list[int]) -> Keepers:
    """The keepers that the ranks have named. Raises ForgeError for what no rank of ours says."""
    for rank, keeper in enumerate(keepers):
        with as_sent_by(f"rank {rank}"):
            is_rank = is_count(keeper) and keeper < len(keepers)
            if not is_rank or keepers[keeper] != keeper or (rank == 0 and keeper):
                raise ValueError(f"its folder is not kept by rank {keeper}")
    return Keepers(keepers)
