"""All mistakes of a configuration at once, and nothing imported for those that need no library."""

from __future__ import annotations

import subprocess
import sys

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import Problems
from p2p_llm_forge.training.mistakes import mistakes_in, require_hub_folder
from tests import ROOT


def test_mistakes_of_values_names_and_trackers_are_found_at_once():
    config = TrainConfig(
        batch_size=0, lr_scheduler="cosin", model_type="lama", report_to="tensorbored"
    )
    found = [str(problem) for problem in mistakes_in(config).found]
    parts = ("no data", "no place", "--batch-size is 0", "mean cosine", "llama", "mean tensorboard")
    for part in parts:
        assert sum(part in one for one in found) == 1, part
    assert len(found) == len(parts)


def test_a_missing_flag_is_reported_without_importing_a_heavy_library():
    words = [sys.executable, "-m", "tests.config.help_imports", "train.py", "--dataset-path", "x"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 2
    assert done.stderr == "error: no place for the run\n  fix: add --output-dir FOLDER\n"
    assert done.stdout.splitlines()[-1] == "imported: []"


@pytest.mark.parametrize("inside", ["", "a/b"])
def test_a_home_of_downloads_that_can_be_no_folder_is_named(tmp_path, inside):
    (tmp_path / "file").touch()
    problems = Problems()
    require_hub_folder(problems, {"HF_HOME": str(tmp_path / "file" / inside)})
    (problem,) = problems.found
    assert f"{tmp_path / 'file'} is no folder" in problem.found and "unset HF_HOME" in problem.fix


@pytest.mark.parametrize("home", [None, "", "~", "new/folder", "/proc/never"])
def test_a_home_of_downloads_that_is_not_there_yet_is_no_mistake(home, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    problems = Problems()
    require_hub_folder(problems, {} if home is None else {"HF_HOME": home})
    assert not problems.found
