"""What the scripts can be asked to do: dataclasses, read from flags and a recipe, and checked."""

from __future__ import annotations

import dataclasses
import importlib.util
import math
import os
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar, get_args, get_origin, get_type_hints

from p2p_llm_forge.errors import ForgeError, Problems, nearest

Config = TypeVar("Config")

ROUND_LENGTH = 50  # updates, where nothing else is said


def flag(default: Any, help: str, *aliases: str, metavar: str | None = None) -> Any:
    """A dataclass field that becomes a command-line flag: default, help text, aliases."""
    metadata: dict[str, Any] = {"help": help, "aliases": list(aliases)}
    if metavar:
        metadata["metavar"] = metavar
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass
class PrepareConfig:
    """One preparation: which text, which tokenizer, which blocks."""

    dataset_path: list[str] = flag(
        [],
        "text to prepare: files (.txt .jsonl .json .csv .parquet, each also .gz .zst), folders,"
        " globs, save_to_disk folders, names of datasets of the Hub; PATH:0.7 gives a weight by"
        " tokens",
        "--input",
        metavar="PATH[:WEIGHT]",
    )
    output_dir: str = flag(
        "", "folder of the prepared dataset; must be new, empty or the same dataset"
    )
    tokenizer: str | None = flag(
        None, "tokenizer: a folder or a name of the Hub; without it one is trained on the text"
    )
    eos_token: str | None = flag(
        None, "what ends a document, for a tokenizer that does not say it; added if it is new"
    )
    vocab_size: int = flag(8192, "entries of a tokenizer that is trained here")
    sequence_length: int = flag(256, "tokens in a block", "--block_size", "--block-size")
    validation_fraction: float = flag(0.1, "share of the documents that is held out for evaluation")
    validation_path: list[str] = flag(
        [], "text that is held out for evaluation, instead of a share of the documents"
    )
    document_separator: str = flag(
        "\\n\\n", "what ends a document; \\n\\n: blank lines; escapes like \\n are understood"
    )
    one_document_per_file: bool = flag(
        False, "a text file is one document, whatever lines it holds"
    )
    text_column: str = flag(
        "text", "column or key that holds the text of a row", "--text_column_name"
    )
    dataset_config: str | None = flag(
        None, "configuration of a dataset of the Hub", "--dataset_config_name"
    )
    dataset_split: str = flag("train", "split of a dataset of the Hub or of a save_to_disk folder")
    skip_bad_rows: bool = flag(
        False, "count and report rows that cannot be read instead of ending at the first"
    )
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "bytes that are not UTF-8: refuse them, or replace each by U+FFFD"
    )
    num_workers: int = flag(
        0,
        "threads that tokenize, or processes for a tokenizer written in Python; 0: one per core; "
        "any number gives the same bytes",
    )
    tokenizer_backend: Literal["auto", "fast", "reference"] = flag(
        "auto", "encode by gigatoken where it answers as the tokenizer does (auto), always or never"
    )
    trust_remote_code: bool = flag(
        False, "run the Python code that comes with a tokenizer of the Hub"
    )
    seed: int = flag(0, "chooses the documents that are held out")
    overwrite: bool = flag(False, "replace a dataset that the output directory already holds")
    describe: str | None = flag(
        None, "tell what a prepared dataset holds, and stop", metavar="FOLDER"
    )
    verify: bool = flag(False, "with --describe: read every file and compare its checksum")
    config: str | None = flag(
        None, "recipe: a YAML file whose keys are these flags; the command line wins"
    )

    def __post_init__(self) -> None:
        # From a notebook, one path is most naturally given as a string or a Path.
        for name in ("dataset_path", "validation_path"):
            if isinstance(value := getattr(self, name), (str, os.PathLike)):
                setattr(self, name, [os.fspath(value)])

    def check(self) -> None:
        """Raise ForgeError with every problem that can be seen without reading the text."""
        problems = Problems()
        problems.require(
            bool(self.describe) or not self.verify,
            "--verify checks a prepared dataset: add --describe FOLDER",
        )
        problems.require(bool(self.dataset_path), "no text given: add --dataset-path FILE")
        problems.require(bool(self.output_dir), "no place for the result: add --output-dir FOLDER")
        problems.require(
            self.sequence_length >= 2,
            f"--sequence-length is {self.sequence_length}: use 2 or more",
        )
        problems.require(
            self.vocab_size >= 257,
            f"--vocab-size is {self.vocab_size}: use 257 (256 bytes and EOS) or more",
        )
        problems.require(
            0 <= self.validation_fraction < 1,
            f"--validation-fraction is {self.validation_fraction}: use a share from 0 to below 1",
        )
        problems.require(
            self.num_workers >= 0,
            f"--num-workers is {self.num_workers}: use 0 (one per core) or more",
        )
        problems.require(
            self.document_separator != "",
            "--document-separator is empty: give the text that ends a document",
        )
        try:
            self.separator().encode()
        except (UnicodeDecodeError, UnicodeEncodeError) as error:
            problems.require(
                False,
                f"--document-separator {self.document_separator!r}: {error.reason} "
                "(write \\\\ for a backslash)",
            )
        problems.raise_any()

    def separator(self) -> str:
        """The document separator with its escapes resolved."""
        # unicode_escape reads Latin-1; everything beyond it is first written as an escape itself.
        latin = self.document_separator.encode("latin-1", "backslashreplace")
        return latin.decode("unicode_escape")

    def workers(self) -> int:
        """How many threads tokenize: as asked, or one per core that this process may use."""
        if hasattr(os, "sched_getaffinity"):
            return self.num_workers or len(os.sched_getaffinity(0))
        return self.num_workers or os.cpu_count() or 1


