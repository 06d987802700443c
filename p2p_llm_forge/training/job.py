"""What a run is asked for, with whom, on which data: settled once, before anything is written."""

from __future__ import annotations

from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.data.dataset import PreparedDataset, open_prepared
from p2p_llm_forge.errors import ForgeError, Problems
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.training.identity import recorded_identity, refuse_another_run
from p2p_llm_forge.training.plan import Plan, plan_updates


@dataclass(frozen=True)
class Job:
    """What is settled before a run begins."""

    config: TrainConfig
    cluster: Cluster
    data: PreparedDataset
    plan: Plan

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def document_end(self) -> int | None:
        """The token that attention does not cross; None where it reads a block as one text."""
        return self.data.manifest.eos_token_id if self.config.document_mask else None

    def identity(self) -> dict[str, Any]:
        """What makes its run this run and no other."""
        config, manifest = self.config, self.data.manifest
        return {
            "dataset": manifest.fingerprint,
            "tokenizer": manifest.tokenizer_fingerprint,
            "sequence_length": manifest.sequence_length,
            "model_name": config.model_name,
            "model_type": config.model_type,
            "config_overrides": sorted((config.config_overrides or "").replace(" ", "").split(",")),
            "document_mask": config.document_mask,
            "optimizer": config.optimizer,
            "seed": config.seed,
            "batch_size": self.plan.batch_size,
        }

    def refuse_another_run(self) -> None:
        """Raise ForgeError if the folder holds another run, or this one and it does not resume."""
        config = self.config
        if not config.overwrite:
            identity, resumes = self.identity(), bool(config.resume)
            refuse_another_run(self.output_dir, identity, resumes, config.resume_changed)


def open_job(config: TrainConfig, cluster: Cluster) -> Job:
    """Open the data (a text is prepared first) and plan the updates. All ranks must call."""
    data = open_data(config, cluster)
    return Job(config, cluster, data, make_plan(config, cluster, data))


def open_data(config: TrainConfig, cluster: Cluster) -> PreparedDataset:
    """The prepared dataset; a text file is prepared first, by the main process alone."""
    folder = Path(config.dataset_path)
    if folder.suffix and not cluster.main_only(folder.exists):
        raise ForgeError(f"--dataset-path {folder}: no such file", "give a text or a folder")
    if cluster.main_only(lambda: folder.is_file()):
        if config.dry_run:
            raise ForgeError(
                f"--dry-run writes nothing, and {folder} is a text",
                "prepare it with prepare_data.py first, or leave --dry-run out",
            )
        folder = Path(config.output_dir) / "prepared"
        cluster.main_only(lambda: prepare_text(config, folder))
    data = cluster.together(lambda: open_prepared(folder))
    refuse_different_data(cluster, data)
    asked, found = config.sequence_length, data.manifest.sequence_length
    if asked not in (None, found):
        raise ForgeError(
            f"--sequence-length {asked} was asked, {folder} has blocks of {found} tokens",
            "leave the flag out, or prepare the data again with it",
        )
    return data


def refuse_different_data(cluster: Cluster, data: PreparedDataset) -> None:
    """Raise ForgeError, naming them, if ranks have other data than rank 0 under the same name."""
    facts = cluster.gather_facts({"data": data.manifest.fingerprint, "path": str(data.path)})
    first = facts[0]
    problems = Problems()
    for rank, fact in enumerate(facts):
        problems.require(
            fact["data"] == first["data"],
            f"rank {rank} has other data ({fact['data'][:12]} in {fact['path']}) than rank 0"
            f" ({first['data'][:12]} in {first['path']})",
            f"copy rank 0's folder to the machine of rank {rank}, or share it",
        )
    problems.raise_any()


def prepare_text(config: TrainConfig, folder: Path) -> None:
    """Prepare the text file of `--dataset-path` into `folder`, which the same text finds again."""
    from p2p_llm_forge.data.prepare import prepare

    prepare(
        PrepareConfig(
            dataset_path=[config.dataset_path],
            output_dir=str(folder),
            tokenizer=config.tokenizer or config.model_name,
            vocab_size=config.vocab_size,
            trust_remote_code=config.trust_remote_code,
            sequence_length=config.sequence_length or 256,
            encoding_errors=config.encoding_errors,
            overwrite=config.overwrite,
        )
    )


def make_plan(config: TrainConfig, cluster: Cluster, data: PreparedDataset) -> Plan:
    """How the updates are made up, for as many peers as there are."""
    recorded = None
    if config.resume:
        recorded = cluster.main_only(lambda: recorded_identity(Path(config.output_dir)))
    if recorded and config.batch_size is None:
        # The batch stays what it was, with however many peers the run resumes.
        batch_size = recorded["batch_size"]
        config = replace(config, batch_size=batch_size, gradient_accumulation_steps=None)
    return plan_updates(
        config,
        data.manifest.splits["train"].blocks,
        data.manifest.sequence_length,
        cluster.world_size,
        may_be_uneven=bool(recorded) or cluster.launch.is_elastic or config.balance == "auto",
    )
