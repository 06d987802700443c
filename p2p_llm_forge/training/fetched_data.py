"""The prepared dataset of a run, brought to the machines that lack it by those that have it."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data import fetched
from p2p_llm_forge.data.dataset import MANIFEST, UNFINISHED, Manifest, files_of_others
from p2p_llm_forge.data.fetched import Found
from p2p_llm_forge.data.hub import near
from p2p_llm_forge.data.unfinished import LOCK
from p2p_llm_forge.errors import ForgeError, Problems
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileExchange, FileFacts, Watch
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.partial_files import bytes_missing
from p2p_llm_forge.peers.preflight import FOLDER_LAG_S, hosts_of
from p2p_llm_forge.polling import wait_for
from p2p_llm_forge.shapes import is_count, require_shape
from p2p_llm_forge.training.fetching import Errand, Trip, in_words, named, run_errand
from p2p_llm_forge.training.run_record import RunRecord

LENGTHS = {"fingerprint": 64, "manifest": 64}  # hexadecimal digits
SHAPE = {
    "kind": lambda kind: kind in ("nothing", "file", "dataset", "other"),
    **dict.fromkeys(("where", *LENGTHS), str),
    **dict.fromkeys(("bytes", "manifest_bytes"), is_count),
}


@dataclass(frozen=True)
class Sought:
    """The dataset of a run, as it is looked for. seen: what lies in `folder`, by rank.

    is_text: it is what a text becomes; maker: the rank whose text that is, if one has it. wanted:
    its fingerprint where a run goes on with it; else empty.
    """

    folder: Path
    seen: Sequence[Found]
    is_text: bool = False
    maker: int | None = None
    wanted: str = ""


@dataclass(frozen=True)
class Brought:
    """Which dataset comes to which ranks. dataset: as its sources have it.

    replaces_all: also what was prepared in the place where it comes.
    """

    dataset: Found
    sources: tuple[int, ...]
    lacking: tuple[int, ...]
    replaces_all: bool = False


def look_everywhere(cluster: Cluster, folder: Path) -> list[Found]:
    """What lies in each rank's folder, by rank. All ranks must call; each has a folder of its own.

    Raises ForgeError where one cannot be looked at, or says what no rank of ours does.
    """

    def look() -> Found:
        try:
            return fetched.look(folder)
        except OSError as error:
            raise ForgeError(
                f"{folder} cannot be read: {error.strerror or error}",
                "make it readable, or give another folder",
            ) from error

    seen, own = [], cluster.together(look)
    for rank, facts in enumerate(cluster.gather_facts({**asdict(own), "made_of": [*own.made_of]})):
        with as_sent_by(f"rank {rank}"):
            require_shape(facts, SHAPE)
            if facts["kind"] == "dataset" and any(
                len(facts[name]) != length or set(facts[name]) - set("0123456789abcdef")
                for name, length in LENGTHS.items()
            ):
                raise ValueError("a dataset has no such fingerprint")
            seen.append(Found(**{**facts, "made_of": tuple(map(str, facts["made_of"]))}))
    return seen


def what_is_missing(config: TrainConfig, cluster: Cluster, sought: Sought) -> Brought | None:
    """What has to come so that all ranks have the dataset; None where they have it.

    All ranks must call. Raises ForgeError where it is not clear which one it is.
    """
    seen, wanted = sought.seen, sought.wanted
    replaces_all = sought.is_text and config.overwrite  # what a run has made gives way with it
    if not replaces_all:
        refuse_other_than_the_runs(seen, wanted, sought.is_text)
        refuse_others(
            {
                rank: (found.fingerprint, found.where)
                for rank, found in enumerate(seen)
                if found.kind == "dataset" and (not found.is_fetched or rank == sought.maker)
            },
            sought.maker,
            sought.is_text,
        )
        refuse_two_versions(seen, wanted)
    refuse_what_is_in_the_way(config, cluster, sought.folder, seen)
    if sought.maker is not None and not wanted:
        wanted = seen[sought.maker].fingerprint  # what others have made before is of another text
    return what_to_bring(seen, replaces_all, wanted)


def what_to_bring(
    seen: Sequence[Found], replace_all: bool = False, wanted: str = ""
) -> Brought | None:
    """The dataset that ranks lack and others have; None where there is nothing to bring.

    It is the one with the fingerprint `wanted` (see `what_is_missing`), else that of the first rank
    with one that was prepared there, else the only one there is. One that was fetched before gives
    way to it; with `replace_all` one that was prepared does too. Ranks with something else are left
    alone, and so is everybody where it is not clear which one it is: what they have is refused.
    """
    having = [found for found in seen if found.kind == "dataset"]
    if not having:
        return None
    prepared = [found for found in having if not found.is_fetched]
    of_run = [found for found in having if found.fingerprint == wanted]
    dataset = (of_run or prepared or having)[0]
    if not (of_run or prepared or replace_all) and len({one.fingerprint for one in having}) > 1:
        return None
    if not replace_all and any(one.fingerprint != dataset.fingerprint for one in prepared):
        return None
    lacking = tuple(
        rank
        for rank, one in enumerate(seen)
        if one.kind == "nothing"
        or (one.kind == "dataset" and one.fingerprint != dataset.fingerprint)
    )
    if not lacking or any(found.kind in ("file", "other") for found in seen):
        return None
    sources = [rank for rank, one in enumerate(seen) if one.manifest == dataset.manifest]
    return Brought(dataset, tuple(sources), lacking, replace_all)


def wanted_by_run(config: TrainConfig, cluster: Cluster) -> str:
    """The fingerprint of the data of the run that is resumed; empty where none is, or where its
    data may be others now. All ranks must call."""
    is_resumed = config.resume and not (config.overwrite or config.resume_changed)
    return data_of_run(config, cluster, bool(is_resumed))


def data_of_run(config: TrainConfig, cluster: Cluster, is_asked: bool) -> str:
    """The fingerprint of the data of the run in --output-dir, as the rank has it on record that
    has resumed it most often; empty where none does that is asked. All ranks must call."""
    record = None
    if is_asked and config.output_dir:
        with contextlib.suppress(ForgeError):  # refused where it is resumed
            record = RunRecord.read(Path(config.output_dir))
    own = {"run": "", "times": 0}
    if record is not None:
        own = {"run": str(record.identity.get("dataset") or ""), "times": len(record.resumed)}
    facts = cluster.gather_facts(own)
    for rank, fact in enumerate(facts):
        with as_sent_by(f"rank {rank}"):
            require_shape(fact, {"run": str, "times": is_count})
    having = [fact for fact in facts if fact["run"]]
    return str(max(having, key=lambda fact: fact["times"])["run"]) if having else ""


def refuse_others(
    by_rank: Mapping[int, tuple[str, str]], maker: int | None = None, is_text: bool = False
) -> None:
    """Raise ForgeError unless all have the dataset of `maker`, by default of the first of them.

    by_rank: fingerprint and folder; is_text: the dataset is what a text has become.
    """
    problems, first = Problems(), min(by_rank, default=0)
    if maker is not None and maker in by_rank:
        first = maker
    for rank, (data, path) in by_rank.items():
        problems.require(
            data == by_rank[first][0],
            f"rank {rank} has other data ({data[:12]} in {path}) than rank {first}"
            f" ({by_rank[first][0][:12]} in {by_rank[first][1]})",
            f"on rank {rank}, move that folder away: what rank {first} has made of its text then"
            " comes there (with --fetch never, copy it there)"
            if is_text
            else f"copy rank {first}'s folder to the machine of rank {rank}, or share it",
        )
    problems.raise_any()


def refuse_other_than_the_runs(seen: Sequence[Found], wanted: str, is_text: bool) -> None:
    """Raise ForgeError where a machine has prepared other data than those of the run that is
    resumed (`wanted`) and another one has these: they may be the last copy.

    is_text: they are made of a text, and would be made again.
    """
    having = [rank for rank, found in enumerate(seen) if found.fingerprint == wanted]
    if not wanted or not having:
        return
    problems, source = Problems(), having[0]
    for rank, found in enumerate(seen):
        problems.require(
            found.kind != "dataset" or found.is_fetched or found.fingerprint == wanted,
            f"rank {rank} has prepared other data ({found.fingerprint[:12]} in {found.where}) than"
            f" those of the run that is to go on ({wanted[:12]} in {seen[source].where} of rank"
            f" {source})",
            f"on rank {rank}, move that folder{' and its text' if is_text else ''} away: the run's"
            " data are then brought there",
        )
    problems.raise_any()


def refuse_two_versions(seen: Sequence[Found], wanted: str) -> None:
    """Raise ForgeError where machines have fetched different datasets, and none is `wanted` or was
    prepared there: which one is the newer is not known, and the last of its kind may be there."""
    having = {rank: found for rank, found in enumerate(seen) if found.kind == "dataset"}
    if any(not one.is_fetched or one.fingerprint == wanted for one in having.values()):
        return
    problems, first = Problems(), min(having, default=0)
    for rank, found in having.items():
        problems.require(
            found.fingerprint == having[first].fingerprint,
            f"rank {rank} has fetched other data ({found.fingerprint[:12]} in {found.where}) than"
            f" rank {first} ({having[first].fingerprint[:12]} in {having[first].where}), and no"
            " machine is left that has prepared one",
            "move away the one that is out of date; the other then comes in its place",
        )
    problems.raise_any()


def bring_data(config: TrainConfig, cluster: Cluster, folder: Path, brought: Brought) -> None:
    """Fetch the dataset into the folder of each rank that lacks it. All ranks must call.

    Raises ForgeError; what has come by then stays for the next try.
    """
    if config.fetch == "never":
        refuse_to_fetch(cluster, folder, brought)
    if config.dry_run:
        refuse_dry_run(cluster, trips_of(cluster, folder, brought))
    run_errand(config, cluster, errand_for(cluster.rank, folder, brought))
    if cluster.rank in brought.lacking:
        wait_for(lambda: fetched.look(folder).kind == "dataset", FOLDER_LAG_S)


def refuse_what_is_in_the_way(
    config: TrainConfig, cluster: Cluster, folder: Path, seen: Sequence[Found]
) -> None:
    """Raise ForgeError where something else lies in the place of the data. All ranks must call."""
    sources = [rank for rank, found in enumerate(seen) if found.kind == "dataset"]
    hosts = hosts_of(cluster) if sources else []

    def look() -> None:
        if sources and seen[cluster.rank].kind in ("file", "other"):
            fix = f"move it away, and the data come from {named(sources, hosts)}"
            if config.fetch == "never":
                fix = f"move it away, and copy the folder of {named(sources[:1], hosts)} there"
            raise ForgeError(fetched.in_words(folder), fix)

    cluster.together(look)


def refuse_what_is_nowhere(config: TrainConfig, cluster: Cluster, path: Path) -> None:
    """Raise ForgeError in an elastic launch: a machine that has it may come later. All must call.

    Elsewhere all machines are here, and what is missing is refused where it is opened, as is a
    file whose name is misspelt.
    """
    launch = cluster.launch
    if not launch.is_elastic or launch.by_torchrun or config.fetch == "never":
        return
    if cluster.main_only(lambda: bool(path.suffix and near(str(path)))):
        return
    facts = cluster.gather_facts({"first": launch.rank - launch.local_rank})
    count = len({fact["first"] for fact in facts})
    few = f"none of the {count} machines that are" if count > 1 else "the only machine that is"
    raise ForgeError(
        f"{path}: {few} here {'has' if count > 1 else 'lacks'} it",
        f"start the one that has it, too, with --min-peers {count + 1} before train.py on the main"
        " machine, which then waits for it; or give a text that is there, or what prepare_data.py"
        " has made of one",
    )


def refuse_to_fetch(cluster: Cluster, folder: Path, brought: Brought) -> None:
    """Raise ForgeError where the dataset is missing, with --fetch never. All must call."""
    hosts = hosts_of(cluster)

    def look() -> None:
        if cluster.rank in brought.lacking:
            what = "not the data of the others" if folder.exists() else "no such folder"
            raise ForgeError(
                f"{folder}: {what}; {named(brought.sources, hosts)} has the data, and --fetch never"
                " brings nothing",
                "leave --fetch never out on all machines, or copy the folder there by hand",
            )

    cluster.together(look)


def errand_for(rank: int, folder: Path, brought: Brought) -> Errand:
    """What a rank does that the dataset may come to all."""
    dataset, place = brought.dataset, folder  # until it is known

    def begin() -> int | None:
        nonlocal place
        found = fetched.look(folder)
        if found.kind == "dataset" and found.fingerprint == dataset.fingerprint:
            return None  # of a share that shows late what others have written
        refuse_to_replace(folder, found, brought)
        place = fetched.place_for(folder, dataset.manifest)
        try:
            return bytes_missing(place, coming())
        except (OSError, ForgeError):  # the manifest comes first
            return dataset.bytes

    def coming() -> dict[str, FileFacts]:
        files = fetched.files_coming(place, dataset)  # by the manifest, which names them
        return {name: FileFacts(one["bytes"], one["sha256"]) for name, one in files.items()}

    def fetch(exchange: FileExchange, sources: Mapping[int, str]) -> None:
        manifest = FileFacts(dataset.manifest_bytes, dataset.manifest)
        exchange.fetch({MANIFEST: manifest}, sources, place)
        exchange.fetch(coming(), sources, place, Watch("data"))

    offered = None
    if rank in brought.sources:
        offered = folder, [MANIFEST, *Manifest.load(folder).files]
    return Errand(
        what="data",
        flag="--dataset-path",
        folder=folder,
        key=f"data/{dataset.manifest}",
        sources=brought.sources,
        offered=offered,
        lock=folder / UNFINISHED / LOCK if rank in brought.lacking else None,
        begin=begin,
        fetch=fetch,
        publish=lambda: fetched.put_in_place(place, folder, dataset.manifest),
    )


def refuse_to_replace(folder: Path, found: Found, brought: Brought) -> None:
    """Raise ForgeError where a dataset cannot come into a folder without harm.

    found: what lies there, seen with the lock held, so that nobody prepares one there meanwhile.
    """
    is_prepared = found.kind == "dataset" and not found.is_fetched
    if found.kind in ("file", "other") or (is_prepared and not brought.replaces_all):
        what = "another dataset has been prepared" if is_prepared else "something else has come"
        fix = "move it away, and start this again"
        raise ForgeError(f"{folder}: {what} there since this start began", fix)
    if others := files_of_others(folder):
        raise ForgeError(
            f"{folder} holds {others[0]}, which is of no dataset, and the data would take the place"
            " of those there",
            f"move {folder / others[0]} away",
        )


def trips_of(cluster: Cluster, folder: Path, brought: Brought) -> list[Trip]:
    """What would come, as far as it can be said without writing: once to each machine."""
    launch = cluster.launch
    facts: dict[str, Any] = {"folder": str(folder), "first": launch.rank - launch.local_rank}
    all_facts, machines = cluster.gather_facts(facts), dict[tuple[Any, Any], Trip]()
    for rank in brought.lacking:
        place, size = str(all_facts[rank]["folder"]), brought.dataset.bytes
        trip = Trip("data", rank, brought.sources, size, place)
        machines.setdefault((all_facts[rank]["first"], place), trip)
    return list(machines.values())


def refuse_dry_run(cluster: Cluster, trips: Sequence[Trip]) -> None:
    """Raise ForgeError: what is not there cannot be tried, and nothing is fetched for a trial."""
    hosts, problems = hosts_of(cluster), Problems()
    for trip in trips:
        problems.require(
            False,
            f"--dry-run fetches nothing, and {trip.where} is not on all machines: a run would fetch"
            f" {' '.join(*[line.split() for line in in_words([trip], hosts, None)])}",
            "leave --dry-run out, or copy the folder there by hand",
        )
    problems.raise_any()
