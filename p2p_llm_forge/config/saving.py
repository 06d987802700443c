"""What is evaluated, logged and saved, when, and what a run resumes from."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from p2p_llm_forge.config.fields import Options, flag, require_above_0, require_at_least
from p2p_llm_forge.errors import Problems


@dataclass
class SavingOptions(Options):
    """What is evaluated, logged and saved, when, and what a run resumes from."""

    _argument_group_name = "evaluating, logging and saving"
    PER_RANK: ClassVar[tuple[str, ...]] = ("resume", "report_to")

    eval_every: int = flag(0, "updates between evaluations; 0: only at the end")
    eval_only: bool = flag(False, "evaluate the model of --output-dir (or --model-name) and stop")
    log_every: int = flag(10, "updates between lines of metrics.jsonl")
    save_every: int = flag(
        500,
        "updates between checkpoints; the last update is always saved",
        "--checkpointing_steps",
    )
    keep_checkpoints: int = flag(2, "newest checkpoints that are kept")
    keep_best: bool = flag(False, "keep the checkpoint with the lowest evaluation loss as well")
    save_in_background: bool = flag(
        True, "copy the state to memory and write it while training continues"
    )
    max_seconds: float | None = flag(
        None, "stop, save and exit with status 124 after so many seconds"
    )
    resume: str | None = flag(
        None,
        "auto: resume from the newest complete checkpoint of --output-dir, or start; or a"
        " checkpoint's folder",
        "--resume_from_checkpoint",
    )
    resume_changed: bool = flag(
        False, "resume although the data, the seed or the batch size is another one than before"
    )
    overwrite: bool = flag(False, "throw away the run that --output-dir holds")
    report_to: str = flag(
        "tensorboard",
        "trackers beside metrics.jsonl, comma-separated: tensorboard, wandb, ...; none",
    )
    sample_prompt: str = flag("", "text that the sample after training continues")

    def check(self, problems: Problems) -> None:
        require_above_0(self, problems, "log_every", "max_seconds")
        require_at_least(1, self, problems, "keep_checkpoints")
        require_at_least(0, self, problems, "eval_every", "save_every")
        problems.require(
            not (self.resume and self.overwrite),
            "--resume continues the run that --overwrite would throw away",
            "give one of them",
        )
        problems.require(
            not (self.keep_best and not self.eval_every),
            "--keep-best needs evaluations to choose by",
            "add --eval-every",
        )
        problems.require(
            not (self.keep_best and self.eval_every and self.save_every % self.eval_every),
            f"--keep-best judges every checkpoint by its evaluation, but --save-every"
            f" {self.save_every} is not a multiple of --eval-every {self.eval_every}",
            "make it one",
        )
