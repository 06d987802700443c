"""What a launch file asks for is done, refused at the start, or named; never left out in silence.

The environments are those that the installed Accelerate makes of a file, by its own functions.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest
import yaml
from accelerate.commands import launch as accelerate_launch
from accelerate.utils import launch as accelerate_env

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers import launcher
from p2p_llm_forge.peers.launch import Launch, read_launch
from p2p_llm_forge.peers.launch_files import LaunchFile
from tests import ROOT
from tests.runs import flags, results

ACCELERATE = Path(sys.executable).parent / "accelerate"
# As `accelerate config` writes it.
WIZARD = {
    "compute_environment": "LOCAL_MACHINE",
    "debug": False,
    "distributed_type": "MULTI_GPU",
    "downcast_bf16": "no",
    "enable_cpu_affinity": False,
    "gpu_ids": "all",
    "machine_rank": 0,
    "main_training_function": "main",
    "mixed_precision": "no",
    "num_machines": 1,
    "num_processes": 2,
    "rdzv_backend": "static",
    "same_network": True,
    "tpu_env": [],
    "tpu_use_cluster": False,
    "tpu_use_sudo": False,
    "use_cpu": False,
}
FSDP = {"distributed_type": "FSDP", "fsdp_config": {"fsdp_version": 2}}
DEEPSPEED = {
    "distributed_type": "DEEPSPEED",
    "deepspeed_config": {"gradient_accumulation_steps": 4, "zero_stage": 2},
}
MEGATRON = {"distributed_type": "MEGATRON_LM", "megatron_lm_config": {"megatron_lm_tp_degree": 2}}


def write(path: Path, changes: dict) -> str:
    """A file of the wizard with other values; None takes a key out."""
    keys = {key: value for key, value in {**WIZARD, **changes}.items() if value is not None}
    path.write_text(yaml.safe_dump(keys))
    return str(path)


def environment_of(file: str, monkeypatch: pytest.MonkeyPatch, *words: str) -> dict[str, str]:
    """What Accelerate exports to the processes that it starts for this file."""
    monkeypatch.setattr(accelerate_env, "is_fp8_available", lambda: True)
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    parser = accelerate_launch.launch_command_parser()
    args = parser.parse_args(["--config_file", file, *words, "train.py"])
    args, defaults, _ = accelerate_launch._validate_launch_command(args)
    if args.use_deepspeed:
        args.deepspeed_fields_from_accelerate_config = ""
        return accelerate_env.prepare_deepspeed_cmd_env(args)[1]
    if args.multi_gpu or args.use_fsdp or args.use_megatron_lm:
        return accelerate_env.prepare_multi_gpu_env(args)
    return accelerate_env.prepare_simple_launcher_cmd_env(args)[1]


@pytest.mark.parametrize(
    ("changes", "found"),
    [
        (FSDP, "asks for FSDP"),
        (DEEPSPEED, "asks for DeepSpeed"),
        (MEGATRON, "asks for Megatron-LM"),
        ({"parallelism_config": {"parallelism_config_tp_size": 2}}, "asks for tensor parallelism"),
        ({"parallelism_config": {"parallelism_config_cp_size": 2}}, "asks for context parallelism"),
        ({"mixed_precision": "fp8"}, "mixed precision fp8"),
        ({"mixed_precision": "fp8", "distributed_type": "NO"}, "mixed precision fp8"),
        ({"dynamo_config": {"dynamo_backend": "TENSORRT"}}, "DYNAMO_BACKEND is 'tensorrt'"),
    ],
    ids=str,
)
def test_what_train_does_not_do_is_refused(changes, found, tmp_path, monkeypatch):
    environ = environment_of(write(tmp_path / "a.yaml", changes), monkeypatch)
    with pytest.raises(ForgeError) as refusal:
        read_launch(TrainConfig(), environ)
    (problem,) = refusal.value.problems
    assert found in problem.found and "write " in problem.fix


def test_the_fix_of_a_refusal_is_a_file_that_is_taken(tmp_path, monkeypatch):
    fixed = write(tmp_path / "a.yaml", {**FSDP, "distributed_type": "MULTI_GPU"})
    launch = read_launch(TrainConfig(), environment_of(fixed, monkeypatch))
    file = launcher.read_launch_file(fixed)
    assert not launch.ignored and launch.precision == "no"
    assert launcher.ignored_of(file) == [f"fsdp_config of {fixed} is ignored: it is for FSDP"]


@pytest.mark.parametrize("kind", ["MULTI_GPU", "NO"])
def test_what_can_be_honoured_is(kind, tmp_path, monkeypatch):
    dynamo = {"dynamo_backend": "INDUCTOR", "dynamo_mode": "max-autotune"}
    processes = {"MULTI_GPU": 2, "NO": 1}[kind]
    changes = {"distributed_type": kind, "num_processes": processes, "dynamo_config": dynamo}
    file = write(tmp_path / "a.yaml", changes)
    environ = environment_of(file, monkeypatch, "--num_cpu_threads_per_process", "3")
    launch = read_launch(TrainConfig(), environ)
    asked = {"backend": "inductor", "mode": "max-autotune", "fullgraph": False, "dynamic": None}
    assert launch.compile == asked and launch.threads == 3
    assert read_launch(TrainConfig(), {}).compile is None


def test_what_is_decided_here_is_named():
    environ = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "4", "ACCELERATE_DEBUG_MODE": "true"}
    ignored = read_launch(TrainConfig(), {**environ, "ACCELERATE_GRADIENT_CLIPPING": "1.0"}).ignored
    assert [line.split()[0] for line in ignored] == [
        "ACCELERATE_GRADIENT_ACCUMULATION_STEPS=4",
        "ACCELERATE_GRADIENT_CLIPPING=1.0",
        "ACCELERATE_DEBUG_MODE=true",
    ]
    assert "--batch-size" in ignored[0] and "--max-grad-norm" in ignored[1]
    off = {"ACCELERATE_GRADIENT_ACCUMULATION_STEPS": "1", "ACCELERATE_GRADIENT_CLIPPING": "none"}
    assert read_launch(TrainConfig(), {**off, "ACCELERATE_DEBUG_MODE": "no"}).ignored == ()


@pytest.mark.parametrize(
    ("changes", "is_for_gpus"),
    [
        ({}, True),
        ({"distributed_type": "NO"}, True),
        ({"gpu_ids": None, "use_cpu": None}, True),
        ({"distributed_type": "NO", "gpu_ids": None, "use_cpu": None}, False),
        ({"use_cpu": True}, False),
        ({"use_cpu": True, "gpu_ids": None, "distributed_type": "NO"}, False),
    ],
    ids=str,
)
def test_a_file_for_gpus_is_known(changes, is_for_gpus, tmp_path):
    file = launcher.read_launch_file(write(tmp_path / "a.yaml", changes))
    assert launcher.is_for_gpus(file) is is_for_gpus
    launcher.refuse_gpu_file(TrainConfig(cpu=True), Launch(), file)
    launcher.refuse_gpu_file(TrainConfig(), Launch(wants_cpu=True), file)
    launcher.refuse_gpu_file(TrainConfig(), Launch(), None)
    if is_for_gpus:
        with pytest.raises(ForgeError, match="is for GPUs, and this machine has none"):
            launcher.refuse_gpu_file(TrainConfig(), Launch(), file)


def test_sizes_of_a_single_process_are_read_from_its_file():
    keys = {"distributed_type": "NO", "parallelism_config": {"parallelism_config_tp_size": 2}}
    with pytest.raises(ForgeError, match="a.yaml asks for tensor parallelism"):
        launcher.refuse_parallelism(LaunchFile("a.yaml", keys))
    launcher.refuse_parallelism(LaunchFile("a.yaml", {"parallelism_config": {}}))
    launcher.refuse_parallelism(LaunchFile("a.yaml", {"parallelism_config": [1]}))


@pytest.mark.parametrize(
    ("cmdline", "words"),
    [
        (["python", "/bin/accelerate", "launch", "--cpu", "train.py", "a"], ["launch", "--cpu"]),
        (["/bin/accelerate-launch", "--config-file=x", "train.py", "a"], ["--config-file=x"]),
        (["python", "-m", "accelerate.commands.launch", "train.py", "a"], []),
        (["python", "train.py", "a"], None),
        (["bash", "-c", "accelerate launch train.py"], None),
        ([], None),
    ],
    ids=str,
)
def test_the_words_of_the_launcher_are_told_from_those_of_the_script(cmdline, words):
    found = launcher.launch_words(cmdline, 1)
    assert found == (None if words is None else [*words, "train.py"])


BY_TORCHRUN = {"TORCHELASTIC_RUN_ID": "none", "TORCHELASTIC_RESTART_COUNT": "0"}
BY_ACCELERATE = {"ACCELERATE_MIXED_PRECISION": "no"}
BY_OURS = {**BY_TORCHRUN, "P2P_LLM_FORGE_LAUNCHER": "17"}


@pytest.mark.parametrize(
    ("line", "environ", "is_one"),
    [
        ("python /bin/torchrun --nproc-per-node 2 train.py", BY_TORCHRUN, True),
        ("python -m torch.distributed.run --nnodes=2 train.py", BY_TORCHRUN, True),
        ("python /lib/torch/distributed/run.py train.py", BY_TORCHRUN, True),
        ("torchrun --nnodes 1:4 train.py", BY_TORCHRUN, False),
        ("torchrun train.py", {**BY_TORCHRUN, "PET_NNODES": "1:4"}, False),
        ("python /bin/accelerate launch train.py", BY_ACCELERATE, True),
        ("python /bin/accelerate-launch --multi_gpu train.py", BY_TORCHRUN, True),
        ("python launch/elastic.py --main 10.0.0.1 train.py", BY_OURS, True),
        ("python launch/elastic.py", {**BY_OURS, "P2P_LLM_FORGE_LAUNCHER": "18"}, False),
        # A shell that exports a precision, in a notebook, or in a job that a launcher has started.
        ("bash", BY_ACCELERATE, False),
        ("python -m ipykernel_launcher", BY_ACCELERATE, False),
        ("slurmstepd: [17.batch]", BY_TORCHRUN, False),
        ("bash", BY_OURS, True),  # by its number it is the one
        ("python /bin/torchrun train.py", {}, False),
    ],
    ids=str,
)
def test_a_launcher_is_known_by_its_line_or_number_and_not_by_what_is_inherited(
    line, environ, is_one
):
    assert launcher.is_launcher(17, line.split(), environ) is is_one


@pytest.mark.parametrize(
    ("name", "environ", "counts_from_parent"),
    [
        ("torchrun", BY_TORCHRUN, True),
        ("torchrun", {**BY_TORCHRUN, "TORCHELASTIC_RESTART_COUNT": "1"}, False),
        ("accelerate-launch", BY_ACCELERATE, True),
        ("my_jobs.py", BY_ACCELERATE, False),
    ],
)
def test_time_counts_from_the_start_of_the_launcher_that_starts_for_the_first_time(
    run, tmp_path, name, environ, counts_from_parent
):
    """A stand-in of the launcher's name: real processes, and nothing of torch."""
    (tmp_path / name).symlink_to(ROOT / "tests" / "peers" / "started.py")
    status, printed = run(sys.executable, tmp_path / name, "parent", environ=environ)
    assert status == 0, printed
    counted, of_parent, own = json.loads(printed)
    assert of_parent < own and counted == (of_parent if counts_from_parent else own)


