"""What an update is, and how many are taken."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from p2p_llm_forge.config.fields import Options, flag, require_above_0, require_at_least
from p2p_llm_forge.errors import Problems, nearest

OPTIMIZERS = ("adamw", "sgd", "adafactor")
# Those of transformers (5.23) that depend on nothing but the step, and two short names.
SCHEDULES = (
    *("linear", "cosine", "constant", "wsd", "cosine_with_restarts", "polynomial"),
    *("inverse_sqrt", "constant_with_warmup", "warmup_stable_decay"),
)


@dataclass
class UpdateOptions(Options):
    """What an update is, and how many are taken."""

    _argument_group_name = "updates"
    PER_RANK: ClassVar[tuple[str, ...]] = ("micro_batch_size",)

    epochs: float = flag(1.0, "passes over the blocks", "--num_train_epochs")
    max_steps: int | None = flag(
        None, "updates; if given, --epochs does not count", "--max_train_steps"
    )
    batch_size: int | None = flag(
        None, "blocks in one update over all processes together; default: 16"
    )
    micro_batch_size: int | None = flag(
        None,
        "blocks in one forward of one process; default: the largest that divides, at most 8",
        "--per_device_train_batch_size",
    )
    gradient_accumulation_steps: int | None = flag(
        None,
        "forwards in one update; follows from the batch size, given only to state the batch size"
        " that other way",
    )
    learning_rate: float = flag(1e-3, "peak learning rate")
    warmup_steps: int = flag(0, "updates until the peak", "--num_warmup_steps")
    lr_scheduler: str = flag(
        "cosine",
        "schedule after the warm-up: linear, cosine, constant, wsd, or another of transformers",
        "--lr_scheduler_type",
    )
    optimizer: str = flag("adamw", "adamw, sgd or adafactor")
    weight_decay: float = flag(
        0.1, "decay of the matrices; vectors (biases, norms) are never decayed"
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: never")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = flag(
        "auto", "auto: what the launcher's config says, else bf16 on hardware that has it"
    )
    seed: int = flag(0, "chooses initial weights, order of data and dropout")

    def check(self, problems: Problems) -> None:
        require_above_0(self, problems, "epochs", "learning_rate")
        sizes = ("max_steps", "batch_size", "micro_batch_size", "gradient_accumulation_steps")
        require_at_least(1, self, problems, *sizes)
        require_at_least(0, self, problems, "warmup_steps", "weight_decay", "max_grad_norm")
        problems.require(
            abs(self.seed) < 2**63, f"--seed is {self.seed}", "use a number of at most 63 bits"
        )
        problems.require(
            self.optimizer in OPTIMIZERS,
            f"unknown optimizer '{self.optimizer}'",
            nearest(self.optimizer, OPTIMIZERS),
        )
        problems.require(
            self.lr_scheduler in SCHEDULES,
            f"unknown schedule '{self.lr_scheduler}', or one that needs more than the step, which"
            " exact resuming rules out",
            nearest(self.lr_scheduler, SCHEDULES),
        )
