"""What train.py does without training: evaluate a model, or show what a run would do."""

from __future__ import annotations

import sys
from functools import partial
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.held_out import held_out
from p2p_llm_forge.errors import ForgeError, Problem, in_one_line
from p2p_llm_forge.memory import freed_memory_kept
from p2p_llm_forge.model.build import load_model
from p2p_llm_forge.model.fit import TextSpec
from p2p_llm_forge.model.lora import lora_in_words
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.preflight import hosts_of
from p2p_llm_forge.sync.forecast import table
from p2p_llm_forge.training.checkpoint import LONGEST_LINE, read_state, steps_saved
from p2p_llm_forge.training.evaluation import evaluate_blocks
from p2p_llm_forge.training.fetched_model import bring_model
from p2p_llm_forge.training.forecast import measure_and_forecast
from p2p_llm_forge.training.identity import (
    recorded_identity,
    refuse_another_run,
    refuse_files_of_others,
)
from p2p_llm_forge.training.job import Job, open_data
from p2p_llm_forge.training.learner import new_model, text_spec_of
from p2p_llm_forge.training.lent_model import lent, newest_anywhere, refuse_two_runs, steps_by_rank
from p2p_llm_forge.training.manifest import checkpoint_dir, own_files
from p2p_llm_forge.training.results import TrainResult
from p2p_llm_forge.training.run_folder import end_of
from p2p_llm_forge.training.settle import settled_lines
from p2p_llm_forge.training.setup import held_out_of, settle_evaluation, settle_pace
from p2p_llm_forge.training.tracking import introduction

NONE = {"name": "", "step": 0}  # a checkpoint


def evaluate_only(config: TrainConfig, cluster: Cluster) -> TrainResult:
    """Evaluate `--model-name`, or the newest good checkpoint of the run, and write nothing.

    Of a run that has begun from `--model-name`, the run is meant: its own line gets this flag.
    """
    bring_model(config, cluster)
    data = open_data(config, cluster)
    code = config.trust_remote_code
    blocks = cluster.together(lambda: held_out(data, config.eval_blocks, code))
    if blocks is None:
        raise ForgeError(
            f"{config.dataset_path} has no validation split",
            "prepare it with --validation-fraction 0.05",
        )
    text, name = text_spec_of(data), config.model_name or ""
    if name and not is_where_run_began_anywhere(config, cluster):
        steps = 0
        lm = cluster.together(lambda: load_model(name, text, code))
    else:
        name, steps, lm = load_newest(config, cluster, text)
    document_end = data.manifest.eos_token_id if config.document_mask else None
    model = NextTokenLoss(lm.to(cluster.device), document_end)
    with freed_memory_kept():
        figures = evaluate_blocks(model, blocks, config.micro_batch() or 8, cluster)
    result = TrainResult(name, steps, 0, None, None, cluster.world_size, **figures)
    if cluster.is_main:
        print(result.summary(), flush=True)
    return result


def is_where_run_began_anywhere(config: TrainConfig, cluster: Cluster) -> bool:
    """Whether a machine has the run that has begun from `--model-name`. All ranks must call."""
    own = cluster.together(lambda: is_where_run_began(config))
    return any(fact["own"] for fact in cluster.gather_facts({"own": own}))


def is_where_run_began(config: TrainConfig) -> bool:
    """Whether the run in `--output-dir` has begun from `--model-name`. Raises ForgeError where it
    has begun elsewhere: which of the two is meant is not known."""
    folder, name = Path(config.output_dir), str(config.model_name)
    recorded = recorded_identity(folder) if config.output_dir else None
    if recorded is None or folder.resolve() in (one := Path(name).resolve(), *one.parents):
        return False
    if recorded.get("model_name") != name:
        raise ForgeError(
            f"--model-name {name} and the run in --output-dir {folder} are two models, and one is"
            " evaluated at a time",
            "leave one of the two out",
        )
    return True


def load_newest(config: TrainConfig, cluster: Cluster, text: TextSpec) -> tuple[str, int, Any]:
    """The newest good checkpoint of the run, its step, and its model. All ranks must call.

    It is of whichever machine has the newest. A run that trains meanwhile may prune it while it is
    read: then the next one is taken. Raises ForgeError where machines hold different runs.
    """
    output_dir = Path(config.output_dir)
    refuse_two_runs(cluster, output_dir)
    while True:
        there = steps_by_rank(cluster, output_dir)
        step, lender, skipped = newest_anywhere(cluster, output_dir)
        if step < 0 and there != steps_by_rank(cluster, output_dir):
            continue
        for line in skipped if cluster.is_main else []:
            print(in_one_line(line, LONGEST_LINE), file=sys.stderr, flush=True)
        if step < 0:
            raise ForgeError(
                f"nothing to evaluate: {output_dir} has no good checkpoint, and no --model-name was"
                " given",
                "give the --output-dir of a run, or a --model-name",
            )
        saved = checkpoint_dir(output_dir, step)
        name = cluster.gather_facts({"name": str(saved)})[lender]["name"]
        try:
            with lent(config, cluster, step, lender) as path:
                code = config.trust_remote_code
                load = partial(load_model, str(path), text, code, is_ours=True)
                return name, step, cluster.together(load)
        except ForgeError:
            if not cluster.gather_facts({"gone": own_files(saved) is None})[lender]["gone"]:
                raise  # it is still there, so something else is wrong


