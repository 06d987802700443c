"""A model that is only evaluated, from whichever machine has the newest, and kept by no other."""

from __future__ import annotations

import contextlib
import secrets
import shutil
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import fingerprint
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileExchange, FileFacts, Watch
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.keepers import Keepers, keep
from p2p_llm_forge.shapes import is_count, require_shape
from p2p_llm_forge.training.fetched_checkpoint import refuse
from p2p_llm_forge.training.fetching import Trip, announce, require_room
from p2p_llm_forge.training.identity import of_today
from p2p_llm_forge.training.manifest import (
    FILE_SHAPE,
    checkpoint_dir,
    damage,
    differences,
    is_whole,
    no_checkpoints,
    read_manifest,
    require_files,
    steps_saved,
)
from p2p_llm_forge.training.run_folder import NOT_PUBLISHED
from p2p_llm_forge.training.run_record import RunRecord
from p2p_llm_forge.training.starts import agreed_start, newest_saved


def refuse_two_runs(cluster: Cluster, output_dir: Path) -> None:
    """Raise ForgeError where machines hold different runs, or two starts of one. All ranks must
    call."""
    each = Keepers(list(range(cluster.world_size)))
    agreed_start(cluster, each, output_dir)
    own: dict[str, Any] = {"identity": None, "has_start": False}

    def read() -> None:
        if (record := RunRecord.read(output_dir)) and newest_saved(output_dir) >= 0:
            settings = of_today(record.identity) | {"model_name": None}  # may lie elsewhere
            own.update(identity=fingerprint(settings), has_start=record.started is not None)

    cluster.together(read)
    facts = cluster.gather_facts(own)
    having = [rank for rank, fact in enumerate(facts) if fact["identity"]]
    for rank in having[1:]:
        # One start is one run, though some of its machines may have missed --resume-changed.
        is_same_start = facts[rank]["has_start"] and facts[having[0]]["has_start"]
        if not is_same_start and facts[rank]["identity"] != facts[having[0]]["identity"]:
            raise ForgeError(
                f"rank {rank} holds another run in its --output-dir than rank {having[0]}",
                "move one of them away, or give another --output-dir",
            )


def newest_anywhere(cluster: Cluster, output_dir: Path) -> tuple[int, int, list[str]]:
    """Step and rank of the newest checkpoint that is good somewhere, rank 0's own before those of
    others; -1 and 0 for none. All ranks must call.

    Beside it, for rank 0, a line for each that was skipped. It is verified, so it has been read.
    """
    saved = steps_by_rank(cluster, output_dir)
    skipped = [f"skipped {path}: {reason}" for path, reason in no_checkpoints(output_dir)]
    skipped = skipped if cluster.is_main else []
    seen: set[tuple[str, str]] = set()  # one folder may be that of several ranks
    for step, rank in sorted(
        ((step, rank) for rank, steps in enumerate(saved) for step in steps),
        key=lambda one: (-one[0], one[1]),
    ):
        path = checkpoint_dir(output_dir, step)
        why = damage(path) if rank == cluster.rank else None
        fact = cluster.gather_facts({"path": str(path), "why": why})[rank]
        with as_sent_by(f"rank {rank}"):
            require_shape(fact, {"path": str, "why": (None, str)})
        if fact["why"] is None:
            return step, rank, skipped
        if (fact["path"], fact["why"]) not in seen:
            seen.add((fact["path"], fact["why"]))
            where = f"rank {rank}: " if rank else ""
            skipped.append(f"skipped {where}{fact['path']}: {fact['why']}")
    return -1, 0, skipped


def steps_by_rank(cluster: Cluster, output_dir: Path) -> list[list[int]]:
    """The steps of what is called like checkpoints, by rank, newest first. All ranks must call."""
    found = [fact["saved"] for fact in cluster.gather_facts({"saved": steps_saved(output_dir)})]
    for rank, steps in enumerate(found):
        with as_sent_by(f"rank {rank}"):
            require_shape(steps, [is_count])
    return found


@dataclass(frozen=True)
class Loan:
    """The model of a checkpoint that some ranks read elsewhere than in their own folder.

    path: where this rank would have it; lender: the rank that has it, verified; files: what it has;
    lacking: the ranks that do not see the same.
    """

    path: Path
    lender: int
    files: dict[str, Any]
    lacking: tuple[int, ...]

    @property
    def key(self) -> str:
        """Under which its files are offered."""
        return f"lent/{self.path.name}"

    @property
    def bytes(self) -> int:
        return sum(int(one["size"]) for one in self.files.values())


