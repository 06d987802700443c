"""The flags of what peers bring each other."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import TrainConfig, parse


def config_of(**settings) -> TrainConfig:
    return TrainConfig(**{"dataset_path": "data", "output_dir": "run", **settings})


def test_peers_fetch_what_they_lack_unless_told_otherwise():
    assert config_of().fetch == "auto" and config_of().replicate_checkpoints is None
    assert not config_of().problems().found


@pytest.mark.parametrize("written, meant", [("yes", "yes"), ("no", "never"), ("never", "never")])
def test_a_recipe_says_yes_and_no_in_the_words_of_yaml(tmp_path, written, meant):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(f"dataset_path: d\noutput_dir: r\nfetch: {written}\n")
    assert parse(TrainConfig, ["--config", str(recipe)], "train.py").fetch == meant


@pytest.mark.parametrize(
    "settings, found",
    [
        ({"fetch": "always"}, "--fetch is 'always'"),
        ({"replicate_checkpoints": 0}, "--replicate-checkpoints is 0"),
        ({"replicate_checkpoints": "all"}, "--replicate-checkpoints is 'all'"),
    ],
)
def test_what_no_run_can_do_is_refused(settings, found):
    (problem,) = config_of(**settings).problems().found
    assert problem.found == found and problem.fix


@pytest.mark.parametrize("name, value", [("fetch", "yes"), ("replicate_checkpoints", 2)])
def test_all_ranks_must_be_given_the_same(name, value):
    assert config_of(**{name: value}).shared_settings()[name] == value
