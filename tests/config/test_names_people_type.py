"""Every flag of Hugging Face's language modelling scripts and of nanoGPT does the same here, or is
answered by what does it.

The lists of names are copied from their sources: run_clm_no_trainer.py and run_clm.py of
transformers (examples/pytorch/language-modeling), TrainingArguments of 5.23 with names of 4.x that
are still typed, and the globals of nanoGPT's train.py. What each comes to was written by hand,
after what these programs do with it.
"""

from __future__ import annotations

import dataclasses
import re
import shlex

import pytest

from p2p_llm_forge.config import CheckConfig, GenerateConfig, PrepareConfig, TrainConfig, parse
from p2p_llm_forge.errors import ForgeError

RUN_CLM_NO_TRAINER = """
dataset_name dataset_config_name train_file validation_file validation_split_percentage
model_name_or_path config_name tokenizer_name use_slow_tokenizer per_device_train_batch_size
per_device_eval_batch_size learning_rate weight_decay num_train_epochs max_train_steps
gradient_accumulation_steps lr_scheduler_type num_warmup_steps output_dir seed model_type
block_size preprocessing_num_workers overwrite_cache no_keep_linebreaks trust_remote_code
checkpointing_steps resume_from_checkpoint with_tracking report_to low_cpu_mem_usage hub_token
push_to_hub hub_model_id
"""
RUN_CLM = """
model_name_or_path model_type config_overrides config_name tokenizer_name cache_dir
use_fast_tokenizer model_revision token trust_remote_code dtype torch_dtype low_cpu_mem_usage
use_auth_token dataset_name dataset_config_name train_file validation_file max_train_samples
max_eval_samples streaming block_size overwrite_cache validation_split_percentage
preprocessing_num_workers keep_linebreaks
"""
TRAINING_ARGUMENTS = """
output_dir per_device_train_batch_size num_train_epochs max_steps learning_rate lr_scheduler_type
lr_scheduler_kwargs warmup_steps optim optim_args weight_decay adam_beta1 adam_beta2 adam_epsilon
optim_target_modules gradient_accumulation_steps average_tokens_across_devices max_grad_norm
label_smoothing_factor bf16 fp16 bf16_full_eval fp16_full_eval tf32 activation_checkpointing
activation_checkpointing_kwargs gradient_checkpointing gradient_checkpointing_kwargs torch_compile
torch_compile_backend torch_compile_mode use_liger_kernel liger_kernel_config use_cache
neftune_noise_alpha torch_empty_cache_steps auto_find_batch_size logging_strategy logging_steps
logging_first_step log_on_each_node logging_nan_inf_filter include_num_input_tokens_seen log_level
log_level_replica disable_tqdm report_to run_name project trackio_space_id trackio_bucket_id
trackio_static_space_id eval_strategy eval_steps eval_delay per_device_eval_batch_size
prediction_loss_only eval_on_start eval_do_concat_batches eval_use_gather_object
eval_accumulation_steps include_for_metrics batch_eval_metrics save_only_model save_strategy
save_steps save_on_each_node save_total_limit enable_jit_checkpoint hub_token push_to_hub
hub_private_repo hub_model_id hub_strategy hub_always_push hub_revision load_best_model_at_end
metric_for_best_model greater_is_better ignore_data_skip restore_callback_states_from_checkpoint
full_determinism seed data_seed use_cpu accelerator_config parallelism_config dataloader_drop_last
dataloader_num_workers dataloader_pin_memory dataloader_persistent_workers
dataloader_prefetch_factor dataloader_multiprocessing_context dataloader_in_order
remove_unused_columns label_names train_sampling_strategy length_column_name
ddp_find_unused_parameters ddp_bucket_cap_mb ddp_broadcast_buffers ddp_static_graph ddp_backend
ddp_timeout fsdp fsdp_config deepspeed debug skip_memory_metrics do_train do_eval do_predict
resume_from_checkpoint local_rank evaluation_strategy no_cuda warmup_ratio overwrite_output_dir
logging_dir save_safetensors group_by_length per_gpu_train_batch_size per_gpu_eval_batch_size
use_mps_device fp16_opt_level half_precision_backend jit_mode_eval past_index
include_tokens_per_second include_inputs_for_metrics
"""
NANOGPT = """
out_dir eval_interval log_interval eval_only always_save_checkpoint eval_iters init_from wandb_log
wandb_project wandb_run_name dataset gradient_accumulation_steps batch_size block_size n_layer
n_head n_embd dropout bias learning_rate max_iters weight_decay beta1 beta2 grad_clip decay_lr
warmup_iters lr_decay_iters min_lr backend device dtype compile
"""
NEEDED = ["--dataset-path", "data", "--output-dir", "run"]

