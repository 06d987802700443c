"""An installation that is not the checkout: all of it is there, described as an index wants it."""

from __future__ import annotations

import importlib.metadata
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests import ROOT

WORKERS_TOOLS = {"pytest", "ruff", "mypy", "hypothesis", "nbclient", "ipykernel", "uv"}


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `pip install .` makes of a clone: the folder with its packages."""
    folder = tmp_path_factory.mktemp("installation")
    source, target = folder / "source", folder / "installed"
    source.mkdir()
    for path in [*ROOT.glob("*.py"), *(ROOT / name for name in ("README.md", "LICENSE"))]:
        shutil.copy(path, source)
    for name in ("pyproject.toml", "requirements.txt"):
        shutil.copy(ROOT / name, source)
    without_caches = shutil.ignore_patterns("__pycache__")
    shutil.copytree(ROOT / "p2p_llm_forge", source / "p2p_llm_forge", ignore=without_caches)
    install = ["-m", "pip", "install", "--quiet", "--no-deps", "--target", str(target), str(source)]
    subprocess.run([sys.executable, *install], check=True, capture_output=True)
    return target


@pytest.mark.slow
def test_an_installed_copy_has_every_module_and_a_working_command(installed, tmp_path):
    expected = {path.relative_to(ROOT) for path in ROOT.glob("p2p_llm_forge/**/*.py")}
    expected |= {path.relative_to(ROOT) for path in ROOT.glob("*.py")}
    assert expected and expected <= {
        path.relative_to(installed) for path in installed.rglob("*.py")
    }
    environ = {**os.environ, "PYTHONPATH": str(installed)}
    for words in (["-m", "p2p_llm_forge"], [str(installed / "bin" / "p2p-llm-forge")]):
        done = subprocess.run(
            [sys.executable, *words, "--help"],
            cwd=tmp_path,
            env=environ,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0 and "--dataset-path" in done.stdout, done.stderr


@pytest.mark.slow
def test_what_an_index_shows_is_complete_and_asks_users_for_no_tools_of_ours(installed):
    (found,) = importlib.metadata.distributions(path=[str(installed)])
    about = found.metadata
    assert about["Name"] == "p2p-llm-forge" and about["Requires-Python"] == ">=3.10"
    assert about["License-Expression"] == "MIT" and about["License-File"] == "LICENSE"
    classifiers = about.get_all("Classifier")
    for python in ("3.10", "3.11", "3.12", "3.13"):
        assert f"Programming Language :: Python :: {python}" in classifiers
    assert about["Description-Content-Type"] == "text/markdown"
    # Python's own reader leaves it in the body; importlib_metadata, where anything brings it along,
    # takes its place and makes a header of it.
    described = about.get_payload() or about["Description"]
    assert described.strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    urls = about.get_all("Project-URL")
    assert urls and all("example.org/placeholder/" in url for url in urls)
    asked = [requirement for requirement in found.requires or [] if "extra ==" not in requirement]
    names = {re.split("[<>=!~ ;\\[]", requirement)[0].lower() for requirement in asked}
    assert {"torch", "transformers", "accelerate"} <= names
    assert not names & WORKERS_TOOLS
    assert all("<" in requirement and ">=" in requirement for requirement in found.requires or [])


def test_what_an_extra_installs_is_also_there_for_the_tests():
    """Word for word, in the group that `make` and `uv sync` install."""
    text = (ROOT / "pyproject.toml").read_text(encoding="utf-8")
    extras, dev = (
        re.search(rf"\[{name}\]\n(.*?)\n\n", text, re.DOTALL)[1]
        for name in ("project.optional-dependencies", "dependency-groups")
    )
    asked = re.findall('"([^"]+)"', extras)
    assert asked and set(asked) <= set(re.findall('"([^"]+)"', dev))
