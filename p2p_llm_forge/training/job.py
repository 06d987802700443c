"""What a run is asked for, with whom, on which data: settled once, before anything is written."""

from __future__ import annotations

import contextlib
import os
import re
import shlex
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from functools import partial
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.config.fields import option
from p2p_llm_forge.data.dataset import MANIFEST, PreparedDataset, open_prepared
from p2p_llm_forge.data.formats import compression_of, format_of
from p2p_llm_forge.errors import ForgeError, Problems
from p2p_llm_forge.files import only_writer
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.shapes import is_count
from p2p_llm_forge.training.budget import Budget
from p2p_llm_forge.training.fetched_data import (
    Sought,
    bring_data,
    look_everywhere,
    refuse_others,
    refuse_what_is_nowhere,
    wanted_by_run,
    what_is_missing,
)
from p2p_llm_forge.training.fetched_model import bring_model
from p2p_llm_forge.training.identity import (
    LOCK,
    PREPARED,
    recorded_identity,
    refuse_another_run,
    refuse_files_of_others,
)
from p2p_llm_forge.training.plan import Plan, more_processes_than_blocks, plan_updates
from p2p_llm_forge.training.planner import LEAST_BYTES, text_settings
from p2p_llm_forge.training.publishing import look_at_hub, require_login
from p2p_llm_forge.training.settle import begun_in, settle, width_for
from p2p_llm_forge.training.texts import (
    data_of_lost_text,
    data_to_go_on_with,
    refuse_different_texts,
    refuse_missing_file,
    require_common_folder,
    text_of_run_named,
    who_prepares,
)
from p2p_llm_forge.training.tuning import with_warmup

FLAG = re.compile(r"--[a-z][a-z-]*")
COMPRESSED = 3  # bytes of a text for one of a compressed file, about
OF_TEXTS = ("tokenizer", "vocab_size", "encoding_errors")  # flags that only a text file obeys


@dataclass(frozen=True)
class Job:
    """What is settled before a run begins."""

    config: TrainConfig
    cluster: Cluster
    data: PreparedDataset
    plan: Plan
    budget: Budget | None = None  # with --minutes
    began: float = field(default_factory=time.monotonic)  # when this session did, by that clock

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def learning_rate(self) -> float:
        """The peak."""
        assert self.config.learning_rate is not None  # settled
        return self.config.learning_rate

    @property
    def document_end(self) -> int | None:
        """The token that attention does not cross; None where it reads a block as one text."""
        return self.data.manifest.eos_token_id if self.config.document_mask else None

    def identity(self) -> dict[str, Any]:
        """What makes its run this run and no other."""
        manifest = self.data.manifest
        return {
            **identity_without_data(self.config),
            "dataset": manifest.fingerprint,
            "tokenizer": manifest.tokenizer_fingerprint,
            "sequence_length": manifest.sequence_length,
            "batch_size": self.plan.batch_size,
            "conversations": bool(manifest.conversations) or None,  # older runs have no such key
        }

    def refuse_another_run(self) -> None:
        """Raise ForgeError if the folder holds another run, or this one and it does not resume.

        It never may hold what is not ours, and no run.
        """
        config = self.config
        refuse_files_of_others(self.output_dir)
        if not config.overwrite:
            identity, resumes = self.identity(), bool(config.resume)
            refuse_another_run(self.output_dir, identity, resumes, config.resume_changed)


def identity_without_data(config: TrainConfig) -> dict[str, Any]:
    """The part of `Job.identity` that is known before the data are."""
    return {
        "model_name": config.model_name,
        "model_type": config.model_type,
        "depth": config.depth,
        "config_overrides": sorted((config.config_overrides or "").replace(" ", "").split(",")),
        "document_mask": config.document_mask,
        "dropout": config.dropout or None,
        "optimizer": config.optimizer,
        "seed": config.seed,
        **lora_identity(config),
    }


def lora_identity(config: TrainConfig) -> dict[str, Any]:
    """What is trained in place of all weights; nothing where these are."""
    if not config.lora_rank:
        return {}
    return {
        "lora_rank": config.lora_rank,
        "lora_alpha": config.scaling,
        "lora_dropout": config.lora_dropout or None,
        "lora_targets": sorted(config.lora_targets),
        "base_dtype": config.base_dtype,
    }


