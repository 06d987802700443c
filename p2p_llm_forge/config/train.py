"""All that train.py can be asked: groups of options, and TrainConfig, which is built of them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from p2p_llm_forge.config.evaluation import EvaluationOptions, require_evaluations
from p2p_llm_forge.config.fetching import FetchingOptions
from p2p_llm_forge.config.fields import (
    Options,
    flag,
    multiples_near,
    option,
    require_above_0,
    require_at_least,
    require_between,
    require_seconds,
)
from p2p_llm_forge.config.launch import LaunchOptions
from p2p_llm_forge.config.lora import LoraOptions
from p2p_llm_forge.config.names_of_train import OF_TRAINING
from p2p_llm_forge.config.sharing import SharingOptions
from p2p_llm_forge.config.showing import ShowingOptions
from p2p_llm_forge.config.sync import SyncOptions
from p2p_llm_forge.errors import Problems, nearest

OPTIMIZERS = ("adamw", "muon", "sgd", "adafactor")
WEIGHT_DECAY = 0.1
# Those of transformers (5.23) that depend on nothing but the step, and two short names.
SCHEDULES = (
    *("linear", "cosine", "constant", "wsd", "cosine_with_restarts", "polynomial"),
    *("inverse_sqrt", "constant_with_warmup", "warmup_stable_decay"),
)
# Beyond these a value is a slip of the keys, and would fail late, or never.
LONGEST_BLOCK, MOST_BLOCKS = 2**22, 10**7  # tokens in a block, blocks in an update
DEEPEST = 256  # layers that --depth makes


@dataclass
class DataOptions(Options):
    """What a run learns from, and the folder that it writes."""

    heading = "data and output"
    PER_RANK = ["dataset_path", "output_dir", "tokenizer"]
    COMMON = ["dataset_path", "output_dir", "sequence_length"]

    dataset_path: str = flag(
        "",
        "folder made by prepare_data.py, or a text file, which is prepared first",
        "--dataset_name",
    )
    output_dir: str = flag("", "folder of the run: checkpoints, figures, the final model")
    tokenizer: str | None = flag(
        None, "for a text file: tokenizer to use; without it that of --model-name, or a new one"
    )
    vocab_size: int | None = flag(
        None,
        "for a text file: entries of a tokenizer that is trained on it; default: 8192, and with"
        " --minutes by the size of the text",
    )
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "for a text file: bytes that are not UTF-8 are refused, or replaced by U+FFFD"
    )
    sequence_length: int | None = flag(
        None,
        "tokens in a block; must be that of the prepared data; default for a text file: 256",
        "--block_size",
    )

    def check(self, problems: Problems) -> None:
        is_upload = getattr(self, "push_to_hub", None)  # of a finished run, which needs no data
        problems.require(
            bool(self.dataset_path or is_upload),
            "no data given",
            "add --dataset-path FOLDER (made by prepare_data.py) or a text file",
        )
        require_between((2, LONGEST_BLOCK), self, problems, "sequence_length")


@dataclass
class ModelOptions(Options):
    """Which model is trained."""

    heading = "model"
    PER_RANK = ["model_name", "gradient_checkpointing"]
    COMMON = ["model_name", "model_type", "depth"]

    model_name: str | None = flag(
        None, "model to fine-tune: a folder or a name of the Hub", "--model_name_or_path"
    )
    model_type: str | None = flag(
        None, "family of a model trained from scratch, such as llama; default: lfm2"
    )
    depth: int | None = flag(
        None,
        "layers of a model trained from scratch, from which its other sizes and the learning rate"
        " follow; default: 4, and with --model-type the sizes of that family",
    )
    config_overrides: str | None = flag(
        None, "sizes of a model trained from scratch", metavar="KEY=VALUE,..."
    )
    dropout: float | None = flag(
        None, "of the embedding and of what every layer adds, in training; default: 0"
    )
    trust_remote_code: bool = flag(
        False, "run the Python code that the model's author ships with it"
    )
    document_mask: bool = flag(
        False, "keep attention inside documents or conversations, also in evaluation"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in backward: less memory, slower"
    )
    compile: Literal["auto", "on", "off"] = flag(
        "auto",
        "compile the layers; alone: on; auto: on GPUs, and on CPUs where a trial says that it pays",
        alone="on",
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        # YAML reads a bare on and off as true and false.
        switches = {"true": "on", "false": "off"}
        self.compile = switches.get(str(self.compile).lower(), self.compile)  # type: ignore[assignment]

    def check(self, problems: Problems) -> None:
        require_between((1, DEEPEST), self, problems, "depth")
        problems.require(
            0 <= (self.dropout or 0) < 1,
            f"--dropout {self.dropout} is not a share",
            "give 0 or more and less than 1, such as 0.1",
        )
        problems.require(
            not (self.model_name and (self.model_type or self.config_overrides or self.depth)),
            "--model-name loads a model with its own sizes; --model-type, --depth and"
            " --config-overrides build a new one",
            "give one or the other",
        )


@dataclass
class UpdateOptions(Options):
    """What an update is, and how many are taken."""

    heading = "updates"
    PER_RANK = ["micro_batch_size"]
    COMMON = ["minutes", "epochs", "max_steps", "batch_size", "learning_rate"]

    minutes: float | None = flag(
        None,
        "train the best model that this launch can make in this time, counted from its start to its"
        " end: chooses depth, batch, schedule and number of updates where they are not given",
    )
    epochs: float | None = flag(
        None,
        "passes over the blocks; default: 1, of a loaded model 2, and by LoRA 3",
        "--num_train_epochs",
    )
    max_steps: int | None = flag(
        None, "updates; if given, --epochs does not count", "--max_train_steps"
    )
    batch_size: int | None = flag(
        None, "blocks in one update over all processes together; default: 16"
    )
    micro_batch_size: int | str | None = flag(
        None,
        "blocks in one forward of one process; auto: as many as fit into memory; default: at most"
        " 8, or 4,096 tokens where no model is loaded",
        "--per_device_train_batch_size",
    )
    gradient_accumulation_steps: int | None = flag(
        None,
        "forwards in one update; follows from the batch size, given only to state the batch size"
        " that other way",
    )
    learning_rate: float | None = flag(
        None,
        "peak learning rate; default: follows from optimizer and depth, of a loaded model from its"
        " width and from whether LoRA tunes it",
    )
    warmup_steps: int | None = flag(
        None,
        "updates until the peak; default: 0, of a loaded model a twentieth of all",
        "--num_warmup_steps",
    )
    lr_scheduler: str | None = flag(
        None,
        "schedule after the warm-up: linear, cosine, constant, wsd, or another of transformers;"
        " default: cosine, and linear with --minutes or of a loaded model",
        "--lr_scheduler_type",
    )
    optimizer: str | None = flag(
        None,
        "adamw, muon (the matrices inside the layers; the rest by adamw), sgd or adafactor;"
        " default: muon for a model from scratch, adamw for a loaded one",
    )
    weight_decay: float | None = flag(
        None,
        "decay of the matrices; vectors (biases, norms) are never decayed; default:"
        f" {WEIGHT_DECAY:g}, and with --minutes, muon and a depth the more the smaller the text",
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: never")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = flag(
        "auto",
        "auto: what the launcher's config says, else bf16 where that is measured to be faster",
    )
    seed: int = flag(0, "chooses initial weights, order of data and dropout")

    def __post_init__(self) -> None:
        super().__post_init__()
        if re.fullmatch("-?[0-9]{1,18}", text := str(self.micro_batch_size)):
            self.micro_batch_size = int(text)

    def micro_batch(self) -> int | None:
        """The blocks in one forward that were asked for; None where they are to be found."""
        return self.micro_batch_size if isinstance(self.micro_batch_size, int) else None

    def decay(self) -> float:
        """Of the matrices, as given or as usual."""
        return WEIGHT_DECAY if self.weight_decay is None else self.weight_decay

    def check(self, problems: Problems) -> None:
        require_above_0(self, problems, "epochs")
        require_seconds(self, problems, "minutes")
        for name in ("epochs", "max_steps"):
            problems.require(
                self.minutes is None or getattr(self, name) is None,
                f"--minutes ends the run by the clock, {option(name)} after a number of updates",
                f"leave out --minutes or {option(name)}",
            )
        # However large: weights that it ruins are seen, and not saved.
        require_above_0(self, problems, "learning_rate", most=math.inf)
        sizes = ("batch_size", "gradient_accumulation_steps")
        require_between((1, MOST_BLOCKS), self, problems, *sizes)
        micro = self.micro_batch_size
        if not isinstance(micro, str):
            require_between((1, MOST_BLOCKS), self, problems, "micro_batch_size")
        elif micro != "auto":
            found = f"--micro-batch-size is {micro!r}"
            problems.require(False, found, "give a whole number or auto")
        elif self.gradient_accumulation_steps is not None:
            found = "--gradient-accumulation-steps counts micro-batches, whose size is yet to find"
            problems.require(False, found, "give --batch-size instead of it")
        require_at_least(1, self, problems, "max_steps")
        require_at_least(0, self, problems, "warmup_steps", "weight_decay", "max_grad_norm")
        problems.require(
            abs(self.seed) < 2**63, f"--seed is {self.seed}", "use a number of at most 63 bits"
        )
        problems.require(
            self.optimizer in (None, *OPTIMIZERS),
            f"unknown optimizer '{self.optimizer}'",
            nearest(str(self.optimizer), OPTIMIZERS),
        )
        problems.require(
            self.lr_scheduler in (None, *SCHEDULES),
            f"unknown schedule '{self.lr_scheduler}', or one that needs more than the step, which"
            " exact resuming rules out",
            nearest(str(self.lr_scheduler), SCHEDULES),
        )


@dataclass
class SavingOptions(Options):
    """What is logged and saved, when, and what a run resumes from."""

    heading = "logging and saving"
    PER_RANK = ["resume"]
    COMMON = ["save_every", "resume", "overwrite"]

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
    overwrite: bool = flag(False, "throw away the run in --output-dir; files of others stay")

    def check(self, problems: Problems) -> None:
        require_above_0(self, problems, "log_every")
        require_seconds(self, problems, "max_seconds")
        require_at_least(1, self, problems, "keep_checkpoints")
        require_at_least(0, self, problems, "save_every")
        problems.require(
            not (self.resume and self.overwrite),
            "--resume continues the run that --overwrite would throw away",
            "give one of them",
        )


# A dataclass takes the fields of its last base first: so the data come first, as in GROUPS.
@dataclass
class TrainConfig(
    LaunchOptions,
    SyncOptions,
    SharingOptions,
    ShowingOptions,
    FetchingOptions,
    SavingOptions,
    EvaluationOptions,
    UpdateOptions,
    LoraOptions,
    ModelOptions,
    DataOptions,
):
    """One training run: what it learns from, what it builds, how long."""

    GROUPS = [
        *(DataOptions, ModelOptions, LoraOptions, UpdateOptions, EvaluationOptions),
        *(SavingOptions, FetchingOptions, ShowingOptions, SharingOptions),
        *(SyncOptions, LaunchOptions),
    ]
    OTHER_NAMES = OF_TRAINING

    def check_together(self, problems: Problems) -> None:
        problems.require(
            bool(self.output_dir or (self.eval_only and self.model_name)),
            "no place for the run",
            "add --output-dir FOLDER",
        )
        problems.require(
            not (self.overwrite and self.eval_only),
            "--eval-only looks at a model, and --overwrite would throw its run away",
            "leave --overwrite out",
        )
        problems.require(
            not (self.overwrite and self.model_name and _is_in(self.model_name, self.output_dir)),
            f"--overwrite would throw away --model-name {self.model_name}",
            "choose another --output-dir",
        )
        problems.require(
            not (self.compress == "powersgd" and self.cluster_secret_file),
            "--compress powersgd sends by connections of PyTorch's own, which the secret of"
            " --cluster-secret-file does not cover",
            "use --compress int8 or int4",
        )
        best = require_evaluations(self.keep_best, self.save_every, self.eval_every)
        problems.found += best.found
        every = self.round_length()
        if self.sync == "diloco" and not self.is_streaming() and every > 0:
            problems.require(
                self.eval_every % every == 0,
                f"--eval-every {self.eval_every} is not a multiple of --sync-every {every}, and"
                " only there all ranks hold the same weights",
                f"use {multiples_near(self.eval_every, every)}",
            )


def _is_in(one: str, other: str) -> bool:
    """Whether a folder is the other one, or lies in it."""
    return Path(one).resolve().is_relative_to(Path(other).resolve())
