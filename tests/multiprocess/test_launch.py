"""Real launches of two processes: by Accelerate's files, torchrun and hand; and those refused."""

from __future__ import annotations

import json
import re
import shutil
import sys
from pathlib import Path

import pytest
import torch
import yaml

from tests import ROOT
from tests.ports import free_port
from tests.runs import (
    DEFAULTS,
    TINY_MODEL,
    TINY_SIZES,
    finish,
    flags,
    read,
    results,
    start_each,
    weights,
)
from tests.texts import write_text

pytestmark = pytest.mark.slow
CONFIGS = ROOT / "accelerate_configs"
BIN = Path(sys.executable).parent


# Adam divides by the size of a gradient, so it would hide a wrong factor; SGD does not.
@pytest.mark.parametrize(
    ("optimizer", "learning_rate", "learned"),
    [("sgd", 0.5, 4.9), ("adamw", 3e-3, 4.5), ("muon", 3e-3, 4.5), (None, None, 4.5)],
)
def test_two_processes_take_the_same_updates_as_one(
    zygote, prepared, tmp_path, optimizer, learning_rate, learned
):
    """50 updates in fp32, with accumulation and dropout; and the same evaluation."""
    settings = {"optimizer": optimizer, "learning_rate": learning_rate, "max_steps": 50}
    settings |= {"micro_batch_size": 2, "mixed_precision": "no"}
    settings["config_overrides"] = TINY_SIZES + ",resid_pdrop=0.1,embd_pdrop=0,attn_pdrop=0"
    shares = "50 of 8 blocks, 4 on each of 2 process(es), micro-batches of 2"
    if optimizer == "muon":  # shares are uneven, and change; of dropout they would be a part
        settings |= {"batch_size": 9, "balance": "auto", "config_overrides": TINY_MODEL}
        settings |= {"eval_blocks": 21}  # of the same blocks, whoever evaluates them
        shares = "50 of 9 blocks, 5 + 4 on 2 processes, micro-batches of 2"
    if optimizer is None:
        settings |= DEFAULTS
    one = finish(zygote, prepared, tmp_path / "one", 1, **settings)
    two = finish(zygote, prepared, tmp_path / "two", 2, **settings)
    printed = read(tmp_path / "two.log")
    assert shares in printed
    for name, tensor in weights(one).items():
        other = weights(two)[name]
        if name.endswith("attn.c_attn.bias"):
            # The keys' bias adds the same to all scores of a query: its gradient is what rounding
            # leaves, which Adam makes as large as any other.
            (tensor, other), width = (t.clone() for t in (tensor, other)), len(tensor) // 3
            for bias in (tensor, other):
                assert bias[width : 2 * width].abs().max() < 1e-3
                bias[width : 2 * width] = 0
        torch.testing.assert_close(other, tensor, rtol=0, atol=1e-5)
    a, b = results(one), results(two)
    assert (a["processes"], b["processes"]) == (1, 2)
    figures = ["eval_loss", "perplexity", "bits_per_byte", "train_loss", "eval_blocks"]
    if optimizer == "muon":
        figures += ["eval_loss_stderr", "bits_per_byte_stderr"]
        assert a["eval_blocks"] == 21 < a["eval_split_blocks"]
    for figure in figures:
        assert b[figure] == pytest.approx(a[figure], rel=1e-5 if "std" not in figure else 1e-3)
    assert a["train_loss"] < learned, "nothing was learned, so nothing was compared"


@pytest.mark.parametrize("name", ["cpu.yaml", "cpu_2_processes.yaml"])
def test_a_launch_file_starts_the_processes_it_promises(run, prepared, tmp_path, name):
    promised = yaml.safe_load((CONFIGS / name).read_text())["num_processes"]
    status, output = run(
        *(BIN / "accelerate", "launch", "--config_file", CONFIGS / name, "train.py"),
        *flags(prepared, tmp_path / "run"),
    )
    assert status == 0, output
    assert results(tmp_path / "run")["processes"] == promised
    assert f"peers     {promised} process(es) on cpu" in output


def test_the_two_machine_files_meet(start, prepared, tmp_path):
    """Both files, as they are but for the address and port, on this machine."""
    port, processes = free_port(), []
    for node in (0, 1):
        file = tmp_path / f"node{node}.yaml"
        text = (CONFIGS / "two_machines" / f"node{node}.yaml").read_text()
        text = text.replace("main_process_ip: 10.0.0.1", "main_process_ip: 127.0.0.1")
        file.write_text(text.replace("main_process_port: 29500", f"main_process_port: {port}"))
        assert yaml.safe_load(file.read_text())["main_process_port"] == port
        command = (BIN / "accelerate", "launch", "--config_file", file, "train.py")
        processes.append(start(*command, *flags(prepared, tmp_path / "run")))
    outputs = [process.communicate()[0] for process in processes]
    assert [process.returncode for process in processes] == [0, 0], outputs
    assert results(tmp_path / "run")["processes"] == 2


