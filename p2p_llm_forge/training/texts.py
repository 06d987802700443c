"""The text that machines are given as --dataset-path: whose counts, and that it is one text."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import ANOTHER_TEXT, Manifest
from p2p_llm_forge.data.fetched import Found
from p2p_llm_forge.data.hub import near
from p2p_llm_forge.errors import ForgeError, Problems
from p2p_llm_forge.files import sha256_of
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.keepers import keep
from p2p_llm_forge.peers.preflight import hosts_of
from p2p_llm_forge.shapes import is_count, require_shape
from p2p_llm_forge.training.fetched_data import data_of_run, look_everywhere
from p2p_llm_forge.training.fetching import named
from p2p_llm_forge.training.identity import LOCK

FILE = ("size", "changed_ns", "inode")  # equal on machines that see one file of a share
SHAPE = {**dict.fromkeys(FILE, is_count), "sha256": str}
NO_FILE = {**dict.fromkeys(FILE, 0), "sha256": ""}


def who_prepares(seen: Sequence[Found]) -> int | None:
    """The rank whose text counts: the first that has anything, if that is one file."""
    first = next((rank for rank, found in enumerate(seen) if found.kind != "nothing"), None)
    return first if first is not None and seen[first].kind == "file" else None


def refuse_different_texts(
    config: TrainConfig, cluster: Cluster, seen: Sequence[Found], maker: int
) -> None:
    """Raise ForgeError unless all ranks that have a text have that of `maker`. All must call.

    Texts of one size are read: no more than who prepares them does at every start.
    """
    texts = [rank for rank, found in enumerate(seen) if found.kind == "file"]
    if all(found.kind == "nothing" for rank, found in enumerate(seen) if rank != maker):
        return
    path = Path(config.dataset_path)
    facts = all_facts(cluster, path, cluster.rank in texts, has_hash=False)
    alike = [rank for rank in texts if facts[rank]["size"] == facts[maker]["size"]]
    if any(facts[rank] != facts[maker] for rank in alike):
        facts = all_facts(cluster, path, cluster.rank in alike, has_hash=True)
    hosts, problems, first = hosts_of(cluster), Problems(), facts[maker]
    for rank, found in enumerate(seen):
        one = facts[rank]
        is_same = one == first or (rank in alike and one["sha256"] == first["sha256"] != "")
        who, what = named([rank], hosts), f"another text than {named([maker], hosts)}"
        if found.kind != "file":
            what = f"not the text that {named([maker], hosts)} has"
        elif rank in alike:
            what += f" (SHA-256 {one['sha256'][:12]} and {first['sha256'][:12]})"
        else:
            what += f" ({one['size']:,} and {first['size']:,} bytes)"
        copy = f"copy rank {maker}'s to its place"
        problems.require(
            is_same or found.kind == "nothing",
            f"{found.where} of {who} is {what}",
            f"there, {copy}"
            if config.fetch == "never"
            else f"there, move it away, and what rank {maker}'s becomes is fetched; or {copy}",
        )
    problems.raise_any()


def require_common_folder(config: TrainConfig, cluster: Cluster, folder: Path, maker: int) -> None:
    """Raise ForgeError where `maker` would prepare its text, with --fetch never, and others could
    not see it. All ranks must call. folder: below --output-dir."""
    if config.fetch != "never" or config.dry_run or cluster.world_size == 1:
        return
    seen = look_everywhere(cluster, folder)
    lacking = {rank for rank, found in enumerate(seen) if found.kind == "nothing"}
    if len(lacking) == cluster.world_size:
        output_dir = folder.parent
        with keep(cluster, output_dir / LOCK, f"--output-dir {output_dir}") as (keepers, _):
            lacking -= set(keepers.sharing(maker))
    hosts, problems = hosts_of(cluster), Problems()
    for rank in sorted(lacking - {maker}):
        problems.require(
            False,
            f"{named([rank], hosts)} would not see what {named([maker], hosts)} makes of its text"
            f" in {seen[maker].where}, and --fetch never brings nothing",
            "leave --fetch never out on all machines; or prepare the text by itself, copy the"
            " folder to all machines and give it as --dataset-path",
        )
    problems.raise_any()


def all_facts(cluster: Cluster, path: Path, is_asked: bool, has_hash: bool) -> list[dict[str, Any]]:
    """What each rank's text is as a file, by rank; of those that are not asked nothing.

    All ranks must call. Raises ForgeError where it cannot be read.
    """

    def look() -> dict[str, Any]:
        if not is_asked:
            return NO_FILE
        try:
            facts = path.stat()
            sha256 = sha256_of(path) if has_hash else ""
        except OSError as error:
            raise ForgeError(
                f"--dataset-path {path} cannot be read: {error.strerror or error}",
                "make it readable, or give another file",
            ) from error
        values = facts.st_size, max(0, facts.st_mtime_ns), facts.st_ino, sha256
        return dict(zip(SHAPE, values, strict=True))

    all_of_them = cluster.gather_facts(cluster.together(look))
    for rank, fact in enumerate(all_of_them):
        with as_sent_by(f"rank {rank}"):
            require_shape(fact, SHAPE)
    return all_of_them


def data_to_go_on_with(config: TrainConfig, cluster: Cluster) -> str:
    """The fingerprint of the data of the run that is resumed or evaluated; empty without one.

    All ranks must call.
    """
    goes_on = bool(config.resume or config.eval_only) and not config.overwrite
    return data_of_run(config, cluster, goes_on)


@contextlib.contextmanager
def text_of_run_named(config: TrainConfig, folder: Path, wanted: str) -> Iterator[None]:
    """Where `folder` was made of another text of this name, say how the run goes on with that.

    wanted: see `data_to_go_on_with`.
    """
    try:
        yield
    except ForgeError as error:
        if not any(ANOTHER_TEXT in one.found for one in error.problems):
            raise
        made = Manifest.load(folder)
        if made.fingerprint != wanted or made_of(made) != (Path(config.dataset_path).name,):
            raise
        fix = (
            f"to go on with the text that it was made of, move {config.dataset_path} away, or put"
            " that text in its place; for this one give another --output-dir (--overwrite throws"
            " the run away)"
        )
        raise ForgeError.of(
            replace(one, fix=fix) if ANOTHER_TEXT in one.found else one for one in error.problems
        ) from error


def made_of(dataset: Manifest) -> tuple[str, ...]:
    """The names of the texts of a dataset."""
    return tuple(map(str, dataset.arguments.get("dataset_path") or ()))


def refuse_missing_file(path: Path) -> None:
    """Raise ForgeError for what is called like a file, and is not there."""
    if path.suffix and not path.exists():
        alike = " or ".join(near(str(path)))
        fix = f"did you mean {alike}? Else give" if alike else "give"
        raise ForgeError(f"--dataset-path {path}: no such file", f"{fix} a text or a folder")


def data_of_lost_text(config: TrainConfig, cluster: Cluster, folder: Path) -> str:
    """The fingerprint of what a run goes on with that was made of the text, which no machine has;
    empty where no machine has that in `folder`. All ranks must call.

    Without a run it may be another text that had this name, and the path may be misspelt.
    """
    wanted, text = data_to_go_on_with(config, cluster), Path(config.dataset_path)
    seen = look_everywhere(cluster, folder)
    made = [found.made_of for found in seen if wanted and found.fingerprint == wanted]
    is_left = cluster.main_only(lambda: (text.name,) in made)
    if is_left and cluster.is_main:
        print(f"data      {text} is on no machine; {folder}, made of it, is used", flush=True)
    return wanted if is_left else ""
