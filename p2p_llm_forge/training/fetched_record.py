"""What belongs to a run beside its checkpoints, for folders that have none of it yet."""

from __future__ import annotations

import contextlib
import os
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.files import fsync, parse_json, sha256_of
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileExchange, FileFacts
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.keepers import Keepers, on_keepers
from p2p_llm_forge.shapes import require_shape
from p2p_llm_forge.training.checkpoint import not_written
from p2p_llm_forge.training.identity import MAY_CHANGE
from p2p_llm_forge.training.manifest import FILE_SHAPE
from p2p_llm_forge.training.publishing import UPLOADED
from p2p_llm_forge.training.run_record import METRICS, SAMPLES, RunRecord, put_on_record
from p2p_llm_forge.training.tracking import lines_until

BESIDE = (METRICS, SAMPLES, UPLOADED)  # files of rank 0 that the run goes on writing


def adopt_record(cluster: Cluster, keepers: Keepers, config: TrainConfig, run: RunRecord) -> None:
    """Put the run's record, as the peers have agreed on it, into all their folders.

    run: its start, and when it resumed. What a run may change while it goes on (--resume-changed)
    is as the machine has it that resumed like that. To be called before a folder gets a checkpoint
    of that history: a start that is killed between the two would leave a folder that looks as if
    its machine had gone on by itself. All ranks must call. Raises ForgeError.
    """
    output_dir = Path(config.output_dir)
    own = RunRecord.read(output_dir) if keepers.keeps(cluster.rank) else None
    is_head = own is not None and own.resumed == run.resumed
    facts = cluster.gather_facts({"identity": own and own.identity, "is_head": is_head})
    having = [fact for fact in facts if fact["identity"] is not None]
    if not having:
        return
    known = max(having, key=lambda fact: bool(fact["is_head"]))["identity"]
    if config.model_name and known.get("model_name"):
        known = {**known, "model_name": config.model_name}  # each machine may have it elsewhere

    def write() -> None:
        try:
            found = RunRecord.read(output_dir)
            own = found or RunRecord(known)
            fixed = {key: one for key, one in own.identity.items() if key not in MAY_CHANGE}
            changed = {key: known[key] for key in MAY_CHANGE if key in known}
            identity = fixed | changed
            agreed = replace(own, identity=identity, started=run.started, resumed=run.resumed)
            if agreed != found:
                agreed.write(output_dir)
        except OSError as error:
            raise not_written(f"{output_dir} could not be written", error) from error

    on_keepers(cluster, keepers, write)


def fetch_figures(
    config: TrainConfig, cluster: Cluster, keepers: Keepers, state: dict[str, Any]
) -> None:
    """Bring the run's figures to every folder that has none as good until the checkpoint's step.

    state: the trainer's, in the checkpoint that is resumed. Figures that go with it count before
    any that go further: a machine may have trained on without the others, for nothing. What others
    have put in their place stays. All ranks must call. Raises ForgeError.
    """
    if config.fetch == "never":
        return
    output_dir = Path(config.output_dir)
    own = worth(output_dir / METRICS, state) if keepers.keeps(cluster.rank) else [0, -1]
    by_rank = [fact["worth"] for fact in cluster.gather_facts({"worth": own})]
    for rank, one in enumerate(by_rank):
        with as_sent_by(f"rank {rank}"):
            require_shape(one, [int])
            if len(one) != 2:
                raise ValueError("not what figures are worth")
    source = max(keepers.ranks, key=lambda rank: (by_rank[rank], -rank))
    if all(by_rank[rank] == by_rank[source] for rank in keepers.ranks):
        return
    of_source = facts_of(output_dir) if cluster.rank == source else None
    sent = cluster.gather_facts({"files": of_source})[source]["files"]
    with as_sent_by(f"rank {source}"):
        require_shape(sent, {str: FILE_SHAPE})
        if not set(sent) <= set(BESIDE):
            raise ValueError("other files than figures")
    exchange, key = cluster.open_files(), "figures"
    if cluster.rank == source:
        exchange.offer(key, output_dir, sent)
    cluster.barrier()
    is_wanting = keepers.keeps(cluster.rank) and own != by_rank[source]
    cluster.together(
        lambda: fetch_beside(exchange, {source: key}, sent, output_dir) if is_wanting else None
    )
    exchange.withdraw(key)


def fetch_beside(
    exchange: FileExchange, sources: dict[int, str], sent: dict[str, Any], output_dir: Path
) -> None:
    """Fetch files into the run's folder, but for those that others have put in their place."""
    record = RunRecord.read(output_dir)
    wrote = record.wrote if record else frozenset()
    files = {
        name: FileFacts(one["size"], one["sha256"])
        for name, one in sent.items()
        if name in wrote or not os.path.lexists(output_dir / name)
    }
    aside = output_dir / "tmp-fetched-0-00000000"
    exchange.fetch(files, sources, aside)
    try:
        put_on_record(output_dir, files)
        for name in files:
            (aside / name).replace(output_dir / name)
        fsync(output_dir)
    except OSError as error:
        raise not_written(f"{output_dir} could not be written", error) from error
    shutil.rmtree(aside, ignore_errors=True)


def worth(metrics: Path, state: dict[str, Any]) -> list[int]:
    """Whether figures go with a checkpoint (1 or 0), and their last step until its own; -1 without.

    They do if they hold the loss that was the last one then, and its evaluation, if it has one.
    """
    step, found = -1, list[dict[str, Any]]()
    with contextlib.suppress(OSError):
        found = [parse_json(line) for line in lines_until(metrics, state["step"])]
        step = found[-1]["step"] if found else -1
    losses = [line["loss"] for line in found if "loss" in line]
    evaluated = [line.get("eval_loss") for line in found if line["step"] == state["step"]]
    goes_with = (losses or [None])[-1] == state.get("train_loss")
    if "eval_loss" in state["figures"]:
        goes_with &= state["figures"]["eval_loss"] in evaluated
    return [int(goes_with), step]


def facts_of(output_dir: Path) -> dict[str, Any]:
    """The run's own files of figures, with size and hash."""
    record = RunRecord.read(output_dir)
    named = [name for name in BESIDE if record and name in record.wrote]
    paths = {name: output_dir / name for name in named if (output_dir / name).is_file()}
    return {
        name: {"size": path.stat().st_size, "sha256": sha256_of(path)}
        for name, path in paths.items()
    }
