"""What the flags of run_clm_no_trainer.py, run_clm.py and nanoGPT's train.py mean in train.py.

After their sources: transformers 5.23 (examples/pytorch/language-modeling, TrainingArguments; names
of 4.x that are still typed, too) and nanoGPT (train.py and config/).
"""

from __future__ import annotations

import contextlib
import math
import shlex

from p2p_llm_forge.config.conversations import WHOLE
from p2p_llm_forge.config.other_names import (
    NO,
    YES,
    Answer,
    Meaning,
    Typed,
    all_of,
    answer,
    if_there,
    only,
    renamed,
    switch,
    unless_off,
    unless_on,
    values,
)

PREPARE = "prepare it first: python prepare_data.py --dataset-path {text} --output-dir FOLDER{more}"
THEN = "; then train with --dataset-path FOLDER"
HUB_DATA = PREPARE.format(text="{value}", more=THEN)
LINES = "leave it out: a text is learnt with its line breaks, whatever they are"
SLOW = "leave it out: python prepare_data.py --tokenizer-backend reference takes no shortcuts"
UNDONE = "leave it out: nothing here does it"
SIZES = ("n_layer", "n_head", "n_embd")  # of nanoGPT's model, which is GPT-2
PDROPS = ("resid_pdrop", "embd_pdrop", "attn_pdrop")  # of that model: dropout
STEPS = ("max_steps", "max_train_steps", "max_iters")


def _prepared_with(flag: str, divided_by: int = 0) -> Meaning:
    """What prepare_data.py is asked for, by that flag."""

    def of(typed: Typed) -> list[str]:
        names = ("train_file", "dataset_path", "dataset_name", "dataset")
        text = next((typed.others[name] for name in names if typed.has(name)), "TEXT")
        value = typed.value
        with contextlib.suppress(ValueError):
            value = f"{float(value) / divided_by:g}" if divided_by else value
        raise Answer(PREPARE.format(text=text, more=f" {flag} {shlex.quote(value)}{THEN}"))

    return Meaning(of)


def _micro_batch(typed: Typed) -> list[str]:
    """Blocks of a forward on each process, which are those of an update if nothing accumulates."""
    words = ["--micro-batch-size", typed.value]
    sized = ("gradient_accumulation_steps", "batch_size", "minutes", "auto_find_batch_size")
    return words if typed.has(*sized) else [*words, "--gradient-accumulation-steps", "1"]


def _gpt2(typed: Typed) -> list[str]:
    """Sizes of nanoGPT's model: all that were typed, in the place of the first."""
    sizes = {name: value for name, value in typed.others.items() if name in SIZES}
    if typed.name != next(iter(sizes)):
        return []  # said already
    if typed.has("dropout"):
        sizes |= dict.fromkeys(PDROPS, typed.others["dropout"])
    pairs = ",".join(f"{name}={value}" for name, value in sizes.items())
    if typed.has("config_overrides"):
        raise Answer(f"leave it out, and add {pairs} to --config-overrides")
    family = [] if typed.has("model_type") else ["--model-type", "gpt2"]
    return [*family, "--config-overrides", pairs]


def _dropout(typed: Typed) -> list[str]:
    """Of GPT-2 a size like the others, and no flag."""
    return [] if typed.has(*SIZES) else ["--dropout", *typed.value_words()]


def _size(typed: Typed) -> list[str]:
    raise Answer(f"use --config-overrides {typed.name}={typed.value}, or --depth N for all sizes")


def _decay_steps(typed: Typed) -> list[str]:
    if typed.value not in [typed.others.get(name) for name in STEPS]:
        raise Answer("leave it out: the learning rate falls until the last update (--max-steps)")
    return []


def _warmup(typed: Typed) -> list[str]:
    """A share of the updates, where their number was typed."""
    steps = next((typed.others[name] for name in STEPS if typed.has(name)), "")
    try:
        if float(typed.value) == 0 or steps:
            return ["--warmup-steps", str(math.ceil(float(typed.value) * int(steps or 0)))]
    except ValueError:
        pass
    raise Answer("use --warmup-steps N: that share of the updates, whose number --dry-run prints")


def _evaluate(typed: Typed) -> list[str]:
    return ["--eval-only"] if typed.is_on() and not typed.has("do_train") else []


def _eval_strategy(typed: Typed) -> list[str]:
    if typed.value == "epoch":
        raise Answer("use --eval-every N, in updates: blocks / batch, which --dry-run prints")
    if typed.value != "steps" or typed.has("eval_steps", "eval_every"):
        return []
    return ["--eval-every", typed.others.get("logging_steps", "500")]


