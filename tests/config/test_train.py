"""A whole configuration: its problems at once, and what its groups ask for together."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.fields import Options

GIVEN = {"dataset_path": "data", "output_dir": "run"}


def problems_of(config: Options) -> list[str]:
    """Every problem as one text."""
    return [str(problem) for problem in config.problems().found]


def test_all_problems_of_a_configuration_are_reported_at_once():
    config = TrainConfig(batch_size=0, learning_rate=-1.0, optimizer="adamx", sequence_length=1)
    config.max_steps, config.compress = "many", "zip"
    found = problems_of(config)
    for part in (
        "--max-steps is 'many', which is of the wrong type\n  fix: give a whole number",
        "--compress is 'zip'\n  fix: choose from: bf16, int4",
        "no data given\n  fix: add --dataset-path",
        "no place for the run\n  fix: add --output-dir",
        "--batch-size is 0\n  fix: use 1 or more",
        "--learning-rate is -1.0\n  fix: use a number above 0",
        "unknown optimizer 'adamx'\n  fix: did you mean adamw",
        "--sequence-length is 1\n  fix: use 2 or more",
    ):
        assert sum(part in one for one in found) == 1, part
    assert len(found) == 8


def test_a_value_of_the_wrong_type_hides_no_other_problem():
    found = problems_of(TrainConfig(dataset_path=3, output_dir="run", weight_decay=-1.0))
    assert ["--dataset-path is 3" in found[0], "--weight-decay is -1.0" in found[1]] == [True] * 2
    assert len(found) == 2


def test_settings_that_ranks_must_share_leave_out_places_and_addresses():
    one = TrainConfig(output_dir="a", rank=0, master_addr="x", micro_batch_size=1)
    other = TrainConfig(output_dir="b", rank=1, master_addr="y", micro_batch_size=2)
    assert one.shared_settings() == other.shared_settings()
    assert TrainConfig(learning_rate=1.0).shared_settings() != one.shared_settings()


@pytest.mark.parametrize(
    ("asked", "found", "fix"),
    [
        ({"resume": "auto", "overwrite": True}, "would throw away", "give one of them"),
        ({"keep_best": True}, "needs evaluations", "add --eval-every"),
        ({"keep_best": True, "eval_every": 3, "save_every": 10}, "is not a multiple", "make it"),
        ({"overwrite": True, "model_name": "run"}, "--model-name run", "choose another"),
        ({"model_name": "m", "model_type": "llama"}, "its own sizes", "one or the other"),
        (
            {"sync": "diloco", "sync_every": 30, "eval_every": 100},
            "--eval-every 100 is not a multiple of --sync-every 30",
            "use 90 or 120",
        ),
    ],
)
def test_options_that_do_not_go_together_are_refused_with_a_fix(asked, found, fix):
    (problem,) = TrainConfig(**GIVEN, **asked).problems().found
    assert found in problem.found and fix in problem.fix


def test_streaming_runs_may_be_evaluated_at_any_update():
    asked = {"sync": "diloco", "sync_every": 30, "eval_every": 100}
    assert not problems_of(TrainConfig(**GIVEN, **asked, fragments=2))
    assert problems_of(TrainConfig(**GIVEN, **asked, fragments=1))


def test_a_notebook_may_give_paths_and_sizes_as_python_has_them():
    config = TrainConfig(Path("data"), Path("run"), config_overrides={"n_layer": 2, "n_head": 1})
    assert (config.dataset_path, config.output_dir) == ("data", "run")
    assert config.config_overrides == "n_layer=2,n_head=1"
    assert not problems_of(config)


def test_an_evaluation_of_a_named_model_needs_no_output():
    assert not problems_of(TrainConfig(dataset_path="data", eval_only=True, model_name="m"))