# What is typed, and what does the same here.
SAME = {
    "--train_file data": "",
    "--dataset_name tests": "--dataset-path tests",
    "--dataset=tests": "--dataset-path tests",
    "--model_name_or_path gpt2": "--model-name gpt2",
    "--tokenizer_name gpt2": "--tokenizer gpt2",
    "--use_fast_tokenizer True": "",
    "--per_device_train_batch_size 4": "--micro-batch-size 4 --gradient-accumulation-steps 1",
    "--per_device_train_batch_size 4 --gradient_accumulation_steps 2": (
        "--micro-batch-size 4 --gradient-accumulation-steps 2"
    ),
    "--per_device_train_batch_size 4 --minutes 2": "--micro-batch-size 4 --minutes 2",
    "--per_gpu_train_batch_size 4": "--micro-batch-size 4 --gradient-accumulation-steps 1",
    "--num_train_epochs 3": "--epochs 3",
    "--max_train_steps 7": "--max-steps 7",
    "--lr_scheduler_type linear": "--lr-scheduler linear",
    "--num_warmup_steps 5": "--warmup-steps 5",
    "--block_size 64": "--sequence-length 64",
    "--checkpointing_steps 9": "--save-every 9",
    "--resume_from_checkpoint run/checkpoint-9": "--resume run/checkpoint-9",
    "--resume_from_checkpoint True": "--resume auto",
    "--with_tracking": "",
    "--low_cpu_mem_usage": "",
    "--lr 1e-4": "--learning-rate 1e-4",
    "--keep_linebreaks True": "",
    "--dtype bfloat16": "--mixed-precision bf16",
    "--dtype=float32": "--mixed-precision no",
    "--dtype=float16": "--mixed-precision fp16",
    "--dtype auto": "--mixed-precision auto",
    "--bf16": "--mixed-precision bf16",
    "--bf16 True --seed 3": "--mixed-precision bf16 --seed 3",
    "--bf16 False": "",
    "--fp16": "--mixed-precision fp16",
    "--optim adamw_torch_fused": "--optimizer adamw",
    "--optim adafactor": "--optimizer adafactor",
    "--adam_beta1 0.9 --adam_beta2 0.95 --adam_epsilon 1e-8": "",
    "--average_tokens_across_devices": "",
    "--label_smoothing_factor 0.0": "",
    "--activation_checkpointing": "--gradient-checkpointing",
    "--torch_compile": "--compile on",
    "--torch_compile False": "--compile off",
    "--auto_find_batch_size": "--micro-batch-size auto",
    "--logging_steps 20": "--log-every 20",
    "--logging_strategy steps": "",
    "--logging_first_step": "",
    "--eval_strategy no": "",
    "--eval_strategy steps": "--eval-every 500",
    "--eval_strategy steps --eval_steps 30": "--eval-every 30",
    "--evaluation_strategy=steps --logging_steps=20": "--eval-every 20 --log-every 20",
    "--save_strategy no": "--save-every 0",
    "--save_strategy steps --save_steps 30": "--save-every 30",
    "--save_total_limit 3": "--keep-checkpoints 3",
    "--save_safetensors True": "",
    "--metric_for_best_model eval_loss": "",
    "--use_cpu": "--cpu",
    "--no_cuda": "--cpu",
    "--ddp_backend gloo": "--backend gloo",
    "--do_train --do_eval": "",
    "--do_eval": "--eval-only",
    "--warmup_ratio 0.03 --max_steps 101": "--warmup-steps 4 --max-steps 101",
    "--warmup_ratio 0": "--warmup-steps 0",
    "--overwrite_output_dir": "--overwrite",
    "--out_dir=out": "--output-dir out",
    "--eval_interval=250 --log_interval=10": "--eval-every 250 --log-every 10",
    "--always_save_checkpoint=True": "",
    "--init_from=scratch": "",
    "--init_from=resume": "--resume auto",
    "--init_from=gpt2-xl": "--model-name gpt2-xl",
    "--wandb_log=False": "",
    "--n_layer=4 --n_head=4 --n_embd=128": (
        "--model-type gpt2 --config-overrides n_layer=4,n_head=4,n_embd=128"
    ),
    "--n_layer=4 --dropout=0.2": (
        "--model-type gpt2 --config-overrides"
        " n_layer=4,resid_pdrop=0.2,embd_pdrop=0.2,attn_pdrop=0.2"
    ),
    "--dropout=0.1": "--dropout 0.1",
    "--max_iters=5000 --lr_decay_iters=5000": "--max-steps 5000",
    "--eval_iters=20 --batch_size=12": "--eval-blocks 240 --batch-size 12",
    "--eval_iters=20": "--eval-blocks 240",
    "--max_eval_samples 50": "--eval-blocks 50",
    "--push_to_hub --hub_model_id me/x --hub_private_repo": "--push-to-hub me/x --private",
    "--push_to_hub True --hub_model_id me/x": "--push-to-hub me/x",
    "--push_to_hub me/x": "--push-to-hub me/x",
    "--push_to_hub False": "",
    "--push_to_hub=me/x --hub_strategy checkpoint": "--push-to-hub me/x --push-checkpoints",
    "--push_to_hub=me/x --hub_strategy end": "--push-to-hub me/x",
    "--beta1=0.9 --beta2=0.95": "",
    "--grad_clip=0.5": "--max-grad-norm 0.5",
    "--decay_lr=True": "",
    "--decay_lr=False": "--lr-scheduler constant",
    "--warmup_iters=100": "--warmup-steps 100",
    "--min_lr=0": "",
    "--device=cpu": "--cpu",
    "--device=cuda": "",
    "--compile=False --eval_only=True --backend=nccl": "--compile off --eval-only --backend nccl",
}