@dataclass
class TrainConfig:
    """One training run: what it learns from, what it builds, how long."""

    dataset_path: str = flag(
        "",
        "folder made by prepare_data.py, or a text file, which is prepared first",
        "--dataset_name",
        "--dataset-name",
    )
    output_dir: str = flag("", "folder of the run: checkpoints, figures, the final model")
    model_name: str | None = flag(
        None,
        "model to fine-tune: a folder or a name of the Hub",
        "--model_name_or_path",
        "--model-name-or-path",
    )
    model_type: str | None = flag(
        None, "family of a model trained from scratch, such as llama; without it a small GPT-2"
    )
    config_overrides: str | None = flag(
        None, "sizes of a model trained from scratch", metavar="KEY=VALUE,..."
    )
    trust_remote_code: bool = flag(
        False, "run the Python code that the model's author ships with it"
    )
    tokenizer: str | None = flag(
        None, "for a text file: tokenizer to use; without it that of --model-name, or a new one"
    )
    vocab_size: int = flag(8192, "for a text file: entries of a tokenizer that is trained on it")
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "for a text file: bytes that are not UTF-8 are refused, or replaced by U+FFFD"
    )
    sequence_length: int | None = flag(
        None,
        "tokens in a block; must be that of the prepared data; for a text file 256",
        "--block_size",
        "--block-size",
    )

    epochs: float = flag(1.0, "passes over the blocks", "--num_train_epochs", "--num-train-epochs")
    max_steps: int | None = flag(
        None, "updates; if given, --epochs does not count", "--max_train_steps", "--max-train-steps"
    )
    batch_size: int | None = flag(
        None, "blocks in one update over all processes together; 16 if nothing else says it"
    )
    micro_batch_size: int | None = flag(
        None,
        "blocks in one forward of one process; without it the largest that divides, at most 8",
        "--per_device_train_batch_size",
        "--per-device-train-batch-size",
    )
    gradient_accumulation_steps: int | None = flag(
        None,
        "forwards in one update; follows from the batch size, given only to state the batch size"
        " that other way",
    )
    learning_rate: float = flag(1e-3, "peak learning rate")
    warmup_steps: int = flag(
        0, "updates until the peak", "--num_warmup_steps", "--num-warmup-steps"
    )
    lr_scheduler: str = flag(
        "cosine",
        "schedule after the warm-up: linear, cosine, constant, wsd, or another of transformers",
        "--lr_scheduler_type",
        "--lr-scheduler-type",
    )
    optimizer: str = flag("adamw", "adamw, sgd or adafactor")
    weight_decay: float = flag(
        0.1, "decay of the matrices; vectors (biases, norms) are never decayed"
    )
    max_grad_norm: float = flag(1.0, "gradients are clipped to this norm; 0: never")
    mixed_precision: Literal["auto", "no", "bf16", "fp16"] = flag(
        "auto", "auto: what the launcher's config says, else bf16 on hardware that has it"
    )
    gradient_checkpointing: bool = flag(
        False, "recompute activations in backward: less memory, slower"
    )
    compile: bool = flag(False, "compile the model with torch.compile")
    document_mask: bool = flag(
        False, "keep attention inside documents, in training and in evaluation"
    )
    seed: int = flag(0, "chooses initial weights, order of data and dropout")

    eval_every: int = flag(0, "updates between evaluations; 0: only at the end")
    eval_only: bool = flag(False, "evaluate the model of --output-dir (or --model-name) and stop")
    log_every: int = flag(10, "updates between lines of metrics.jsonl")
    save_every: int = flag(
        500,
        "updates between checkpoints; the last update is always saved",
        "--checkpointing_steps",
        "--checkpointing-steps",
    )
    keep_checkpoints: int = flag(2, "newest checkpoints that are kept")
    keep_best: bool = flag(False, "keep the checkpoint with the lowest evaluation loss as well")
    save_in_background: bool = flag(
        True, "copy the state to memory and write it while training goes on"
    )
    max_seconds: float | None = flag(
        None, "stop, save and exit with status 124 after so many seconds"
    )
    resume: str | None = flag(
        None,
        "auto: go on from the newest complete checkpoint of --output-dir, or start; or a"
        " checkpoint's folder",
        "--resume_from_checkpoint",
        "--resume-from-checkpoint",
    )
    resume_changed: bool = flag(
        False, "go on although the data, the seed or the batch size is another one than before"
    )
    overwrite: bool = flag(False, "throw away the run that --output-dir holds")
    report_to: str = flag(
        "tensorboard",
        "trackers beside metrics.jsonl, comma-separated: tensorboard, wandb, ...; none",
    )
    sample_prompt: str = flag("", "text that the sample after training continues")

    backend: Literal["auto", "gloo", "nccl"] = flag(
        "auto", "what carries gradients; auto: nccl between GPUs, else gloo"
    )
    sync: Literal["ddp", "diloco", "auto"] = flag(
        "ddp",
        "how peers agree on weights: ddp: gradients in every update; diloco: rounds of updates"
        " alone, then one exchange; auto: what the measured link allows",
    )
    compress: Literal["none", "fp16", "bf16", "int8", "int4", "powersgd"] = flag(
        "none", "what travels: gradients (ddp) or moves (diloco) as they are, or compressed"
    )
    powersgd_rank: int | None = flag(
        None, "rank of the matrices that --compress powersgd sends; 4 if nothing else says it"
    )
    sync_every: int | None = flag(
        None, f"diloco: updates in a round; {ROUND_LENGTH} if nothing else says it"
    )
    # Among the best of a sweep on small models (benchmarks/diloco_sweep.py; its figures and those
    # of real runs: benchmarks/README.md). They take a little less than a round's own move (0.5 x
    # 1.8 of it) and let momentum make up the distance. The published 0.7 and 0.9 (arXiv 2311.08105)
    # were the worst there. More processes bear a higher rate: see `outer.outer_lr_of`.
    outer_lr: float | None = flag(
        None,
        "diloco: share of the peers' average move that is taken; if nothing else says it, 0.5 of"
        " two processes, 0.7 of four, 1 of eight or more; 1 with --outer-momentum 0 is plain"
        " averaging",
    )
    outer_momentum: float = flag(0.8, "diloco: Nesterov momentum of the outer step")
    outer_warmup_rounds: int = flag(
        20, "diloco: rounds in which the outer step goes from plain averaging to these settings"
    )
    fragments: int = flag(1, "diloco: parts of the layers that are synchronised one at a time")
    overlap_steps: int = flag(
        0, "diloco: updates that are taken while an exchange is under way; its result comes after"
    )
    ddp_warmup_steps: int = flag(0, "diloco: updates as by ddp before the first round")
    balance: Literal["none", "auto"] = flag(
        "none", "auto: faster processes get more blocks of an update, slower ones fewer"
    )
    peer_timeout: float = flag(
        30.0, "seconds that an exchange waits for a peer before the run ends"
    )
    cluster_secret_file: str | None = flag(
        None, "file with a secret that every peer must prove to know before anything is exchanged"
    )
    allow_public_address: bool = flag(
        False, "listen on an address that the internet can reach, because a firewall guards it"
    )
    cpu: bool = flag(False, "train on the CPU, also where a GPU is present")
    cpu_threads: int = flag(
        0, "threads of a process on the CPU; 0: the machine's cores over its processes"
    )
    rank: int | None = flag(None, "launch by hand: number of this process, from 0")
    world_size: int | None = flag(
        None, "launch by hand: processes in all; 1: train alone whatever the environment says"
    )
    master_addr: str | None = flag(None, "launch by hand: address of the machine of rank 0")
    master_port: int | None = flag(None, "launch by hand: a free port on that machine")

    dry_run: bool = flag(False, "check everything, say what would be done, and stop")
    config: str | None = flag(
        None, "recipe: a YAML file whose keys are these flags; the command line wins"
    )

    def __post_init__(self) -> None:
        # From a notebook, paths may be Paths and sizes a dict.
        for name in ("dataset_path", "output_dir", "model_name", "tokenizer", "resume"):
            if isinstance(getattr(self, name), os.PathLike):
                setattr(self, name, os.fspath(getattr(self, name)))
        if isinstance(self.config_overrides, dict):
            self.config_overrides = ",".join(f"{k}={v}" for k, v in self.config_overrides.items())

    # What may differ between the ranks of one run: places and addresses, not what is computed.
    PER_RANK = (
        *("dataset_path", "output_dir", "model_name", "tokenizer", "resume", "config", "report_to"),
        *("rank", "world_size", "master_addr", "master_port", "cpu_threads"),
        *("cluster_secret_file", "allow_public_address"),
        *("micro_batch_size", "gradient_checkpointing", "compile"),
    )

    def problems(self) -> Problems:
        """Every problem that can be seen without touching a file or a library."""
        problems = Problems()
        for told in wrong_values(self):
            problems.require(False, told)
        problems.raise_any()  # what follows compares the values
        problems.require(
            bool(self.dataset_path),
            "no data given: add --dataset-path FOLDER (made by prepare_data.py) or a text file",
        )
        problems.require(
            bool(self.output_dir or (self.eval_only and self.model_name)),
            "no place for the run: add --output-dir FOLDER",
        )
        self._require_ranges(problems)
        self._require_combinations(problems)
        self._require_sync(problems)
        return problems

    def _require_ranges(self, problems: Problems) -> None:
        """Every value must be one that its flag can have."""
        for name in ("epochs", "learning_rate", "log_every", "peer_timeout"):
            problems.require(
                0 < getattr(self, name) < math.inf,
                f"{option(name)} is {getattr(self, name)}: use a number above 0",
            )
        for name in (
            "max_steps",
            "batch_size",
            "micro_batch_size",
            "gradient_accumulation_steps",
            "keep_checkpoints",
        ):
            value = getattr(self, name)
            problems.require(
                value is None or value >= 1, f"{option(name)} is {value}: use 1 or more"
            )
        for name in (
            "warmup_steps",
            "weight_decay",
            "max_grad_norm",
            "eval_every",
            "save_every",
            "cpu_threads",
        ):
            problems.require(
                getattr(self, name) >= 0, f"{option(name)} is {getattr(self, name)}: use 0 or more"
            )
        problems.require(
            self.sequence_length is None or self.sequence_length >= 2,
            f"--sequence-length is {self.sequence_length}: use 2 or more",
        )
        problems.require(
            self.max_seconds is None or self.max_seconds > 0,
            f"--max-seconds is {self.max_seconds}: use a number above 0",
        )
        problems.require(
            self.world_size is None or self.world_size >= 1,
            f"--world-size is {self.world_size}: use 1 or more",
        )
        problems.require(
            abs(self.seed) < 2**63, f"--seed is {self.seed}: use a number of at most 63 bits"
        )
        problems.require(
            self.optimizer in OPTIMIZERS,
            f"unknown optimizer '{self.optimizer}': {nearest(self.optimizer, OPTIMIZERS)}",
        )

    def _require_combinations(self, problems: Problems) -> None:
        """What flags ask for must not contradict each other."""
        problems.require(
            not (self.model_name and (self.model_type or self.config_overrides)),
            "--model-name loads a model with its own sizes; --model-type and --config-overrides"
            " build a new one: give one or the other",
        )
        problems.require(
            not (self.resume and self.overwrite),
            "--resume goes on with the run that --overwrite would throw away: give one of them",
        )
        problems.require(
            not (self.keep_best and not self.eval_every),
            "--keep-best needs evaluations to choose by: add --eval-every",
        )
        problems.require(
            not (self.keep_best and self.eval_every and self.save_every % self.eval_every),
            f"--keep-best judges every checkpoint by its evaluation: --save-every {self.save_every}"
            f" must be a multiple of --eval-every {self.eval_every}",
        )
        problems.require(
            not (self.overwrite and self.model_name and _is_same(self.model_name, self.output_dir)),
            f"--overwrite would throw away --model-name {self.model_name}: choose another"
            " --output-dir",
        )

    def round_length(self) -> int:
        """Updates in a round of DiLoCo."""
        return self.sync_every or ROUND_LENGTH

    def is_streaming(self) -> bool:
        """Whether there is no moment, but the end, at which all ranks hold the same weights."""
        return self.sync == "diloco" and (self.fragments > 1 or self.overlap_steps > 0)

    def keeps_own_state(self) -> bool:
        """Whether ranks hold what others do not, so that checkpoints take a file of each."""
        return self.sync == "diloco" or self.compress != "none"

    def _require_sync(self, problems: Problems) -> None:
        """What the flags of `--sync` ask for must fit together."""
        every = self.round_length()
        for name in ("sync_every", "fragments", "powersgd_rank"):
            value = getattr(self, name)
            problems.require(
                value is None or value >= 1, f"{option(name)} is {value}: use 1 or more"
            )
        for name in ("outer_warmup_rounds", "overlap_steps", "ddp_warmup_steps"):
            problems.require(
                getattr(self, name) >= 0, f"{option(name)} is {getattr(self, name)}: use 0 or more"
            )
        problems.require(
            self.outer_lr is None or 0 < self.outer_lr < math.inf,
            f"--outer-lr is {self.outer_lr}: use a number above 0",
        )
        problems.require(
            0 <= self.outer_momentum < 1,
            f"--outer-momentum is {self.outer_momentum}: use a number from 0 to below 1",
        )
        if self.sync != "diloco":
            defaults = {field.name: field.default for field in dataclasses.fields(self)}
            given = [option(name) for name in OF_DILOCO if getattr(self, name) != defaults[name]]
            problems.require(
                not given,
                f"{', '.join(given)} belong{'s' if len(given) == 1 else ''} to --sync diloco, this"
                f" run is --sync {self.sync}: add --sync diloco, or leave them out",
            )
        problems.require(
            self.sync != "auto" or self.compress == "none",
            f"--sync auto chooses the compression too: leave out --compress {self.compress}, or"
            " choose --sync ddp or diloco",
        )
        problems.require(
            self.powersgd_rank is None or self.compress == "powersgd",
            f"--powersgd-rank belongs to --compress powersgd, this run has {self.compress}",
        )
        if self.sync != "diloco":
            return
        problems.require(
            self.compress != "powersgd",
            "--compress powersgd approximates gradients and goes with --sync ddp; for the moves of"
            " --sync diloco use int8 or int4",
        )
        problems.require(
            self.fragments <= every,
            f"--fragments {self.fragments} cannot be synchronised at different moments of"
            f" --sync-every {every} updates: use {every} fragments or fewer",
        )
        problems.require(
            self.overlap_steps < every,
            f"--overlap-steps {self.overlap_steps} is not below --sync-every {every}: an exchange"
            f" must end before the next begins; use {every - 1} or fewer",
        )
        problems.require(
            self.is_streaming() or self.eval_every % every == 0,
            f"--eval-every {self.eval_every} is not a multiple of --sync-every {every}, and only"
            " there all ranks hold the same weights: use"
            f" {' or '.join(map(str, multiples_near(self.eval_every, every)))}",
        )

    def shared_settings(self) -> dict[str, Any]:
        """The settings that must be the same on every rank of a run."""
        return {key: value for key, value in as_dict(self).items() if key not in self.PER_RANK}