def open_job(config: TrainConfig, cluster: Cluster) -> Job:
    """Open the data (a text is prepared first) and plan the updates. All ranks must call.

    Raises ForgeError; a text that was prepared for a run that is refused leaves no trace then.
    """
    cluster.main_only(lambda: require_login(config))
    bring_model(config, cluster)
    config = settled(config, cluster)
    prepared = Path(config.output_dir) / PREPARED
    was_there = os.path.lexists(prepared)
    data = open_data(config, cluster)
    plan = make_plan(config, cluster, data)
    job = Job(with_warmup(config, plan.total_steps), cluster, data, plan)
    if cluster.main_only(lambda: data.path == prepared and not was_there):
        try:
            cluster.main_only(job.refuse_another_run)
        except ForgeError:
            if not was_there:
                shutil.rmtree(prepared, ignore_errors=True)
            raise
    cluster.main_only(lambda: look_at_hub(config))
    return job


def settled(config: TrainConfig, cluster: Cluster) -> TrainConfig:
    """The configuration with what was not given (see `settle`), the same on all ranks.

    Raises ForgeError where the run has begun with what no run can have.
    """
    begun = cluster.main_only(lambda: begun_in(config))
    width = cluster.main_only(lambda: width_for(config, begun))
    config = settle(config, begun, width)
    config.problems().raise_any()
    return config


def open_data(config: TrainConfig, cluster: Cluster) -> PreparedDataset:
    """The prepared dataset; a rank that lacks it fetches it. All ranks must call.

    A text is prepared first, by rank 0 alone, or by the first that has it. Where no machine has it
    any more, what was made of it for this run takes its place.
    """
    sought = find_data(config, cluster)
    brought = what_is_missing(config, cluster, sought)
    if brought is not None:
        if not sought.is_text and config.output_dir and not config.eval_only:
            cluster.main_only(lambda: refuse_before_data(config))  # before hours of fetching
        bring_data(config, cluster, sought.folder, brought)
    return open_found(config, cluster, sought)


def open_found(config: TrainConfig, cluster: Cluster, sought: Sought) -> PreparedDataset:
    """The dataset that lies on all ranks. All must call. Raises ForgeError where it is another on
    one of them, or does not go with the flags."""
    folder, is_text = sought.folder, sought.is_text

    def opened() -> PreparedDataset:
        data = open_prepared(folder)
        data.load_tokenizer(config.trust_remote_code)  # the end of the run is no time to find out
        return data

    data = cluster.together(opened)
    if not is_text:
        cluster.together(lambda: refuse_flags_of_texts(config, data))
    refuse_different_data(cluster, data)
    asked, found = config.sequence_length, data.manifest.sequence_length
    if asked not in (None, found):
        raise ForgeError(
            f"--sequence-length {asked} was asked, {folder} has blocks of {found} tokens",
            "leave the flag out, or prepare the data again with it",
        )
    return data


def find_data(config: TrainConfig, cluster: Cluster) -> Sought:
    """Where the dataset is, or should be, on each rank. All ranks must call.

    A text is prepared there first, by one rank. Raises ForgeError.
    """
    folder = Path(config.dataset_path)
    seen = look_everywhere(cluster, folder)
    maker, wanted = who_prepares(seen), ""
    if maker is not None:
        refuse_different_texts(config, cluster, seen, maker)
    if not any(found.kind != "nothing" for found in seen):
        made = Path(config.output_dir) / PREPARED
        wanted = data_of_lost_text(config, cluster, made) if config.output_dir else ""
        if not wanted:
            refuse_what_is_nowhere(config, cluster, folder)
            cluster.main_only(lambda: refuse_missing_file(folder))
    is_text = maker is not None or bool(wanted)
    if is_text:
        folder = Path(config.output_dir) / PREPARED
        if maker is not None:
            require_common_folder(config, cluster, folder, maker)
            make_of_text(config, cluster, folder, maker)
        seen = look_everywhere(cluster, folder)
        lacks = seen[cluster.rank].kind == "nothing"
        cluster.together(lambda: refuse_before_data(config) if lacks else None)
    wanted = wanted or wanted_by_run(config, cluster)
    return Sought(folder, seen, is_text, maker, wanted)