# What is typed, what the answer says, and what is typed then. Nothing: it is left out.
ANSWERED = {
    "--config_name gpt2": (
        "use --model-type FAMILY, with sizes by --config-overrides KEY=VALUE",
        "--model-type gpt2 --config-overrides n_layer=2",
    ),
    "--checkpointing_steps epoch": ("use --save-every N", "--save-every 9"),
    "--warmup_ratio 0.03": ("use --warmup-steps N", "--warmup-steps 9"),
    "--max_train_samples 9": ("use --max-steps N", "--max-steps 9"),
    "--torch_dtype bfloat16": ("use --mixed-precision bf16", "--mixed-precision bf16"),
    "--eval_strategy epoch": ("use --eval-every N", "--eval-every 9"),
    "--evaluation_strategy epoch": ("use --eval-every N", "--eval-every 9"),
    "--save_strategy epoch": ("use --save-every N", "--save-every 9"),
    "--save_strategy best": ("use --keep-best with", "--keep-best --eval-every 250"),
    "--load_best_model_at_end": ("use --keep-best with", "--keep-best --eval-every 250"),
    "--always_save_checkpoint=False": ("use --keep-best with", "--keep-best --eval-every 250"),
    "--logging_strategy epoch": ("use --log-every N", "--log-every 9"),
    "--optim lion_32bit": ("use --optimizer adamw, muon", "--optimizer muon"),
    "--optim_args x=1": ("use --optimizer alone", "--optimizer adamw"),
    "--lr_scheduler_kwargs {}": ("use --lr-scheduler and", "--lr-scheduler wsd --warmup-steps 1"),
    "--gradient_checkpointing_kwargs {}": ("use --gradient-", "--gradient-checkpointing"),
    "--torch_compile_mode default": ("use --compile on", "--compile on"),
    "--data_seed 7": ("use --seed 7", "--seed 7"),
    "--ddp_timeout 60": ("use --peer-timeout SECONDS", "--peer-timeout 60"),
    "--do_predict": ("use --eval-only", "--eval-only"),
    "--dtype int8": ("use --mixed-precision no, bf16 or fp16", "--mixed-precision no"),
    "--device=cuda:1": ("write CUDA_VISIBLE_DEVICES=1 before the command", ""),
    "--device=mps": ("leave it out for GPUs that CUDA knows, or use --cpu", "--cpu"),
    "--lr_decay_iters=600": ("falls until the last update (--max-steps)", "--max-steps 600"),
    "--min_lr=6e-5": ("--lr-scheduler cosine ends at 0", "--lr-scheduler cosine"),
    "--beta2=0.99": ("beta2 of --optimizer adamw is 0.95", "--optimizer adamw"),
    "--n_layer=4 --config-overrides n_head=4": (
        "leave it out, and add n_layer=4 to --config-overrides",
        "--model-type gpt2 --config-overrides n_head=4,n_layer=4",
    ),
    "--push_to_hub": ("use --push-to-hub NAME", "--push-to-hub me/x"),
    "--hub_always_push": ("use --push-to-hub NAME alone", "--push-to-hub me/x"),
    "--bias=False": ("the default model has none", ""),
    "--num_layers 6": ("use --depth 6, or", "--depth 6"),
    "--hidden_size 64": ("use --config-overrides hidden_size=64", "--depth 6"),
    "--cache_dir hub": ("write HF_HUB_CACHE=hub before the command", ""),
    "--save_only_model": ("use --save-every 0", "--save-every 0"),
}