def ends_of(zygote, tmp_path, *settings):
    """Ranks that are started by hand with settings of their own: statuses, and what each prints."""
    logs = [tmp_path / f"rank{rank}.log" for rank in range(len(settings))]
    words = [flags(folder=tmp_path / "run", **own) for own in settings]
    statuses = [zygote.wait(pid) for pid in start_each(zygote, words, logs)]
    return statuses, [log.read_text() for log in logs]


def test_two_machines_by_hand_meet(zygote, prepared, tmp_path):
    statuses, printed = ends_of(zygote, tmp_path, {"data": prepared}, {"data": prepared})
    assert statuses == [0, 0], printed
    assert results(tmp_path / "run")["processes"] == 2
    assert "held out" in printed[0] and printed[1].strip() == "", "only rank 0 speaks"


def test_peers_that_were_started_differently_are_refused_by_name(zygote, prepared, tmp_path):
    settings = [{"data": prepared, "seed": seed} for seed in (0, 1)]
    statuses, printed = ends_of(zygote, tmp_path, *settings)
    assert statuses == [2, 2], printed
    assert re.search(r"rank 1 \(.*\) was started with --seed 1, rank 0 with 0", printed[0])
    assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("machines", [1, 2])
def test_a_wizard_made_multi_cpu_file_is_refused_with_the_fix(run, prepared, tmp_path, machines):
    """What `accelerate config` (1.15) writes for CPU machines starts strangers without MPI."""
    file = tmp_path / "default_config.yaml"
    file.write_text(
        "compute_environment: LOCAL_MACHINE\ndebug: false\ndistributed_type: MULTI_CPU\n"
        "downcast_bf16: 'no'\nenable_cpu_affinity: false\nmachine_rank: 0\n"
        "main_process_ip: 127.0.0.1\nmain_process_port: 29500\nmain_training_function: main\n"
        f"mixed_precision: 'no'\nnum_machines: {machines}\nnum_processes: 2\n"
        "rdzv_backend: static\nsame_network: true\ntpu_use_sudo: false\nuse_cpu: true\n"
    )
    status, output = run(
        *(BIN / "accelerate", "launch", "--config_file", file, "train.py"),
        *flags(prepared, tmp_path / "run"),
    )
    assert status != 0
    assert "would train alone" in output and "distributed_type: MULTI_GPU" in output
    assert not (tmp_path / "run").exists()


def test_a_text_file_is_prepared_by_the_main_process_alone(run, text_file, tmp_path):
    status, output = run(
        *(BIN / "torchrun", "--standalone", "--nproc-per-node=2", "train.py"),
        *flags(text_file, tmp_path / "run", vocab_size=300, sequence_length=32),
    )
    assert status == 0, output
    assert output.count("training a tokenizer") == 1
    assert results(tmp_path / "run")["processes"] == 2


def test_a_mistake_that_two_processes_make_is_told_once(run, tmp_path):
    status, output = run(
        *(BIN / "torchrun", "--standalone", "--nproc-per-node=2", "train.py"),
        *flags(tmp_path / "nowhere", tmp_path / "run"),
    )
    assert status != 0
    assert output.count("error: ") == 1 and "nowhere" in output
    assert not (tmp_path / "run").exists()


def test_a_peer_without_the_data_is_named(zygote, prepared, tmp_path):
    broken = shutil.copytree(prepared, tmp_path / "broken")
    (broken / "manifest.json").unlink()
    statuses, printed = ends_of(zygote, tmp_path, {"data": prepared}, {"data": broken})
    assert statuses == [2, 2], printed
    assert re.search(r"error: rank 1 \(.*\): .*broken", printed[0])


def test_accelerate_prepares_the_same_bytes_as_one_process(zygote, run, tmp_path):
    for number in range(9):  # more than four parts a process: each has its own
        folder = tmp_path / "text" / f"{number}"
        folder.mkdir(parents=True)
        write_text(folder / "a.txt", documents=40, seed=number)
        rows = (folder / "a.txt").read_text().split("\n\n")
        lines = [json.dumps({"text": f"row {row}"}) + "\n" for row in rows]
        (folder / "b.jsonl").write_text("".join(lines))
    asked = [f"--dataset-path={tmp_path / 'text'}", "--vocab-size=300", "--sequence-length=32"]
    one = zygote.start(
        [*asked, f"--output-dir={tmp_path / 'one'}"], tmp_path / "log", script="prepare_data"
    )
    assert zygote.wait(one) == 0, read(tmp_path / "log")
    status, output = run(
        *(BIN / "accelerate", "launch", "--config_file", CONFIGS / "cpu_2_processes.yaml"),
        *("prepare_data.py", *asked, "--output-dir", tmp_path / "two"),
    )
    assert status == 0, output
    assert output.count("prepared") == 1 + str(tmp_path).count("prepared"), "one process prints it"
    files = sorted(path.relative_to(tmp_path / "one") for path in (tmp_path / "one").rglob("*.*"))
    assert len(files) > 5
    assert files == sorted(p.relative_to(tmp_path / "two") for p in (tmp_path / "two").rglob("*.*"))
    for name in files:
        assert (tmp_path / "one" / name).read_bytes() == (tmp_path / "two" / name).read_bytes()
