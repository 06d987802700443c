"""An installation that is not the checkout: every package is in it, and the command works."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys

import pytest

from tests import ROOT


@pytest.mark.slow
def test_an_installed_copy_has_every_module_and_a_working_command(tmp_path):
    source, target = tmp_path / "source", tmp_path / "installed"
    source.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("README.md", "LICENSE"))]:
        shutil.copy(path, source)
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "p2p_llm_forge", source / "p2p_llm_forge", ignore=without_caches)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    expected = {path.relative_to(ROOT) for path in ROOT.glob("p2p_llm_forge/**/*.py")}
    assert expected and expected <= {path.relative_to(target) for path in target.rglob("*.py")}
    environ = {**os.environ, "PYTHONPATH": str(target)}
    for words in (["-m", "p2p_llm_forge"], [str(target / "bin" / "p2p-llm-forge")]):
        done = subprocess.run(
            [sys.executable, *words, "--help"],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and "--dataset-path" in done.stdout, done.stderr
