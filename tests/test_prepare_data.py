"""prepare_data.py as a command: it does what the function does, and answers fast."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import prepare_data
from tests.texts import contents

SCRIPT = Path(prepare_data.__file__)


def run(*arguments: object) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(SCRIPT), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=100)


def test_the_script_prepares_what_the_function_does(text_file, prepared, tmp_path):
    done = run(
        "--dataset-path", text_file, "--output-dir", tmp_path / "a", "--sequence-length", 32,
        "--vocab-size", 300, "--validation-fraction", 0.1,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "prepared" in done.stdout
    assert contents(tmp_path / "a") == contents(prepared)


def test_the_script_names_mistakes_without_a_traceback(tmp_path):
    done = run("--dataset-path", tmp_path / "none.txt", "--output-dir", tmp_path / "a")
    assert done.returncode == 2
    assert done.stderr.startswith("error: ") and "none.txt" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "a").exists()


def test_help_needs_no_heavy_library():
    command = [sys.executable, "-X", "importtime", str(SCRIPT), "--help"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100)
    assert done.returncode == 0, done.stderr
    assert "--dataset-path" in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "p2p_llm_forge.config" in imported
    heavy = {"torch", "transformers", "datasets", "pyarrow", "numpy", "tokenizers"}
    assert not imported & heavy


def test_no_arguments_at_all_is_a_clear_error():
    done = run()
    assert done.returncode == 2
    assert "--dataset-path" in done.stderr and "--output-dir" in done.stderr
    assert "Traceback" not in done.stderr
