"""The model of --model-name, brought to the machines that lack it by those that have it."""

from __future__ import annotations

import contextlib
import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.fetching import UNASKED
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model import stored
from p2p_llm_forge.model.lora import base_of, is_adapter_folder
from p2p_llm_forge.model.stored import Landing, Stored
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileExchange, FileFacts, Watch
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.partial_files import bytes_missing, with_parts
from p2p_llm_forge.shapes import is_count, require_shape
from p2p_llm_forge.training.fetched_data import refuse_dry_run
from p2p_llm_forge.training.fetching import Errand, Trip, named, run_errand, size_in_words
from p2p_llm_forge.training.run_record import RunRecord, is_token, put_on_record

Sizes = dict[str, int]  # by name of the file

SHAPE = {
    "kind": lambda kind: kind in ("nothing", "folder", "cache", "other"),
    "commit": lambda commit: commit == "" or bool(stored.COMMIT.fullmatch(commit)),
    "sizes": {str: is_count},
    "run": lambda run: run == "" or is_token(run),
    **dict.fromkeys(("name", "folder", "host"), str),
}


@dataclass(frozen=True)
class Model:
    """What a rank has of the model that it was asked for. sizes: of the files that may travel.

    run: the token of the run whose folder it is, or empty.
    """

    name: str
    stored: Stored
    sizes: Sizes
    host: str
    run: str = ""

    @property
    def bytes(self) -> int:
        return sum(self.sizes.values())


def bring_model(config: TrainConfig, cluster: Cluster) -> None:
    """Fetch the model of --model-name where ranks lack it and others have it. All ranks must call.

    Of adapters their base too, if that has a name of the Hub. Raises ForgeError; what has come by
    then stays for the next try.
    """
    if cluster.world_size > 1 and config.fetch != "never":
        asked = config.model_name or ""
        bring_named(config, cluster, asked)
        bring_named(config, cluster, base_on_hub(asked))


def bring_named(config: TrainConfig, cluster: Cluster, name: str) -> None:
    """Fetch the model of this name, which may be none. All ranks must call."""
    if any(fact["asked"] for fact in cluster.gather_facts({"asked": name})):
        own = look(name, config.trust_remote_code)
        models = look_everywhere(cluster, own, config.trust_remote_code)
        sources, lacking = what_to_bring(models)
        if lacking:
            bring(config, cluster, own, models, (sources, lacking))


def model_trips(config: TrainConfig, cluster: Cluster) -> list[Trip]:
    """What a run would fetch of --model-name. All ranks must call; nothing is written."""
    asked = config.model_name or ""
    if config.fetch == "never" or not any(
        fact["asked"] for fact in cluster.gather_facts({"asked": asked})
    ):
        return []
    with_code = config.trust_remote_code
    models = look_everywhere(cluster, look(asked, with_code), with_code)
    sources, lacking = what_to_bring(models)
    if not lacking or is_left_to_hub(config, cluster, models[sources[0]]):
        return []
    return trips_of(cluster, models, (sources, lacking))


def base_on_hub(name: str) -> str:
    """The name of the base on the Hub, if it is adapters that were asked for; else empty."""
    found = stored.find(name)
    with contextlib.suppress(ForgeError):
        if found.folder and is_adapter_folder(Path(found.folder)):
            base = base_of(Path(found.folder))
            return "" if stored.is_path(base) else base
    return ""


def look(name: str, with_code: bool) -> Model:
    """What this rank has of the model; its folder is the one to read and to write."""
    found, folder = stored.find(name), Path()
    sizes: Sizes = {}
    if found.kind in ("folder", "cache"):
        folder = Path(found.folder)
        sizes = {one: (folder / one).stat().st_size for one in stored.names_in(folder, with_code)}
    return Model(name, found, sizes, platform.node(), run_in(Path(name)) if name else "")


def look_everywhere(cluster: Cluster, mine: Model, with_code: bool) -> list[Model]:
    """What each rank has of the model, by rank, as all ranks see it. All ranks must call.

    Paths may be written otherwise here, and are for messages. Raises ForgeError for what no rank
    of ours says.
    """
    own = {**asdict(mine.stored), "name": mine.name, "sizes": mine.sizes}
    own |= {"host": mine.host, "run": mine.run}
    models = []
    for rank, fact in enumerate(cluster.gather_facts(own)):
        with as_sent_by(f"rank {rank}"):
            require_shape(fact, SHAPE)
            if not all(stored.may_travel(one, with_code) for one in fact["sizes"]):
                raise ValueError("other files than a model has")
            of_rank = Stored(fact["kind"], fact["folder"], fact["commit"])
            models.append(Model(fact["name"], of_rank, fact["sizes"], fact["host"], fact["run"]))
    return models


def run_in(folder: Path) -> str:
    """The token of the run whose folder it is; empty where it is none."""
    with contextlib.suppress(ForgeError):
        if record := RunRecord.read(folder):
            return record.started or ""
    return ""