OF_DILOCO = (
    *("sync_every", "outer_lr", "outer_momentum", "outer_warmup_rounds"),
    *("fragments", "overlap_steps", "ddp_warmup_steps"),
)


def multiples_near(value: int, unit: int) -> list[int]:
    """The multiples of `unit` next to `value`, but for 0."""
    below = value // unit * unit
    return [number for number in (below, below + unit) if number]


@dataclass
class CheckConfig(TrainConfig):
    """One look at a launch before it is made: takes the flags of train.py beside its own."""

    config_file: list[str] = flag(
        [], "this machine's file for `accelerate launch`, or the files of several", metavar="FILE"
    )
    meet: bool = flag(
        False,
        "with --config-file, on every machine: meet the others without a launcher, one process on"
        " each",
    )
    json: bool = flag(False, "print the report as JSON")
    write_configs: str | None = flag(
        None, "write a commented launch file for each of --hosts, and stop", metavar="FOLDER"
    )
    hosts: list[str] = flag([], "addresses of all machines, the main one first")
    gpus_per_host: int | None = flag(
        None, "with --write-configs: GPUs of each machine; without it one process on the CPU"
    )

    OWN = ("config_file", "meet", "json", "write_configs", "hosts", "gpus_per_host")

    def shared_settings(self) -> dict[str, Any]:
        """As of a training: how it is looked at may differ between the ranks."""
        return {key: v for key, v in super().shared_settings().items() if key not in self.OWN}

    def problems(self) -> Problems:
        """As of a training, which may still lack its data and its folder."""
        named = dataclasses.replace(
            self,
            dataset_path=self.dataset_path or "not chosen",
            output_dir=self.output_dir or "not chosen",
        )
        problems = TrainConfig.problems(named)
        problems.require(
            bool(self.write_configs) == bool(self.hosts),
            "--write-configs FOLDER and --hosts ADDRESS ... belong together",
        )
        problems.require(
            not (self.gpus_per_host is not None and self.cpu),
            "--gpus-per-host and --cpu contradict each other: give one",
        )
        problems.require(
            self.gpus_per_host is None or self.gpus_per_host >= 1,
            f"--gpus-per-host is {self.gpus_per_host}: use 1 or more, or --cpu",
        )
        problems.require(
            not self.meet or len(self.config_file) == 1,
            "--meet needs the file of this machine: --config-file my_node.yaml",
        )
        return problems


