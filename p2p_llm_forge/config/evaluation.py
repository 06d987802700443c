"""When a model is evaluated, and on how much of the text that is held out."""

from __future__ import annotations

from dataclasses import dataclass

from p2p_llm_forge.config.fields import Options, flag, multiples_near, require_at_least
from p2p_llm_forge.errors import Problems


@dataclass
class EvaluationOptions(Options):
    """When a model is evaluated, and on how much of the text that is held out."""

    heading = "evaluating"
    COMMON = ["eval_every", "eval_blocks", "eval_only"]

    eval_every: int = flag(0, "updates between evaluations; 0: only at the end")
    eval_blocks: int | None = flag(
        None,
        "blocks of the validation split to evaluate on, drawn by chance and the same in every run;"
        " 0: all; default: all where that is quick beside the training, else as many as are, with"
        " a standard error; with --eval-only all",
        "--max_eval_samples",
    )
    eval_only: bool = flag(
        False, "evaluate the model of --output-dir (or --model-name) on the whole split and stop"
    )

    def check(self, problems: Problems) -> None:
        require_at_least(0, self, problems, "eval_every", "eval_blocks")


def require_evaluations(keep_best: bool, save_every: int, eval_every: int) -> Problems:
    """What is wrong where the best checkpoint is to be kept, and not every one is evaluated."""
    problems = Problems()
    problems.require(
        not (keep_best and not eval_every),
        "--keep-best needs evaluations to choose by",
        "add --eval-every N",
    )
    problems.require(
        not (keep_best and eval_every > 0 and save_every % eval_every),
        f"--keep-best judges every checkpoint by its evaluation, but --save-every {save_every} is"
        f" not a multiple of --eval-every {eval_every}",
        f"use --save-every {multiples_near(save_every, eval_every or 1)}",
    )
    return problems