def make_of_text(config: TrainConfig, cluster: Cluster, folder: Path, maker: int) -> None:
    """Have one rank prepare its text into its folder, or see in a dry run that it is prepared."""
    wanted = data_to_go_on_with(config, cluster)

    def make() -> None:
        with text_of_run_named(config, folder, wanted):
            if config.dry_run:
                require_prepared(config, folder)
            else:
                prepare_text(config, folder, cluster.launch.run_id)

    if maker == 0:
        cluster.main_only(make)
    else:
        cluster.together(lambda: make() if cluster.rank == maker else None)


def refuse_flags_of_texts(config: TrainConfig, data: PreparedDataset) -> None:
    """Raise ForgeError for flags that decide how a text is prepared, where the data already are.

    With the values that these were made with they may stay: a recipe can serve both.
    """
    made_with, problems = data.manifest.arguments, Problems()
    for name in OF_TEXTS:
        given = getattr(config, name)
        may_be = [
            getattr(TrainConfig, name),
            made_with.get(name),
            getattr(data.manifest, name, None),
        ]
        last_part = Path(given).name if name == "tokenizer" and given else given  # as recorded
        problems.require(
            given in may_be or last_part in may_be,
            f"{option(name)} {given} is for a text file, and {data.path} is prepared already",
            f"leave the flag out, or prepare the text again: prepare_data.py {option(name)} {given}"
            " ...",
        )
    problems.raise_any()


def refuse_different_data(cluster: Cluster, data: PreparedDataset) -> None:
    """Raise ForgeError, naming them, if ranks have other data than rank 0 under the same name."""
    facts = cluster.gather_facts({"data": data.manifest.fingerprint, "path": str(data.path)})
    refuse_others({rank: (fact["data"], fact["path"]) for rank, fact in enumerate(facts)})


def prepare_text(config: TrainConfig, folder: Path, run_id: str | None) -> None:
    """Prepare the text file of `--dataset-path` into `folder`, which the same text finds again.

    Meanwhile the run's folder is held, if something is written: another run may be reading it.
    """
    from p2p_llm_forge.data.prepare import prepare

    asked = preparation_of(config, folder)
    if (folder / MANIFEST).exists() and not config.overwrite:
        prepare(asked)
        return
    refuse_before_data(config)
    output_dir = folder.parent
    try:
        with (
            flags_explained(asked),
            model_named(config),
            only_writer(output_dir / LOCK, f"--output-dir {output_dir}", run_id),
        ):
            try:
                prepare(asked)
            except ForgeError:
                if not config.overwrite:
                    raise
                prepare(replace(asked, overwrite=True))
    finally:
        with contextlib.suppress(OSError):  # not empty
            output_dir.rmdir()


def require_prepared(config: TrainConfig, folder: Path) -> None:
    """Raise ForgeError unless a run in the folder has prepared the text, which a dry run uses."""
    from p2p_llm_forge.data.prepare import is_prepared

    is_there, asked = (folder / MANIFEST).exists(), preparation_of(config, folder)
    if not (is_there and is_prepared(asked)):
        raise ForgeError(
            f"--dry-run writes nothing, and {config.dataset_path} is a text",
            f"prepare it first: {command_of(asked)}; then give --dataset-path PREPARED, or leave"
            " --dry-run out",
        )