def _save_strategy(typed: Typed) -> list[str]:
    if typed.value == "epoch":
        raise Answer("use --save-every N, in updates: blocks / batch, which --dry-run prints")
    if typed.value == "best":
        raise Answer("use --keep-best with --eval-every N")
    return ["--save-every", "0"] if typed.value == "no" else []


def _eval_iters(typed: Typed) -> list[str]:
    """Batches that nanoGPT evaluates: blocks here."""
    try:
        batch = typed.others.get("batch_size", "12")  # nanoGPT's default
        return ["--eval-blocks", str(int(typed.value) * int(batch))]
    except ValueError:
        raise Answer("use --eval-blocks N") from None


def _push(typed: Typed) -> list[str]:
    """A name; of Hugging Face's scripts a switch, beside which --hub_model_id names the model."""
    if typed.value.lower() not in YES | NO:
        return ["--push-to-hub", typed.value]
    if typed.is_on() and not typed.has("hub_model_id"):
        raise Answer("use --push-to-hub NAME")
    return []


def _device(typed: Typed) -> list[str]:
    kind, _, number = typed.value.partition(":")
    if kind == "cpu":
        return ["--cpu"]
    if kind == "cuda" and not number:
        return []  # is used where there is one
    if kind == "cuda":
        raise Answer(f"leave it out, and write CUDA_VISIBLE_DEVICES={number} before the command")
    raise Answer("leave it out for GPUs that CUDA knows, or use --cpu")