@contextlib.contextmanager
def lent(config: TrainConfig, cluster: Cluster, step: int, lender: int) -> Iterator[Path]:
    """Where this rank reads the model of a checkpoint while entered. All ranks must call.

    lender: a rank that has it, verified. Who does not see the same one gets a copy for the time,
    one for each machine. Raises ForgeError, on all ranks, where that may not or does not come.
    """
    path = checkpoint_dir(Path(config.output_dir), step)
    own = model_files(path)
    if own and cluster.rank != lender and any(differences(path, own)):
        own = None
    facts = cluster.gather_facts({"files": own})
    files = facts[lender]["files"]
    with as_sent_by(f"rank {lender}"):
        require_shape(files, {str: FILE_SHAPE})
    lacking = tuple(rank for rank, fact in enumerate(facts) if fact["files"] != files)
    if not lacking:
        yield path
        return
    with as_sent_by(f"rank {lender}"):
        require_files(files, config.trust_remote_code)
    with borrowed(config, cluster, Loan(path, lender, files, lacking)) as folder:
        yield folder if cluster.rank in lacking else path
        cluster.barrier()  # who has fetched it removes it for all


@contextlib.contextmanager
def borrowed(config: TrainConfig, cluster: Cluster, loan: Loan) -> Iterator[Path]:
    """Where the files lie, while entered, for those that lack them. All ranks must call.

    Of the ranks that see one folder for temporary files, one fetches.
    """
    is_lacking, exchange = cluster.rank in loan.lacking, cluster.open_files()
    folder = Path(tempfile.gettempdir()) / f"p2p-llm-forge-{new_name(cluster)}"
    copy, lock = folder / "model", folder / "lock" if is_lacking else None
    if cluster.rank == loan.lender:
        exchange.offer(loan.key, loan.path, loan.files)
    what = f"TMPDIR {folder.parent}"
    with removed_if_empty(folder), keep(cluster, lock, what) as (keepers, held):
        targets = [rank for rank in keepers.ranks if rank in loan.lacking]
        found = f"{what} has no room for the checkpoint"
        otherwise = "set TMPDIR to a folder that has it"
        try:
            require_allowed(config, cluster, loan, targets)
            cluster.together(
                lambda: require_room(folder, loan.bytes, found, otherwise) if held else None
            )
            cluster.together(lambda: fetch(exchange, loan, copy) if held else None)
            yield copy
        finally:
            exchange.withdraw(loan.key)
            if held:
                shutil.rmtree(copy, ignore_errors=True)


@contextlib.contextmanager
def removed_if_empty(folder: Path) -> Iterator[None]:
    """Leave no empty folder behind: who has made it need not be who got the lock in it."""
    try:
        yield
    finally:
        with contextlib.suppress(OSError):  # not empty, or not there
            folder.rmdir()


def new_name(cluster: Cluster) -> str:
    """The same new name on all ranks, which nobody else has. All ranks must call."""
    return fingerprint(cluster.gather_facts({"name": secrets.token_hex(8)}))[:16]


def require_allowed(config: TrainConfig, cluster: Cluster, loan: Loan, targets: list[int]) -> None:
    """Print what travels. Raises ForgeError, on all ranks, where that is not allowed."""
    paths = [fact["path"] for fact in cluster.gather_facts({"path": str(loan.path)})]
    trips = [Trip("checkpoint", to, (loan.lender,), loan.bytes, str(paths[to])) for to in targets]
    if config.fetch == "never":
        cluster.together(lambda: refuse(trips, cluster.rank, "to evaluate"))
    announce(config, cluster, trips)


def fetch(exchange: FileExchange, loan: Loan, into: Path) -> None:
    """Fetch the files into a folder that nobody else can read. Raises ForgeError."""
    try:
        into.mkdir(mode=0o700)
    except OSError as error:
        raise ForgeError(
            f"TMPDIR {into.parent.parent} cannot be written: {error.strerror or error}",
            "make it writable, or set TMPDIR to another folder",
        ) from error
    files = {name: FileFacts(one["size"], one["sha256"]) for name, one in loan.files.items()}
    exchange.fetch(files, {loan.lender: loan.key}, into, Watch(loan.path.name))


def model_files(path: Path) -> dict[str, Any] | None:
    """The files of a model and its tokenizer in a checkpoint; None where it is not whole."""
    try:
        files = read_manifest(path)["files"]
    except (OSError, ValueError):
        return None
    if not is_whole(path):
        return None
    kept = (name for name in files if name not in NOT_PUBLISHED and not name.startswith("rank-"))
    return {name: files[name] for name in kept}
