"""Flags, aliases and recipes: all problems at once, and the nearest names."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import TrainConfig, parse
from p2p_llm_forge.errors import ForgeError

GIVEN = ["--dataset-path", "d", "--output-dir", "o"]


def problems_of(words: list[str]) -> list[tuple[str, str]]:
    """What is found, and the fix, of each problem of a command line."""
    with pytest.raises(ForgeError) as error:
        parse(TrainConfig, words, "train.py")
    return [(problem.found, problem.fix) for problem in error.value.problems]


NAMES_OF_RUN_CLM = {
    "--model_name_or_path": ("model_name", "x"),
    "--block_size": ("sequence_length", 64),
    "--per_device_train_batch_size": ("micro_batch_size", 4),
    "--gradient_accumulation_steps": ("gradient_accumulation_steps", 2),
    "--num_train_epochs": ("epochs", 3.0),
    "--max_train_steps": ("max_steps", 7),
    "--num_warmup_steps": ("warmup_steps", 5),
    "--lr_scheduler_type": ("lr_scheduler", "linear"),
    "--checkpointing_steps": ("save_every", 9),
    "--resume_from_checkpoint": ("resume", "auto"),
    "--learning_rate": ("learning_rate", 0.5),
    "--weight_decay": ("weight_decay", 0.2),
    "--output_dir": ("output_dir", "o"),
}


@pytest.mark.parametrize("alias", NAMES_OF_RUN_CLM)
def test_names_that_users_of_run_clm_know_are_accepted(alias):
    field, value = NAMES_OF_RUN_CLM[alias]
    assert getattr(parse(TrainConfig, [*GIVEN, alias, str(value)], "train.py"), field) == value
    with_dashes = "--" + alias.removeprefix("--").replace("_", "-")
    assert (
        getattr(parse(TrainConfig, [*GIVEN, with_dashes, str(value)], "train.py"), field) == value
    )


@pytest.mark.parametrize(
    ("words", "asked"),
    [
        ([], "auto"),
        (["--compile"], "on"),
        (["--compile", "--epochs", "2"], "on"),
        (["--compile", "on"], "on"),
        (["--compile=off"], "off"),
        (["--compile", "auto"], "auto"),
        (["--compile", "true"], "on"),
        (["--compile=False"], "off"),
    ],
)
def test_compile_alone_means_on_and_a_switch_is_read_as_before(words, asked):
    assert parse(TrainConfig, [*GIVEN, *words], "train.py").compile == asked


@pytest.mark.parametrize(
    ("written", "asked"), [("on", "on"), ("off", "off"), ("auto", "auto"), ("true", "on")]
)
def test_a_recipe_may_switch_as_yaml_does(tmp_path, written, asked):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(f"compile: {written}\n")
    words = [*GIVEN, "--config", str(recipe)]
    assert parse(TrainConfig, words, "train.py").compile == asked


def test_a_flag_without_its_value_hides_no_other_problem(tmp_path):
    found = problems_of([*GIVEN, "--learning-rate", "--batch-size=0", "--epochs", "--max-steps"])
    assert [text for text, _ in found] == [
        "--learning-rate: expected one argument",
        "--epochs: expected one argument",
        "--max-steps: expected one argument",
        "--batch-size is 0",
    ]


def test_the_recipe_gives_defaults_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        "batch-size: 32\nlearning_rate: 3.0e-4\ncompile: true\n"
        "config_overrides: {n_layer: 3, n_embd: 48}\nmodel_name:\n"
    )
    words = [*GIVEN, "--learning-rate", "0.1", "--config", str(recipe)]
    config = parse(TrainConfig, words, "train.py")
    assert (config.batch_size, config.learning_rate, config.compile) == (32, 0.1, "on")
    assert config.config_overrides == "n_layer=3,n_embd=48"
    assert config.model_name is None


@pytest.mark.parametrize(
    ("text", "found", "fix"),
    [
        ("batch_sise: 3\nlerning_rate: 1", "unknown key 'batch_sise'", "did you mean batch_size"),
        ("batch_sise: 3\nlerning_rate: 1", "unknown key 'lerning_rate'", "mean learning_rate"),
        ("batch_size: [", "is not YAML", "`key: value` line"),
        ("- batch_size", "holds a list", "`key: value` lines"),
        ("max_steps: [5, 6]", "run.yaml: max_steps holds a list", "give one value"),
        ("batch_size: many", "--batch-size is 'many'", "give a whole number"),
    ],
)
def test_a_wrong_recipe_is_reported_with_the_fix(tmp_path, text, found, fix):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(text)
    problems = problems_of([*GIVEN, "--config", str(recipe)])
    assert any(found in one and fix in other for one, other in problems), problems


@pytest.mark.parametrize(
    ("words", "found", "fix"),
    [
        (["--batch-sise", "3"], "unknown argument --batch-sise", "did you mean --batch-size"),
        (["--batch-size", "three"], "--batch-size is 'three'", "give a whole number"),
        (["--epochs", "many"], "--epochs is 'many'", "give a number"),
        (["--compile", "perhaps"], "--compile is 'perhaps'", "choose from: auto, off, on"),
        (["--gradient-checkpointing=x"], "--gradient-checkpointing is 'x'", "give true or false"),
        (["--mixed-precision", "fp8"], "--mixed-precision is 'fp8'", "choose from: auto, bf16"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file", "recipes/"),
        (["stray"], "belong to no flag: stray", "quotes"),
        (["--resume"], "--resume: expected one argument", "train.py --help"),
    ],
)
def test_a_wrong_command_line_is_reported_with_the_fix(words, found, fix):
    ((one, other),) = problems_of([*GIVEN, *words])
    assert found in one and fix in other


def test_all_problems_of_flags_recipe_and_values_are_reported_at_once(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text("batch_sise: 3")
    words = ["--config", str(recipe), "--lerning-rate", "1", "--max-steps", "x", "--epochs", "-1"]
    found = [one for one, _ in problems_of(words)]
    for part in ("batch_sise", "--lerning-rate", "--max-steps", "--epochs", "no data", "no place"):
        assert sum(part in one for one in found) == 1, part
    assert len(found) == 6