def what_to_bring(models: Sequence[Model]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """The ranks that can bring the model, and those that lack it and were asked for the same.

    A path on one machine is none of another's business, but for the same path; a name of the Hub
    that only one was asked for comes from the Hub. Where a run has left its model on one machine
    and its record on another, maybe with a copy of a checkpoint, the model goes beside that.
    """
    having = [rank for rank, one in enumerate(models) if one.sizes]
    if not having:
        return (), ()
    first = models[having[0]]
    lacking = [
        rank
        for rank, one in enumerate(models)
        if (one.stored.kind == "nothing" or is_of_run(one, first))
        and one.name
        and (one.name == first.name or stored.is_path(one.name))
    ]
    same = [
        rank
        for rank in having
        if models[rank].sizes == first.sizes and models[rank].stored.commit == first.stored.commit
    ]
    return tuple(same), tuple(lacking)


def is_of_run(one: Model, first: Model) -> bool:
    """Whether it is the folder of the run that has made the model, without that."""
    return one.stored.kind == "other" and one.run == first.run != ""


def bring(
    config: TrainConfig,
    cluster: Cluster,
    own: Model,
    models: Sequence[Model],
    who: tuple[tuple[int, ...], tuple[int, ...]],
) -> None:
    """Fetch the model onto the ranks that lack it. own: see `look`; who: see `what_to_bring`."""
    sources, _ = who
    source = models[sources[0]]
    if is_left_to_hub(config, cluster, source):
        if cluster.is_main and not config.dry_run:
            print(left_to_hub(source, named(sources, [one.host for one in models])))
        return
    if config.dry_run:
        refuse_dry_run(cluster, trips_of(cluster, models, who))
    hashes = common_hashes(cluster, own, source.sizes, sources)
    files = {name: FileFacts(one, hashes[name]) for name, one in source.sizes.items()}
    run_errand(config, cluster, errand_for(cluster.rank, own, source, who, files))


def errand_for(
    rank: int,
    own: Model,
    source: Model,
    who: tuple[tuple[int, ...], tuple[int, ...]],
    files: dict[str, FileFacts],
) -> Errand:
    """What a rank does that the model may come to all. own: what it has; who: as for `bring`."""
    sources, lacking = who
    is_into_run = is_of_run(own, source)
    landing = Landing.of(own.name, source.stored, is_into_run)

    def begin() -> int | None:
        if stored.find(own.name).kind in ("folder", "cache"):
            return None  # of a share that shows late what others have written
        if is_into_run:
            refuse_files_in_the_way(landing.target, [*files])
        landing.begin(with_parts(files))
        return bytes_missing(landing.coming, coming())

    def coming() -> dict[str, FileFacts]:
        return {n: one for n, one in files.items() if not landing.is_here(n, one.size)}

    def fetch(exchange: FileExchange, asked: Mapping[int, str]) -> None:
        exchange.fetch(coming(), asked, landing.coming, Watch("model"))

    def publish() -> None:
        if is_into_run:
            put_on_record(landing.target, files)
        landing.publish()

    return Errand(
        what="model",
        flag="--model-name",
        folder=landing.target,
        key=f"model/{source.name}",
        sources=sources,
        offered=(Path(own.stored.folder), [*files]) if rank in sources else None,
        lock=landing.aside / stored.LOCK if rank in lacking else None,
        begin=begin,
        fetch=fetch,
        publish=publish,
    )


def left_to_hub(model: Model, others: str) -> str:
    """A line of what those who lack the model take from the Hub, though others have it."""
    said = f"{size_in_words(model.bytes)} of {model.name} are left to the Hub"
    return f"model     {said}; --fetch yes brings them from {others}"


def refuse_files_in_the_way(folder: Path, names: Sequence[str]) -> None:
    """Raise ForgeError if files of a model lie in the folder of a run that has not written them."""
    record = RunRecord.read(folder)
    wrote = record.wrote if record else frozenset()
    if others := [name for name in names if name not in wrote and os.path.lexists(folder / name)]:
        raise ForgeError(
            f"--model-name {folder} is the folder of a run without its model, and holds"
            f" {others[0]}, which is not of that run",
            f"move {folder / others[0]} away",
        )


def is_left_to_hub(config: TrainConfig, cluster: Cluster, source: Model) -> bool:
    """Whether all machines ask the Hub itself, as ever: for a trial, or for very much.

    All ranks must call.
    """
    if source.stored.kind != "cache":
        return False
    is_one = config.dry_run or (config.fetch != "yes" and source.bytes > UNASKED)
    return not any(fact["offline"] for fact in cluster.gather_facts(offline())) and is_one


def offline() -> dict[str, Any]:
    """Whether this machine asks the Hub for nothing."""
    from huggingface_hub import constants

    return {"offline": bool(constants.HF_HUB_OFFLINE)}


def common_hashes(
    cluster: Cluster, own: Model, sizes: Sizes, sources: Sequence[int]
) -> dict[str, str]:
    """The SHA-256 of the files as the first source has them, by name. All ranks must call.

    Raises ForgeError for what no rank of ours says.
    """
    hashes: dict[str, str] = {}
    if cluster.rank == sources[0]:
        hashes = stored.hashes_of(Path(own.stored.folder), [*sizes])
    by_rank = cluster.gather_facts({"hashes": hashes})
    with as_sent_by(f"rank {sources[0]}"):
        found = by_rank[sources[0]]["hashes"]
        require_shape(found, {str: str})
        if found.keys() != sizes.keys():
            raise ValueError("other files than before")
        return {name: str(one) for name, one in found.items()}


def trips_of(
    cluster: Cluster, models: Sequence[Model], who: tuple[tuple[int, ...], tuple[int, ...]]
) -> list[Trip]:
    """What would come, as far as it can be said without writing: once to each machine."""
    sources, lacking = who
    size, trips = models[sources[0]].bytes, dict[tuple[Any, str], Trip]()
    first = cluster.launch.rank - cluster.launch.local_rank
    machines = [fact["first"] for fact in cluster.gather_facts({"first": first})]
    for rank in lacking:
        one = models[rank]
        trip = Trip("model", rank, sources, size, one.name)
        trips.setdefault((machines[rank], one.name), trip)
    return list(trips.values())