def _is_same(one: str, other: str) -> bool:
    """Whether two names mean the same folder."""
    return Path(one).resolve() == Path(other).resolve()


def wrong_values(config: Any) -> list[str]:
    """A message for each field whose value is not of its type: a notebook can pass anything."""
    told = []
    for name, hint in get_type_hints(type(config)).items():
        value, kinds = getattr(config, name), get_args(hint) or (hint,)
        kinds = (list,) if get_origin(hint) is list else kinds
        if get_origin(hint) is Literal:
            if value not in kinds:
                told.append(f"{option(name)} is {value!r}: choose from {', '.join(kinds)}")
            continue
        classes = tuple({get_origin(kind) or kind for kind in kinds})
        is_number = float in classes and isinstance(value, int) and not isinstance(value, bool)
        if not is_number and type(value) not in classes:
            told.append(f"{option(name)} is {value!r}, of the wrong type")
    return told


OPTIMIZERS = ("adamw", "sgd", "adafactor")


def option(field_name: str) -> str:
    """A field's name as its flag is written."""
    return "--" + field_name.replace("_", "-")


def parse(config_class: type[Config], argv: list[str], script: str) -> Config:
    """Read a config from the command line and the recipe that `--config` names.

    The recipe's keys are the flags' names (dashes or underscores). Raises ForgeError for unknown
    keys or flags (with the nearest name) and for values of the wrong type; `--help` exits with 0.
    """
    parser = _parser(config_class, script)
    recipe = _option(argv, "--config")
    recipe_argv = _recipe_as_flags(Path(recipe), parser) if recipe else []
    namespace, unknown = parser.parse_known_args(recipe_argv + argv)
    if unknown:
        names = {option for action in parser._actions for option in action.option_strings}
        told = [
            f"unknown argument {word}: {nearest(word, names)}"
            for word in unknown
            if word.startswith("--")
        ]
        raise ForgeError(
            "\n".join(told) or f"arguments that belong to no flag: {' '.join(unknown)}"
        )
    return config_class(**vars(namespace))