def preparation_of(config: TrainConfig, folder: Path) -> PrepareConfig:
    """How the text file of `--dataset-path` is prepared into `folder`. Raises ForgeError."""
    vocab_size, sequence_length = 8192, 256
    held_out = PrepareConfig.validation_fraction
    if config.minutes:
        size = os.path.getsize(config.dataset_path)
        is_packed = format_of(config.dataset_path) == "parquet"
        if is_packed or compression_of(config.dataset_path):
            size = max(LEAST_BYTES, COMPRESSED * size)  # whether it is enough is seen later
        vocab_size, sequence_length = text_settings(size)
    if not config.overwrite:
        # A run that is there made them: `--eval-only`, say, is typed without what chose these.
        with contextlib.suppress(ForgeError):
            known = open_prepared(folder).manifest
            sequence_length = known.sequence_length
            vocab_size = known.arguments.get("vocab_size") or vocab_size
            held_out = known.arguments.get("validation_fraction", held_out)
    return PrepareConfig(
        dataset_path=[config.dataset_path],
        output_dir=str(folder),
        tokenizer=config.tokenizer or config.model_name,
        vocab_size=config.vocab_size or vocab_size,
        trust_remote_code=config.trust_remote_code,
        sequence_length=config.sequence_length or sequence_length,
        validation_fraction=held_out,
        encoding_errors=config.encoding_errors,
    )


def command_of(asked: PrepareConfig) -> str:
    """The line that prepares a text so by itself, into a folder PREPARED."""
    given = {"dataset_path": asked.dataset_path[0], "output_dir": "PREPARED"}
    given |= {name: getattr(asked, name) for name in ("sequence_length", *OF_TEXTS)}
    return "python prepare_data.py" + "".join(
        f" {option(name)} {shlex.quote(str(value))}"
        for name, value in given.items()
        if value != getattr(PrepareConfig, name, None)
    )


@contextlib.contextmanager
def model_named(config: TrainConfig) -> Iterator[None]:
    """Where the tokenizer is that of --model-name, speak of this flag: the other was not typed."""
    try:
        yield
    except ForgeError as error:
        asked = f"--tokenizer {config.model_name} "
        if config.tokenizer or not any(asked in one.found for one in error.problems):
            raise
        fix = "check the name and the connection to the Hub; or give the folder of a whole model"
        raise ForgeError.of(
            replace(
                one,
                found=one.found.replace(
                    asked, f"the tokenizer of --model-name {config.model_name} "
                ),
                fix=fix if "could not be loaded" in one.found else one.fix,
            )
            for one in error.problems
        ) from error


@contextlib.contextmanager
def flags_explained(asked: PrepareConfig) -> Iterator[None]:
    """Where a fix names flags that only prepare_data.py has, say how to use them there."""
    known = {option(field.name) for field in fields(TrainConfig)}
    try:
        yield
    except ForgeError as error:
        if all(known.issuperset(FLAG.findall(one.fix)) for one in error.problems):
            raise
        raise ForgeError.of(
            replace(
                one,
                fix=f"{one.fix}: prepare the text by itself, with such flags added to "
                f"{command_of(asked)}, and then train with --dataset-path PREPARED",
            )
            for one in error.problems
        ) from error


def refuse_before_data(config: TrainConfig) -> None:
    """Raise ForgeError if the folder holds what is not ours, or a run that is another in any case.

    What a run was trained on is compared when the data are there.
    """
    output_dir = Path(config.output_dir)
    refuse_files_of_others(output_dir)
    recorded = recorded_identity(output_dir)
    if recorded and not (config.overwrite or config.eval_only):
        known = {**recorded, **identity_without_data(config)}
        refuse_another_run(output_dir, known, bool(config.resume), config.resume_changed)


def make_plan(config: TrainConfig, cluster: Cluster, data: PreparedDataset) -> Plan:
    """How the updates are made up, for as many peers as there are."""
    recorded = cluster.main_only(
        lambda: recorded_identity(Path(config.output_dir)) if config.resume else None
    )
    batch_size = recorded.get("batch_size") if recorded else None
    planned = partial(
        plan_updates,
        num_blocks=data.manifest.splits["train"].blocks,
        sequence_length=data.manifest.sequence_length,
        world_size=cluster.world_size,
        may_be_uneven=bool(recorded) or cluster.launch.is_elastic or config.balance == "auto",
    )
    if is_count(batch_size) and batch_size and config.batch_size in (None, batch_size):
        if batch_size < cluster.world_size:
            larger = planned(replace(config, batch_size=None))
            raise more_processes_than_blocks(batch_size, larger, cluster.world_size)
        if config.batch_size is None:
            # The batch stays what it was, with however many peers the run resumes.
            config = replace(config, batch_size=batch_size, gradient_accumulation_steps=None)
    return planned(config)
