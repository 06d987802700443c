"""A whole configuration: its problems at once, and what its groups ask for together."""

from __future__ import annotations

from pathlib import Path

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.fields import Options
from p2p_llm_forge.config.train import SCHEDULES

GIVEN = {"dataset_path": "data", "output_dir": "run"}


def problems_of(config: Options) -> list[str]:
    """Every problem as one text."""
    return [str(problem) for problem in config.problems().found]


def test_all_problems_of_a_configuration_are_reported_at_once():
    config = TrainConfig(batch_size=0, learning_rate=-1.0, optimizer="adamx", sequence_length=1)
    config.max_steps, config.compress = "many", "zip"
    found = problems_of(config)
    for part in (
        "--max-steps is 'many'\n  fix: give a whole number",
        "--compress is 'zip'\n  fix: choose from: bf16, int4",
        "no data given\n  fix: add --dataset-path",
        "no place for the run\n  fix: add --output-dir",
        "--batch-size is 0\n  fix: use 1 or more",
        "--learning-rate is -1.0\n  fix: use a finite number above 0",
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
        ({"keep_best": True}, "needs evaluations", "add --eval-every N"),
        (
            {"keep_best": True, "eval_every": 3, "save_every": 10},
            "is not a multiple",
            "use --save-every 9 or 12",
        ),
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


BY_HAND = {"rank": 1, "world_size": 2, "master_addr": "10.0.0.1", "master_port": 29500}


@pytest.mark.parametrize("left_out", BY_HAND)
def test_a_launch_by_hand_needs_all_four_flags(left_out):
    flags = {name: value for name, value in BY_HAND.items() if name != left_out}
    (problem,) = TrainConfig(**GIVEN, **flags).problems().found
    assert problem.fix == f"add --{left_out.replace('_', '-')}"
    assert not problems_of(TrainConfig(**GIVEN, **BY_HAND))


def test_a_rank_is_one_of_the_world():
    (problem,) = TrainConfig(**GIVEN, **{**BY_HAND, "rank": 2}).problems().found
    assert "--rank 2 is not one of the 2 ranks" in problem.found and "0 to 1" in problem.fix
    assert not problems_of(TrainConfig(**GIVEN, world_size=1))


def test_a_notebook_may_give_paths_and_sizes_as_python_has_them():
    config = TrainConfig(Path("data"), Path("run"), config_overrides={"n_layer": 2, "n_head": 1})
    assert (config.dataset_path, config.output_dir) == ("data", "run")
    assert config.config_overrides == "n_layer=2,n_head=1"
    assert not problems_of(config)


def test_an_evaluation_of_a_named_model_needs_no_output():
    assert not problems_of(TrainConfig(dataset_path="data", eval_only=True, model_name="m"))


@pytest.mark.parametrize("name", ["batch_size", "max_steps", "micro_batch_size"])
def test_sizes_start_at_1(name):
    (problem,) = TrainConfig("data", "run", **{name: 0}).problems().found
    assert problem.fix == "use 1 or more"


@pytest.mark.parametrize(
    ("settings", "found", "fix"),
    [
        ({"micro_batch_size": "many"}, "--micro-batch-size is 'many'", "a whole number or auto"),
        (
            {"micro_batch_size": "auto", "gradient_accumulation_steps": 2},
            "--gradient-accumulation-steps counts micro-batches",
            "give --batch-size instead",
        ),
    ],
)
def test_a_micro_batch_is_a_number_or_found(settings, found, fix):
    (problem,) = TrainConfig("data", "run", **settings).problems().found
    assert found in problem.found and fix in problem.fix
    assert not TrainConfig("data", "run", micro_batch_size="auto").problems().found
    assert TrainConfig("data", "run", micro_batch_size="4").micro_batch() == 4
    assert TrainConfig("data", "run", micro_batch_size="auto").micro_batch() is None


@pytest.mark.parametrize("value", [0.0, -1.0, float("inf"), float("nan")])
def test_a_learning_rate_is_a_finite_number_above_0(value):
    (problem,) = TrainConfig("data", "run", learning_rate=value).problems().found
    assert problem.found == f"--learning-rate is {value}"


def test_a_seed_has_at_most_63_bits():
    assert not TrainConfig("data", "run", seed=2**63 - 1).problems().found
    assert TrainConfig("data", "run", seed=2**63).problems().found


def test_schedules_are_those_of_transformers_that_need_only_the_step():
    import torch
    from transformers import get_scheduler
    from transformers.trainer_utils import SchedulerType

    alone = set()
    for kind in SchedulerType:
        optimizer = torch.optim.SGD([torch.zeros(1, requires_grad=True)], lr=1.0)
        special = {"num_decay_steps": 2} if kind.value == "warmup_stable_decay" else {}
        try:
            made = get_scheduler(kind, optimizer, 1, 10, scheduler_specific_kwargs=special)
            made.lr_lambdas[0](3)
        except (AttributeError, TypeError, ValueError):
            continue
        alone.add(kind.value)
    assert alone >= {"linear", "cosine"}
    assert set(SCHEDULES) == alone | {"wsd"}


@pytest.mark.parametrize(
    ("name", "fix"),
    [("cosin", "did you mean cosine"), ("reduce_lr_on_plateau", "choose from: constant")],
)
def test_schedules_that_cannot_be_used_are_refused(name, fix):
    (problem,) = TrainConfig("data", "run", lr_scheduler=name).problems().found
    assert f"unknown schedule '{name}'" in problem.found and fix in problem.fix