def refused(words, config_class=TrainConfig, script="train.py"):
    with pytest.raises(ForgeError) as error:
        parse(config_class, words, script)
    return [(problem.found, problem.fix) for problem in error.value.problems]


@pytest.mark.parametrize("config_class", [TrainConfig, CheckConfig])
@pytest.mark.parametrize("typed", SAME)
def test_a_name_of_another_program_makes_the_same_configuration(typed, config_class):
    asked = parse(config_class, [*NEEDED, *typed.split()], "train.py")
    assert asked == parse(config_class, [*NEEDED, *SAME[typed].split()], "train.py")
    dashed = re.sub(r"--\w+", lambda name: name[0].replace("_", "-"), typed)
    assert parse(config_class, [*NEEDED, *dashed.split()], "train.py") == asked


@pytest.mark.parametrize("typed", ANSWERED)
def test_an_answer_says_what_does_it_and_that_is_taken(typed):
    says, then = ANSWERED[typed]
    ((found, fix),) = refused([*NEEDED, *typed.split()])
    flag = re.split("[ =]", typed)[0]
    assert found == f"train.py has no {flag}" and says in fix and len(fix) <= 120
    assert parse(TrainConfig, [*NEEDED, *then.split()], "train.py")


def answer_to(name: str, config_class=TrainConfig, script="train.py") -> str:
    """The fix that a name gets with a value that does not fit here, on one line; empty: none."""
    for value in ("7", "True", "x"):
        try:
            parse(config_class, [*NEEDED, f"--{name}={value}"], script)
        except ForgeError as error:
            for problem in error.problems:
                if problem.found == f"{script} has no --{name}":
                    return problem.fix
                assert "unknown argument" not in problem.found, name
    return ""


@pytest.mark.parametrize(
    "name", sorted({*f"{RUN_CLM_NO_TRAINER} {RUN_CLM} {TRAINING_ARGUMENTS} {NANOGPT}".split()})
)
def test_no_name_of_the_other_scripts_is_unknown(name):
    """It is one of ours, a tested alias, or it has one line that names only flags that exist."""
    tested = {key for typed in SAME for key in re.findall(r"--(\w+)", typed)}
    fix = answer_to(name)
    fields = {field.name for field in dataclasses.fields(TrainConfig)}
    assert name in fields or name in tested or fix
    assert "\n" not in fix and len(fix) < 160
    ours = fields | {field.name for field in dataclasses.fields(PrepareConfig)}
    ours |= {"revision", "local_dir"} if "hf download" in fix else set()
    for flag in re.findall(r"(?<![\w-])--([a-z][\w-]*)", fix):
        assert flag.replace("-", "_") in ours, fix
    assert fix == "" or re.match("leave it out|use |prepare it|get it by|write it|add ", fix), fix


