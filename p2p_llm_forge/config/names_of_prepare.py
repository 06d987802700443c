"""What the flags of run_clm_no_trainer.py and run_clm.py about data mean in prepare_data.py."""

from __future__ import annotations

from p2p_llm_forge.config.names_of_train import LINES, SLOW
from p2p_llm_forge.config.other_names import (
    Answer,
    Meaning,
    Typed,
    all_of,
    answer,
    renamed,
    switch,
    unless_off,
    unless_on,
)


def _percentage(typed: Typed) -> list[str]:
    try:
        return ["--validation-fraction", f"{float(typed.value) / 100:g}"]
    except ValueError:
        raise Answer("use --validation-fraction 0.05 for 5 percent") from None


def _of_model(typed: Typed) -> list[str]:
    """A model's own tokenizer, unless another was named."""
    return [] if typed.has("tokenizer_name", "tokenizer") else ["--tokenizer", typed.value]


OF_PREPARATION = {
    **all_of("train_file dataset_name dataset", renamed("--dataset-path")),
    "validation_file": renamed("--validation-path"),
    "validation_split_percentage": Meaning(_percentage, stands_for="--validation-fraction"),
    "tokenizer_name": renamed("--tokenizer"),
    "model_name_or_path": Meaning(_of_model, stands_for="--tokenizer"),
    "model_name": Meaning(_of_model, stands_for="--tokenizer"),
    "preprocessing_num_workers": renamed("--num-workers"),
    "out_dir": renamed("--output-dir"),
    "overwrite_cache": renamed("--overwrite", is_switch=True),
    "overwrite_output_dir": renamed("--overwrite", is_switch=True),
    "use_fast_tokenizer": unless_on(SLOW),
    "use_slow_tokenizer": switch("--tokenizer-backend reference"),
    "keep_linebreaks": unless_on(LINES),
    "no_keep_linebreaks": unless_off(LINES),
    "streaming": unless_off("leave it out: texts of any size are prepared piece by piece"),
    "cache_dir": answer("leave it out, and write HF_HUB_CACHE={value} before the command"),
    "model_revision": answer(
        "get it by hf download NAME --revision {value} --local-dir FOLDER, then --tokenizer FOLDER"
    ),
    **all_of(
        "token use_auth_token",
        answer("leave it out: set HF_TOKEN in the environment, or log in by hf auth login"),
    ),
    "max_train_samples": answer("give it to train.py, as --max-steps N"),
    "max_eval_samples": answer("give it to train.py, as --eval-blocks N"),
    **all_of(
        "batch_size micro_batch_size per_device_train_batch_size learning_rate lr epochs minutes"
        " num_train_epochs max_steps max_train_steps max_iters warmup_steps depth compile device"
        " gradient_accumulation_steps weight_decay lr_scheduler_type optimizer model_type",
        answer("leave it out here, and give it to train.py"),
    ),
}