def _parser(config_class: type, script: str) -> Any:
    class Parser(_hf_argument_parser()):  # type: ignore[misc]
        def error(self, message: str) -> None:
            raise ForgeError(f"{message} (all flags: {script} --help)")

    description = (config_class.__doc__ or "").split(":")[0]
    return Parser(config_class, prog=script, description=description, allow_abbrev=False)


def flags_table(config_class: type) -> str:
    """All flags of a script as a Markdown table, read from the parser itself, for the README.

    Of a config that extends another, only what it adds.
    """
    inherited = {
        name
        for base in config_class.__mro__[1:]
        for name in getattr(base, "__dataclass_fields__", {})
    }
    rows = ["| flag | default | what it does |", "|---|---|---|"]
    actions = _parser(config_class, "")._actions
    for action in actions:
        if (
            action.dest in {"help", *inherited} or action.const is False
        ):  # --no-x stands in the row of --x
            continue
        # Spellings with dashes and with underscores are one name: ours is shown with dashes, an
        # alias with underscores, as the users of Hugging Face's scripts know it.
        name, *aliases = dict.fromkeys(
            word.removeprefix("--").replace("-", "_") for word in action.option_strings
        )
        shown = [f"{option(name)} {action.metavar or ''}".strip(), *(f"--{a}" for a in aliases)]
        if action.default is True:
            shown.append(option(f"no_{name}"))
        default = "" if action.default in (None, "", []) else f"`{action.default}`"
        if isinstance(action.default, bool):
            default = "on" if action.default else "off"
        told = action.help
        if action.choices:
            told += f" ({', '.join(f'`{choice}`' for choice in action.choices)})"
        rows.append(f"| {'<br>'.join(f'`{word}`' for word in shown)} | {default} | {told} |")
    return "\n".join(rows) + "\n"