@pytest.mark.parametrize(
    "typed",
    [
        "--validation_file v.txt",
        "--validation_split_percentage 5",
        "--dataset_config_name wikitext-2",
        "--validation_fraction 0.2",
        "--skip_bad_rows",
        "--dataset_name wikitext",
    ],
)
def test_what_is_asked_of_the_text_is_answered_by_a_preparation(typed):
    """The command in the answer is parsed by prepare_data.py, and its folder by train.py."""
    words = [*typed.split(), "--output-dir", "run"]
    ((_, fix), *_) = refused(words if "dataset_name" in typed else [*NEEDED[:2], *words])
    command = re.match(r"prepare it first: python prepare_data.py (.*); then train with (.*)", fix)
    assert command and ("wikitext" in typed) == ("wikitext" in fix)
    made = parse(PrepareConfig, shlex.split(command[1]), "prepare_data.py")
    asked = parse(TrainConfig, [*shlex.split(command[2]), "--output-dir", "run"], "train.py")
    assert made.output_dir == asked.dataset_path == "FOLDER"
    if "percentage" in typed:
        assert made.validation_fraction == 0.05
    assert made.dataset_path == ["wikitext" if "dataset_name" in typed else "data"]


PREPARED = ["--dataset-path", "a.txt", "--output-dir", "out"]
SAME_OF_PREPARE = {
    "--train_file b.txt": "--dataset-path b.txt",
    "--train_file b.txt c.txt": "--dataset-path b.txt c.txt",
    "--dataset_name wikitext --dataset_config_name wikitext-2": (
        "--dataset-path wikitext --dataset-config wikitext-2"
    ),
    "--validation_file v.txt": "--validation-path v.txt",
    "--validation_split_percentage 5": "--validation-fraction 0.05",
    "--tokenizer_name gpt2": "--tokenizer gpt2",
    "--model_name_or_path gpt2": "--tokenizer gpt2",
    "--model_name_or_path gpt2 --tokenizer_name llama": "--tokenizer llama",
    "--use_slow_tokenizer": "--tokenizer-backend reference",
    "--use_fast_tokenizer True": "",
    "--preprocessing_num_workers 4": "--num-workers 4",
    "--block_size 64": "--sequence-length 64",
    "--overwrite_cache": "--overwrite",
    "--overwrite_cache False": "",
    "--keep_linebreaks True": "",
    "--streaming False": "",
    "--out_dir=other": "--output-dir other",
}


@pytest.mark.parametrize("typed", SAME_OF_PREPARE)
def test_a_name_of_another_program_makes_the_same_preparation(typed):
    asked = parse(PrepareConfig, [*PREPARED, *typed.split()], "prepare_data.py")
    ours = [*PREPARED, *SAME_OF_PREPARE[typed].split()]
    assert asked == parse(PrepareConfig, ours, "prepare_data.py")


@pytest.mark.parametrize(
    ("typed", "says"),
    [
        ("--batch_size 8", "give it to train.py"),
        ("--max_train_samples 8", "give it to train.py, as --max-steps N"),
        ("--cache_dir hub", "write HF_HUB_CACHE=hub before"),
        ("--token secret", "set HF_TOKEN"),
        ("--streaming", "leave it out"),
        ("--no_keep_linebreaks", "leave it out"),
        ("--model_revision main", "get it by hf download NAME --revision main"),
    ],
)
def test_prepare_data_answers_what_it_cannot_do(typed, says):
    ((found, fix),) = refused([*PREPARED, *typed.split()], PrepareConfig, "prepare_data.py")
    assert found == f"prepare_data.py has no {typed.split()[0]}" and says in fix
    assert "secret" not in found + fix


