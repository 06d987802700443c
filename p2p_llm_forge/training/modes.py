"""What train.py does without training: evaluate a model, or show what a run would do."""

from __future__ import annotations

import contextlib
import sys
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.held_out import held_out
from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.model.build import load_model
from p2p_llm_forge.model.fit import TextSpec
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.sync.forecast import table
from p2p_llm_forge.training.checkpoint import LONGEST_LINE, newest_good, read_state, steps_saved
from p2p_llm_forge.training.evaluation import evaluate_blocks
from p2p_llm_forge.training.forecast import measure_and_forecast
from p2p_llm_forge.training.job import Job, open_data
from p2p_llm_forge.training.learner import new_model, text_spec_of
from p2p_llm_forge.training.manifest import own_files
from p2p_llm_forge.training.results import TrainResult
from p2p_llm_forge.training.settle import settled_lines
from p2p_llm_forge.training.tracking import introduction


def evaluate_only(config: TrainConfig, cluster: Cluster) -> TrainResult:
    """Evaluate `--model-name`, or the newest good checkpoint of the run, and write nothing."""
    data = open_data(config, cluster)
    code = config.trust_remote_code
    blocks = cluster.together(lambda: held_out(data, config.eval_blocks, code))
    if blocks is None:
        raise ForgeError(
            f"{config.dataset_path} has no validation split",
            "prepare it with --validation-fraction 0.1",
        )
    text, name = text_spec_of(data), config.model_name or ""
    if name:
        steps = 0
        lm = cluster.together(lambda: load_model(name, text, code))
    else:
        name, steps, lm = load_newest(config, cluster, text)
    document_end = data.manifest.eos_token_id if config.document_mask else None
    model = NextTokenLoss(lm.to(cluster.device), document_end)
    figures = evaluate_blocks(model, blocks, config.micro_batch() or 8, cluster)
    result = TrainResult(name, steps, 0, None, None, cluster.world_size, **figures)
    if cluster.is_main:
        print(result.summary(), flush=True)
    return result


def load_newest(config: TrainConfig, cluster: Cluster, text: TextSpec) -> tuple[str, int, Any]:
    """The newest good checkpoint of the run, its step, and its model. All ranks must call.

    A run that trains meanwhile may prune it while it is read: then the next one is taken.
    """
    output_dir = Path(config.output_dir)

    def newest() -> tuple[str, int]:
        while True:
            there = steps_saved(output_dir)
            path, skipped = newest_good(output_dir)
            with contextlib.suppress(OSError, ValueError):
                step = read_state(path)["step"] if path else 0
                if path or there == steps_saved(output_dir):
                    break
        for line in skipped:
            print(in_one_line(line, LONGEST_LINE), file=sys.stderr, flush=True)
        return str(path or ""), step

    while True:
        name, steps = cluster.main_only(newest)
        if not name:
            raise ForgeError(
                f"nothing to evaluate: {output_dir} has no good checkpoint, and no --model-name was"
                " given",
                "give the --output-dir of a run, or a --model-name",
            )
        try:
            model = cluster.together(lambda: load_model(name, text, config.trust_remote_code))  # noqa: B023
            return name, steps, model
        except ForgeError:
            if cluster.main_only(lambda: own_files(Path(name)) is not None):  # noqa: B023
                raise  # it is still there, so something else is wrong


def dry_run(job: Job) -> TrainResult:
    """Print what a run would do, and how fast by which strategy; train and write nothing."""
    config, cluster = job.config, job.cluster
    cluster.main_only(job.refuse_another_run)
    lm = cluster.together(lambda: new_model(job))
    planned = job.budget.words if job.budget else []
    lines = [introduction(cluster, job.data, job.plan, lm), *settled_lines(config), *planned]
    text = "\n".join(lines)
    if cluster.world_size > 1:
        text = "\n".join([text, "", *table(measure_and_forecast(job, lm))])
    if cluster.is_main:
        print(f"{text}\ndry run: nothing was trained or written", flush=True)
    return TrainResult(config.output_dir, 0, 0, None, None, cluster.world_size)