OF_DATA = {
    "train_file": renamed("--dataset-path"),
    **all_of("dataset_name dataset", if_there("--dataset-path", HUB_DATA)),
    "dataset_config_name": _prepared_with("--dataset-config"),
    "validation_file": _prepared_with("--validation-path"),
    "validation_split_percentage": _prepared_with("--validation-fraction", divided_by=100),
    "preprocessing_num_workers": answer("leave it out: a text is prepared by all cores"),
    "overwrite_cache": unless_off("leave it out: a text that has changed is prepared again"),
    "streaming": unless_off("leave it out: texts of any size are prepared piece by piece"),
    "keep_linebreaks": unless_on(LINES),
    "no_keep_linebreaks": unless_off(LINES),
    "eval_iters": Meaning(_eval_iters, stands_for="--eval-blocks"),
    "max_train_samples": answer("use --max-steps N"),
    **all_of(
        "group_by_length train_sampling_strategy length_column_name remove_unused_columns"
        " label_names",
        answer("leave it out: all blocks have one length and one column"),
    ),
    **all_of(
        "dataloader_num_workers dataloader_drop_last dataloader_pin_memory dataloader_in_order"
        " dataloader_persistent_workers dataloader_prefetch_factor"
        " dataloader_multiprocessing_context",
        answer("leave it out: blocks are read where they lie, without loaders"),
    ),
}
OF_MODEL = {
    "tokenizer_name": renamed("--tokenizer"),
    "use_fast_tokenizer": unless_on(SLOW),
    "use_slow_tokenizer": unless_off(SLOW),
    "config_name": answer("use --model-type FAMILY, with sizes by --config-overrides KEY=VALUE"),
    "cache_dir": answer("leave it out, and write HF_HUB_CACHE={value} before the command"),
    "model_revision": answer(
        "get it by hf download NAME --revision {value} --local-dir FOLDER, then --model-name FOLDER"
    ),
    **all_of(
        "token use_auth_token hub_token",
        answer("leave it out: set HF_TOKEN in the environment, or log in by hf auth login"),
    ),
    "low_cpu_mem_usage": switch(""),
    "torch_dtype": answer("leave it out: weights are float32; use --mixed-precision bf16"),
    "init_from": values({"scratch": "", "resume": "--resume auto"}, "--model-name {value}"),
    "dropout": Meaning(_dropout),
    **all_of(" ".join(SIZES), Meaning(_gpt2, stands_for="--model-type gpt2 --config-overrides")),
    **all_of(
        "num_layers n_layers num_hidden_layers",
        answer("use --depth {value}, or --config-overrides num_hidden_layers={value}"),
    ),
    **all_of("hidden_size num_attention_heads intermediate_size", Meaning(_size)),
    "bias": answer("leave it out: --model-type gpt2 has biases, and the default model has none"),
    "activation_checkpointing": renamed("--gradient-checkpointing", is_switch=True),
    **all_of(
        "gradient_checkpointing_kwargs activation_checkpointing_kwargs",
        answer("use --gradient-checkpointing alone"),
    ),
    "torch_compile": switch("--compile on", "--compile off"),
    "torch_compile_backend": answer("use --compile on"),
    "torch_compile_mode": answer("use --compile on"),
    **all_of(
        "use_liger_kernel liger_kernel_config neftune_noise_alpha use_cache",
        answer(UNDONE),
    ),
    **all_of(
        "fsdp fsdp_config deepspeed parallelism_config accelerator_config",
        answer("leave it out: every peer holds the whole model; --gradient-checkpointing helps"),
    ),
}
OF_UPDATES = {
    "lr": renamed("--learning-rate"),
    "max_iters": renamed("--max-steps"),
    "warmup_iters": renamed("--warmup-steps"),
    "warmup_ratio": Meaning(_warmup, stands_for="--warmup-steps"),
    "grad_clip": renamed("--max-grad-norm"),
    **all_of(
        "per_device_train_batch_size per_gpu_train_batch_size",
        Meaning(_micro_batch, stands_for="--micro-batch-size"),
    ),
    **all_of(
        "per_device_eval_batch_size per_gpu_eval_batch_size eval_accumulation_steps",
        answer("leave it out: evaluations take the --micro-batch-size"),
    ),
    "auto_find_batch_size": switch("--micro-batch-size auto"),
    "lr_decay_iters": Meaning(_decay_steps),
    "min_lr": only(0, "leave it out: --lr-scheduler cosine ends at 0"),
    "decay_lr": switch("", "--lr-scheduler constant"),
    "lr_scheduler_kwargs": answer("use --lr-scheduler and --warmup-steps alone"),
    **all_of("beta1 adam_beta1", only(0.9, "leave it out: beta1 of --optimizer adamw is 0.9")),
    **all_of("beta2 adam_beta2", only(0.95, "leave it out: beta2 of --optimizer adamw is 0.95")),
    "adam_epsilon": only(1e-8, "leave it out: epsilon of --optimizer adamw is 1e-8"),
    "optim": values(
        {
            **dict.fromkeys(
                ("adamw_torch", "adamw_torch_fused", "adamw_hf", "adamw"), "--optimizer adamw"
            ),
            **{"adafactor": "--optimizer adafactor", "sgd": "--optimizer sgd"},
        },
        "fix: use --optimizer adamw, muon, sgd or adafactor",
    ),
    **all_of("optim_args optim_target_modules", answer("use --optimizer alone")),
    "bf16": switch("--mixed-precision bf16"),
    "fp16": switch("--mixed-precision fp16"),
    "dtype": values(
        {
            **{"float32": "--mixed-precision no", "bfloat16": "--mixed-precision bf16"},
            **{"float16": "--mixed-precision fp16", "auto": "--mixed-precision auto"},
        },
        "fix: use --mixed-precision no, bf16 or fp16",
    ),
    **all_of(
        "bf16_full_eval fp16_full_eval tf32 fp16_opt_level half_precision_backend",
        answer("leave it out: --mixed-precision decides for training and evaluation"),
    ),
    "label_smoothing_factor": only(0, UNDONE),
    "average_tokens_across_devices": switch(""),
    "data_seed": answer("use --seed {value}, which orders the data too"),
    "full_determinism": unless_off("leave it out: --seed decides everything; a CPU repeats it"),
}
OF_SAVING = {
    "out_dir": renamed("--output-dir"),
    **all_of("eval_interval eval_steps", renamed("--eval-every")),
    **all_of("log_interval logging_steps", renamed("--log-every")),
    "save_steps": renamed("--save-every"),
    "checkpointing_steps": values(
        {"epoch": "fix: use --save-every N, in updates: blocks / batch, which --dry-run prints"},
        "--save-every {value}",
    ),
    "save_total_limit": renamed("--keep-checkpoints"),
    "overwrite_output_dir": renamed("--overwrite", is_switch=True),
    "resume_from_checkpoint": values(
        {**dict.fromkeys(("true", "last", "latest"), "--resume auto"), "false": ""},
        "--resume {value}",
    ),
    **all_of("eval_strategy evaluation_strategy", Meaning(_eval_strategy, False, "--eval-every")),
    "save_strategy": Meaning(_save_strategy, stands_for="--save-every"),
    "logging_strategy": values({"steps": ""}, "fix: use --log-every N, in updates"),
    "logging_first_step": switch(""),
    "do_train": switch(""),
    "do_eval": Meaning(_evaluate, True, "--eval-only"),
    "do_predict": unless_off("use --eval-only: it evaluates the text that is held out"),
    "always_save_checkpoint": values({"true": ""}, "fix: use --keep-best with --eval-every N"),
    "load_best_model_at_end": unless_off("use --keep-best with --eval-every N"),
    "metric_for_best_model": values(
        {"loss": "", "eval_loss": ""}, "fix: leave it out: --keep-best goes by the evaluation loss"
    ),
    "greater_is_better": unless_off("leave it out: --keep-best keeps the lowest evaluation loss"),
    "with_tracking": switch(""),
    "wandb_log": switch("--report-to wandb"),
    "push_to_hub": Meaning(_push, stands_for="--push-to-hub"),
    "hub_strategy": values(
        {"end": "", **dict.fromkeys(("every_save", "checkpoint"), "--push-checkpoints")},
        "fix: use --push-checkpoints, or leave it out to upload at the end",
    ),
    **all_of("hub_always_push hub_revision", answer("use --push-to-hub NAME alone")),
    "logging_dir": answer("leave it out: everything of a run lies in its --output-dir"),
    **all_of(
        "wandb_project wandb_run_name run_name project trackio_space_id",
        answer("leave it out: each run has its --output-dir, and --report-to names trackers"),
    ),
    "disable_tqdm": unless_off("leave it out, and add 2>&1 | cat for lines without a bar"),
    "save_safetensors": unless_on("leave it out: nothing is ever saved by pickle"),
    "save_only_model": unless_off("leave it out, and use --save-every 0 for no more than the end"),
    "eval_on_start": unless_off("leave it out: --eval-only evaluates a model before training"),
    **all_of(
        "log_level log_level_replica log_on_each_node save_on_each_node eval_delay debug"
        " logging_nan_inf_filter include_num_input_tokens_seen include_tokens_per_second"
        " prediction_loss_only include_for_metrics include_inputs_for_metrics batch_eval_metrics"
        " eval_do_concat_batches eval_use_gather_object skip_memory_metrics ignore_data_skip"
        " restore_callback_states_from_checkpoint torch_empty_cache_steps enable_jit_checkpoint"
        " jit_mode_eval past_index trackio_bucket_id trackio_static_space_id",
        answer("leave it out: it is for inside Hugging Face's Trainer"),
    ),
}
OF_LAUNCH = {
    **all_of("use_cpu no_cuda", renamed("--cpu", is_switch=True)),
    "device": Meaning(_device, stands_for="--cpu"),
    "use_mps_device": unless_off("leave it out for GPUs that CUDA knows, or use --cpu"),
    "ddp_backend": renamed("--backend"),
    "ddp_timeout": answer("use --peer-timeout SECONDS: without a sign of life a peer is lost"),
    **all_of(
        "ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph",
        answer("leave it out: --sync says how peers agree"),
    ),
    **all_of(
        "local_rank num_processes num_machines machine_rank main_process_ip main_process_port"
        " nproc_per_node nnodes node_rank multi_gpu",
        answer("write it before train.py, where the launcher (accelerate, torchrun) reads it"),
    ),
}
# Flags of prepare_data.py, which train.py has not.
OF_PREPARING = {
    name: _prepared_with("--" + name.replace("_", "-"))
    for name in (
        *("validation_path", "validation_fraction", "document_separator", "text_column"),
        *("one_document_per_file", "csv_delimiter", "dataset_config", "dataset_split"),
        *("skip_bad_rows", "deduplicate", "min_document_tokens", "max_document_tokens"),
        *("eos_token", "tokenizer_backend", "num_workers"),
        *("train_on", "chat_template", "long_conversations"),
    )
}
# What TRL and LitGPT call it where conversations are trained.
ON_ANSWERS = f" --train-on assistant{THEN}"
OF_CONVERSATIONS = {
    **all_of(
        "assistant_only_loss completion_only_loss mask_prompt",
        answer(PREPARE.format(text="TEXT", more=ON_ANSWERS), is_switch=True),
    ),
    **all_of("packing sample_packing", unless_on(WHOLE)),
    **all_of("max_length max_seq_length", renamed("--sequence-length")),
}
OF_TRAINING = (
    OF_PREPARING | OF_CONVERSATIONS | OF_DATA | OF_MODEL | OF_UPDATES | OF_SAVING | OF_LAUNCH
)