def test_the_last_value_counts_and_without_one_the_default_file(tmp_path):
    words = ["--config_file", "a", "--config-file=b", "train.py"]
    assert launcher.value_of("config_file", words) == "b"
    assert launcher.value_of("num_processes", words) is None
    home = {"HF_HOME": str(tmp_path)}
    assert launcher.file_of([], home) is None
    (tmp_path / "accelerate").mkdir()
    file = write(tmp_path / "accelerate" / "default_config.yaml", {})
    assert launcher.file_of([], home).path == file
    assert launcher.file_of(["--config_file", str(tmp_path / "gone")], home) is None


@pytest.mark.slow
def test_real_launches_are_refused_with_a_fix_that_works(run, prepared, tmp_path):
    """One file for two GPUs, and one that asks for FSDP, on this machine."""
    import torch

    words = [*flags(prepared, tmp_path / "run", max_steps=1), "--backend=gloo"]

    def launch(changes: dict, *more: str) -> tuple[int, str]:
        file = write(tmp_path / "a.yaml", {"main_process_port": 0, **changes})
        command = [ACCELERATE, "launch", "--config_file", file, ROOT / "train.py"]
        return run(*command, *words, *more, environ={"CUDA_VISIBLE_DEVICES": ""})

    status, printed = launch({**FSDP, "use_cpu": True})
    assert status != 0 and "error: the launcher's config asks for FSDP" in printed, printed
    assert printed.count("error: ") == 1 and not (tmp_path / "run").exists()
    if torch.accelerator.is_available() and not torch.cuda.is_available():
        pytest.skip("needs a machine whose accelerators can be hidden by CUDA_VISIBLE_DEVICES")
    status, printed = launch({})
    assert status != 0 and "a.yaml is for GPUs, and this machine has not one" in printed, printed
    assert printed.count("error: ") == 1 and not (tmp_path / "run").exists()
    dynamo = {"dynamo_backend": "EAGER"}
    changes = {"deepspeed_config": {"zero_stage": 2}, "dynamo_config": dynamo}
    status, printed = launch(changes, "--cpu")
    assert status == 0, printed
    assert results(tmp_path / "run")["processes"] == 2
    assert (
        printed.count("deepspeed_config of") == 1 and "is ignored: it is for DEEPSPEED" in printed
    )


@pytest.mark.slow
@pytest.mark.parametrize("use_cpu", [True, False])
def test_a_file_for_cpus_is_one_where_accelerate_forgets_its_key(run, tmp_path, use_cpu):
    file = write(tmp_path / "a.yaml", {"use_cpu": use_cpu, "main_process_port": 0})
    program = ROOT / "tests" / "peers" / "asked.py"
    status, printed = run(ACCELERATE, "launch", "--config_file", file, program)
    assert status == 0, printed
    for rank in (0, 1):
        assert printed.count(f"rank {rank} of 2 wants the CPU: {use_cpu}") == 1, printed
