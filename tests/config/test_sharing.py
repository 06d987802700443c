"""The flags of an upload: names as the Hub takes them, and what belongs together."""

from __future__ import annotations

import string

import pytest
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.sharing import is_name_on_hub

ODD = ["", "a", "me/a", "a/b/c", "/a", "a/", "-a", "a-", ".a", "a.", "_a", "a_", "a--b", "a..b"]
ODD += ["a.git", "a.git/b", "me/a b", "mé/a", "me/a\n", "a" * 96, "a" * 97, "me/" + "a" * 96]
ODD += ["a" * 97 + "/b", "a.-b", "me/a_.b", "../a", "~/a", "C:\\a", "https://hf.co/a", "a/.b", "_"]


@pytest.mark.parametrize("name", ODD + [f"me{letter}a" for letter in string.punctuation])
def test_a_name_is_one_of_the_hub_where_its_own_library_takes_it(name):
    try:
        validate_repo_id(name)
        is_taken = True
    except HFValidationError:
        is_taken = False
    assert is_name_on_hub(name) == is_taken


def problems(**settings):
    config = TrainConfig(**{"dataset_path": "data", "output_dir": "run", **settings})
    return [problem.found for problem in config.problems().found]


def test_what_belongs_to_an_upload_is_refused_without_one():
    assert problems(push_to_hub="me/mara", private=True, push_checkpoints=True) == []
    for name in ("private", "push_checkpoints"):
        (found,) = problems(**{name: True})
        assert "is for an upload" in found
    (found,) = problems(push_to_hub="artifacts/my run")
    assert "'artifacts/my run' is no name that the Hub allows" in found


def test_a_finished_run_is_uploaded_without_data_and_nothing_else_is():
    assert problems(dataset_path="", push_to_hub="me/mara") == []
    assert problems(dataset_path="") == ["no data given"]
    for settings in ({"eval_only": True}, {"dry_run": True, "dataset_path": ""}):
        (found,) = problems(push_to_hub="me/mara", **settings)
        assert "--eval-only and --dry-run make none" in found


@pytest.mark.parametrize("settings", [{"private": True}, {"push_checkpoints": True}])
def test_the_fix_of_what_belongs_to_an_upload_makes_flags_that_are_taken(settings):
    assert problems(**settings, push_to_hub="NAME") == []


@pytest.mark.parametrize("name", ["me/mara bakes", "mé", "-a", "a--b", "/home/me/mara"])
def test_the_fix_of_a_name_is_one_that_the_hub_takes(name):
    config = TrainConfig(dataset_path="data", output_dir="run", push_to_hub=name)
    (problem,) = config.problems().found
    assert problem.fix.startswith("give NAME or OWNER/NAME")
    for fixed in ("NAME", "OWNER/NAME", "x_1.b-c"):
        assert problems(push_to_hub=fixed) == []