def _hf_argument_parser() -> type:
    """transformers.HfArgumentParser without the package around it.

    `import transformers` costs over a second (5.23); its argument parser needs only the standard
    library and PyYAML, and `--help` should answer at once.
    """
    if "transformers" not in sys.modules:
        package = importlib.util.find_spec("transformers")
        if package and package.submodule_search_locations:
            file = Path(package.submodule_search_locations[0]) / "hf_argparser.py"
            spec = importlib.util.spec_from_file_location("p2p_llm_forge._hf_argparser", file)
            if file.exists() and spec and spec.loader:
                module = importlib.util.module_from_spec(spec)
                spec.loader.exec_module(module)
                return module.HfArgumentParser
    from transformers import HfArgumentParser

    return HfArgumentParser


def _option(argv: list[str], name: str) -> str | None:
    """The last value that `argv` gives to option `name`, as `--name value` or `--name=value`."""
    value = None
    for word, following in zip(argv, [*argv[1:], None], strict=False):
        if word == name:
            value = following
        elif word.startswith(name + "="):
            value = word.split("=", 1)[1]
    return value


def _recipe_as_flags(path: Path, parser: Any) -> list[str]:
    """The recipe's keys and values as command-line words, so that both take one way."""
    import yaml

    if not path.is_file():
        raise ForgeError(
            f"--config {path}: no such file (recipes that come with the project: recipes/)"
        )
    try:
        recipe = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise ForgeError(f"--config {path} is not YAML: {error}") from error
    if recipe is None:
        return []
    if not isinstance(recipe, dict):
        raise ForgeError(
            f"--config {path} must hold `key: value` lines, found a {type(recipe).__name__}"
        )
    flags = {
        option.removeprefix("--").replace("-", "_")
        for action in parser._actions
        for option in action.option_strings
        if option.startswith("--")
    } - {"help", "config"}
    problems = Problems()
    words: list[str] = []
    for key, value in recipe.items():
        name = str(key).replace("-", "_")
        if name not in flags:
            problems.require(False, f"{path}: unknown key '{key}': {nearest(name, flags)}")
        elif isinstance(value, list):
            words += [f"--{name}", *map(str, value)]
        elif isinstance(value, dict):
            # `config_overrides: {hidden_size: 64}` reads better in YAML than one long string.
            words += [f"--{name}={','.join(f'{k}={v}' for k, v in value.items())}"]
        elif value is not None:
            words += [f"--{name}={value}"]
    problems.raise_any()
    return words


def as_dict(config: Any) -> dict[str, Any]:
    """The config as plain JSON values."""
    return dataclasses.asdict(config)
