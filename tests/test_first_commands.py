"""The commands of the project's first description, typed as they stand there, in a fresh clone."""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path

import pytest

from tests.clones import BIN, fresh_clone, install, typing_in
from tests.ports import free_port

pytestmark = pytest.mark.slow
MODEL = "artifacts/smoke_model"  # that the smoke test has made
TRAINS = (
    f"--model-name {MODEL} --dataset-path corpus.txt --epochs 1 --batch-size 2"
    " --sequence-length 128 --backend gloo"
)
TORCHRUN = "torchrun --nnodes=2 --nproc_per_node=1 --node_rank={rank} --master_addr=127.0.0.1"


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A clone in which the smoke test has run, the first command that is typed there."""
    folder = fresh_clone(tmp_path_factory.mktemp("stranger") / "clone")
    install(folder)
    status, output = typed(folder, "uv run python tests/smoke_single_node.py")
    assert status == 0, output
    (folder / "smoke.log").write_text(output)
    return folder


def typed(clone: Path, line: str, at: Path | None = None) -> tuple[int, str]:
    """A line that is typed in a shell: its status and what it printed."""
    process = begin(clone, line, at)
    output, _ = process.communicate()
    return process.returncode, output


def begin(clone: Path, line: str, at: Path | None = None) -> subprocess.Popen[str]:
    """Start a line as a shell does."""
    return subprocess.Popen(
        ["bash", "-c", line],
        cwd=at or clone,
        env=typing_in(clone),
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def has_model(folder: Path, batch_size: int = 2) -> bool:
    """Whether a model lies there that transformers reads, after one pass over the blocks."""
    from transformers import AutoModelForCausalLM

    AutoModelForCausalLM.from_pretrained(folder)
    splits = json.loads((folder / "prepared" / "manifest.json").read_text())["splits"]
    results = json.loads((folder / "all_results.json").read_text())
    return results["steps"] == -(-splits["train"]["blocks"] // batch_size) > 1


def test_the_smoke_test_trains_an_epoch_with_a_model_of_the_shape_of_tiny_gpt2(clone):
    output = (clone / "smoke.log").read_text()
    assert "sshleifer/tiny-gpt2 cannot be had from the Hub (HF_HUB_OFFLINE is set)" in output
    assert "smoke test passed" in output
    assert has_model(clone / "artifacts" / "smoke", batch_size=16)
    config = json.loads((clone / "artifacts" / "smoke" / "config.json").read_text())
    names = ("n_layer", "n_head", "n_embd", "n_positions", "vocab_size")
    assert [config[name] for name in names] == [2, 2, 2, 1024, 50257]  # as the Hub has it


def test_the_installed_command_trains_a_named_model_from_a_text(clone):
    status, output = typed(clone, f"uv run p2p-llm-forge {TRAINS} --output-dir artifacts/first")
    assert status == 0, output
    assert has_model(clone / "artifacts" / "first")


def test_torchrun_starts_the_command_on_two_nodes(clone, tmp_path):
    """One of them in the clone, the other where only the command is installed."""
    port = f" --master_port={free_port()}"
    words = f"{TRAINS} --output-dir artifacts/two"
    far = words
    for name in (MODEL, "corpus.txt", "artifacts/two"):
        far = far.replace(f" {name}", f" {clone / name}")
    nodes = [
        begin(clone, f"{TORCHRUN.format(rank=0)}{port} p2p-llm-forge {words}"),
        begin(
            clone, f"{TORCHRUN.format(rank=1)}{port} --no-python p2p-llm-forge {far}", at=tmp_path
        ),
    ]
    outputs = [node.communicate()[0] for node in nodes]
    assert [node.returncode for node in nodes] == [0, 0], "\n".join(outputs)
    assert has_model(clone / "artifacts" / "two")
    results = json.loads((clone / "artifacts" / "two" / "all_results.json").read_text())
    assert results["processes"] == 2


def test_help_and_lint_are_typed_in_a_clone(clone):
    for line in ("python -m p2p_llm_forge --help", "./p2p-llm-forge --help"):
        status, output = typed(clone, line)
        assert status == 0 and "--dataset-path" in output, output
    status, output = typed(clone, "uv run ruff check .")
    assert status == 0, output


@pytest.mark.skipif(
    not os.environ.get("INSTALL_TESTS"), reason="downloads packages; make test-install runs it"
)
def test_uv_sync_installs_what_the_commands_need(tmp_path):
    folder = fresh_clone(tmp_path / "clone")
    environ = {name: text for name, text in os.environ.items() if name != "VIRTUAL_ENV"}
    environ["PATH"] = os.pathsep.join([os.environ["PATH"], str(BIN)])  # uv
    for line in (
        "uv sync",
        "uv run p2p-llm-forge --help",
        "uv run ruff check .",
        "uv run python tests/smoke_single_node.py",
        "uv build && uvx twine check --strict dist/*",
        "python3 -m venv other && uv pip install --python other/bin/python --no-deps .",
    ):
        done = subprocess.run(
            ["bash", "-c", line],
            cwd=folder,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, f"{line}\n{done.stdout}\n{done.stderr}"
    assert (folder / "artifacts" / "smoke" / "model.safetensors").is_file()