def test_the_command_of_nanogpts_readme_is_taken_as_it_stands(tmp_path):
    """For a CPU, its settings of shakespeare_char as a recipe that says the same."""
    line = (
        "--device=cpu --compile=False --eval_iters=20 --log_interval=1 --block_size=64"
        " --batch_size=12 --n_layer=4 --n_head=4 --n_embd=128 --max_iters=2000"
        " --lr_decay_iters=2000 --dropout=0.0"
    )
    recipe = tmp_path / "train_shakespeare_char.yaml"
    recipe.write_text(
        "out_dir: out-shakespeare-char\neval_interval: 250\nlog_interval: 10\nwandb_log: false\n"
        "gradient_accumulation_steps: 1\nlearning_rate: 1.0e-3\nwarmup_iters: 100\n"
    )
    config = parse(
        TrainConfig,
        ["--dataset-path", "d", "--micro-batch-size=12", *line.split(), "--config", str(recipe)],
        "train.py",
    )
    assert config == TrainConfig(
        dataset_path="d", output_dir="out-shakespeare-char", eval_every=250,
        eval_blocks=240, log_every=1, gradient_accumulation_steps=1, learning_rate=1e-3,
        warmup_steps=100, cpu=True,
        compile="off", sequence_length=64, batch_size=12, micro_batch_size=12, max_steps=2000,
        model_type="gpt2", config=str(recipe),
        config_overrides="n_layer=4,n_head=4,n_embd=128,"
        "resid_pdrop=0.0,embd_pdrop=0.0,attn_pdrop=0.0",
    )  # fmt: skip


def test_flags_of_prepare_data_are_answered_by_train():
    only_there = {
        *{field.name for field in dataclasses.fields(PrepareConfig)}
        - {field.name for field in dataclasses.fields(TrainConfig)}
        - {"describe", "verify"}
    }
    assert len(only_there) > 10
    for name in only_there:
        assert answer_to(name).startswith("prepare it first: python prepare_data.py"), name


@pytest.mark.parametrize("secret", ["token", "hub_token", "use_auth_token"])
def test_a_secret_that_is_typed_is_not_printed(secret):
    (problem,) = refused([*NEEDED, f"--{secret}", "hf_abc"])
    assert "HF_TOKEN" in problem[1] and "hf_abc" not in "".join(problem)


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--batchsize", "--batch-size"),
        ("--lerning-rate=3", "--learning-rate"),
        ("--context-length", "--sequence-length"),
        ("--micro_batchsize", "--micro-batch-size"),
        ("--epoch", "--epochs"),
        ("--warmup-ratios", "--warmup"),
        ("-lr", "train.py --help"),
        ("--xyzzy", "train.py --help"),
    ],
)
def test_an_unknown_flag_gets_the_nearest_few_and_never_the_list(typed, ours):
    ((found, fix),) = refused([*NEEDED, typed])
    assert found == f"unknown argument {typed.partition('=')[0]}"
    assert ours in fix and fix.count("--") <= 4 and len(fix) < 160


@pytest.mark.parametrize(
    ("word", "fix"),
    [
        ("config/train_gpt2.py", "use --config FILE.yaml"),
        ("run.yaml", "use --config run.yaml"),
        ("args.json", "use --config args.json"),
        ("pyproject.toml", "use --dataset-path pyproject.toml"),
    ],
)
def test_a_file_that_belongs_to_no_flag_is_led_to_one(word, fix):
    ((found, answered),) = refused([*NEEDED, word])
    assert found == f"arguments that belong to no flag: {word}" and fix in answered


@pytest.mark.parametrize(
    ("typed", "ours"),
    [
        ("--out_dir=run --start=Once", "--model-name run --prompt Once"),
        ("--out_dir=run --init_from=resume", "--model-name run"),
        ("--init_from=gpt2-xl", "--model-name gpt2-xl"),
        (
            "--out_dir=run --max_new_tokens=5 --temperature=0.8 --top_k=9 --seed=1337",
            "--model-name run --max-new-tokens 5 --temperature 0.8 --top-k 9 --seed 1337",
        ),
    ],
)
def test_the_keys_of_nanogpts_sample_do_the_same_in_generate(typed, ours):
    asked = parse(GenerateConfig, typed.split(), "generate.py")
    assert asked == parse(GenerateConfig, ours.split(), "generate.py")


@pytest.mark.parametrize("typed", ["--device=cpu", "--dtype=x", "--num_samples=3"])
def test_generate_answers_the_other_keys_of_sample(typed):
    words = ["--model-name", "run", typed]
    ((found, fix),) = refused(words, GenerateConfig, "generate.py")
    assert "generate.py has no --" in found and fix.startswith("leave it out: ")