def look_into(job: Job) -> tuple[list[str], dict[str, Any] | None]:
    """What the folder holds, for a person, and the state of the trainer of a run that can resume.

    Raises ForgeError for a folder that holds no run, but files of others.
    """
    folder, config = job.output_dir, job.config
    refuse_files_of_others(folder)
    steps = [step for step in steps_saved(folder) if own_files(checkpoint_dir(folder, step))]
    newest = checkpoint_dir(folder, steps[0]) if steps else None
    if config.resume not in (None, "auto") and not config.overwrite:
        newest = Path(config.resume)
    if newest is None and recorded_identity(folder) is None:
        return [], None
    if config.overwrite:
        return [f"folder    {folder} holds a run, which --overwrite throws away"], None
    try:
        refuse_another_run(folder, job.identity(), True, config.resume_changed)
        state: dict[str, Any] | None = None
        total = job.plan.total_steps
        if newest:
            state = read_state(newest)
            total = end_of(newest, state, job)
    except ForgeError as error:
        return [f"folder    {one.found}\n          {one.fix}" for one in error.problems], None
    except (OSError, ValueError) as error:
        return [f"folder    {newest} cannot be read ({in_one_line(error, LONGEST_LINE)})"], None
    step, resume = state["step"] if state else 0, config.resume or "auto"
    then = f"--resume {resume} continues it" if step < total or not step else "it has ended"
    where, if_not = (folder, ", --overwrite throws it away") if resume == "auto" else (resume, "")
    found = f"{where} holds this run, saved after step {step:,} of {total:,}"
    return [f"folder    {found}; {then}{if_not}"], state


def look_elsewhere(job: Job) -> list[str]:
    """What other machines have that rank 0 lacks, or must not have, for a person. All ranks must
    call."""
    cluster, config, folder = job.cluster, job.config, job.output_dir
    if cluster.world_size == 1 or config.overwrite:
        return []
    identity, problems = job.identity(), list[Problem]()
    try:
        cluster.together(lambda: refuse_another_run(folder, identity, True, config.resume_changed))
    except ForgeError as error:  # what is wrong on rank 0, or alike on all, has been said
        problems += [
            one for one in error.problems if not one.where.startswith("rank 0 (") and one.where
        ]
    try:
        refuse_two_runs(cluster, folder)
    except ForgeError as error:
        problems += error.problems
    if problems:
        return [_refused(one) for one in problems]
    step, rank, _ = newest_anywhere(cluster, folder)
    if not rank:
        return []
    where = f"rank {rank} ({hosts_of(cluster)[rank]}) holds a run that was saved after step"
    allowed = ", without --fetch never" if config.fetch == "never" else ""
    return [f"folder    {where} {step:,}; --resume auto fetches it{allowed}"]


def _refused(problem: Problem) -> str:
    """Why --resume auto would not go on, as a line of a dry run."""
    found, fix = problem.shown()
    return f"folder    {f'{problem.where}: ' if problem.where else ''}{found}\n          {fix}"


def dry_run(job: Job) -> TrainResult:
    """Print what a run would do, and how fast by which strategy; train and write nothing."""
    cluster = job.cluster
    in_folder, state = cluster.main_only(lambda: look_into(job))
    in_folder += look_elsewhere(job)
    lines = in_folder
    if job.budget is None or job.budget.plan or state:  # else nothing was planned: it is refused
        lines = would_be(job, state, in_folder)
    if cluster.is_main:
        print("\n".join([*lines, "dry run: nothing was trained or written"]), flush=True)
    return TrainResult(job.config.output_dir, 0, 0, None, None, cluster.world_size)


def would_be(job: Job, state: dict[str, Any] | None, in_folder: list[str]) -> list[str]:
    """What a run would be, for a person, and how fast by which strategy. All ranks must call.

    state: of the trainer that it would resume from.
    """
    cluster = job.cluster
    if state:
        job, _ = settle_pace(job, state)
    job = settle_evaluation(job, state or {})
    config, evaluated = job.config, held_out_of(job)
    lm = cluster.together(lambda: new_model(job))
    planned = job.budget.words if job.budget else []
    lines = [introduction(cluster, job.data, job.plan, lm), *settled_lines(config), *planned]
    lines += [f"LoRA      of {lora_in_words(lm)}"] if config.lora_rank else []
    lines += [f"held out  {evaluated.in_words()}"] if evaluated else []
    lines += in_folder
    if cluster.world_size > 1:
        lines += ["", *table(measure_and_forecast(job, lm))]
    return lines
