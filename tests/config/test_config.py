"""Flags, aliases and recipes: all problems at once, the nearest name, and a quick --help."""

from __future__ import annotations

import subprocess
import sys

import pytest

from p2p_llm_forge.config import CheckConfig, PrepareConfig, TrainConfig, parse
from p2p_llm_forge.errors import ForgeError
from tests import ROOT

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
    assert getattr(parse(TrainConfig, [alias, str(value)], "train.py"), field) == value
    with_dashes = "--" + alias.removeprefix("--").replace("_", "-")
    assert getattr(parse(TrainConfig, [with_dashes, str(value)], "train.py"), field) == value


def test_the_recipe_gives_defaults_and_the_command_line_wins(tmp_path):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(
        "batch-size: 32\nlearning_rate: 3.0e-4\ncompile: true\n"
        "config_overrides: {n_layer: 3, n_embd: 48}\nmodel_name:\n"
    )
    config = parse(TrainConfig, ["--learning-rate", "0.1", "--config", str(recipe)], "train.py")
    assert (config.batch_size, config.learning_rate, config.compile) == (32, 0.1, True)
    assert config.config_overrides == "n_layer=3,n_embd=48"
    assert config.model_name is None


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("batch_sise: 3\nlerning_rate: 1", "unknown key 'batch_sise': did you mean batch_size"),
        (
            "batch_sise: 3\nlerning_rate: 1",
            "unknown key 'lerning_rate': did you mean learning_rate",
        ),
        ("batch_size: [", "is not YAML"),
        ("- batch_size", "must hold `key: value` lines, found a list"),
        ("batch_size: many", "invalid int value: 'many'"),
    ],
)
def test_a_wrong_recipe_is_told_with_the_mend(tmp_path, text, told):
    recipe = tmp_path / "run.yaml"
    recipe.write_text(text)
    with pytest.raises(ForgeError) as error:
        parse(TrainConfig, ["--config", str(recipe)], "train.py")
    assert told in str(error.value)


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (["--batch-sise", "3"], "unknown argument --batch-sise: did you mean --batch-size"),
        (["--batch-size", "three"], "invalid int value: 'three'"),
        (["--mixed-precision", "fp8"], "invalid choice: 'fp8'"),
        (["--config", "nowhere.yaml"], "--config nowhere.yaml: no such file"),
        (["stray"], "belong to no flag: stray"),
    ],
)
def test_a_wrong_command_line_is_told_with_the_mend(words, told):
    with pytest.raises(ForgeError) as error:
        parse(TrainConfig, words, "train.py")
    assert told in str(error.value)


def test_all_problems_of_a_configuration_are_told_at_once():
    config = TrainConfig(batch_size=0, learning_rate=-1.0, optimizer="adamx", sequence_length=1)
    with pytest.raises(ForgeError) as error:
        config.problems().raise_any()
    text = str(error.value)
    for told in (
        "--dataset-path",
        "--output-dir",
        "--batch-size is 0",
        "--learning-rate is -1.0",
        "unknown optimizer 'adamx': did you mean adamw",
        "--sequence-length is 1",
    ):
        assert told in text
    assert text.startswith("6 problems:")


@pytest.mark.parametrize("script", ["train.py", "prepare_data.py", "check_cluster.py"])
def test_help_needs_no_heavy_library(script):
    code = (
        f"import sys, runpy; sys.argv = ['{script}', '--help']\ntry: runpy.run_path('{script}',"
        " run_name='__main__')\nexcept SystemExit as end: assert end.code == 0\nheavy = {'torch',"
        " 'transformers', 'datasets', 'accelerate', 'evaluate'} & set(sys.modules)\nassert not"
        " heavy, heavy\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    classes = {"train": TrainConfig, "prepare_data": PrepareConfig, "check_cluster": CheckConfig}
    config_class = classes[script.removesuffix(".py")]
    for field in config_class.__dataclass_fields__:
        assert f"--{field.replace('_', '-')}" in done.stdout


def test_settings_that_ranks_must_share_leave_out_places_and_addresses():
    one = TrainConfig(output_dir="a", rank=0, master_addr="x", micro_batch_size=1)
    other = TrainConfig(output_dir="b", rank=1, master_addr="y", micro_batch_size=2)
    assert one.shared_settings() == other.shared_settings()
    assert TrainConfig(learning_rate=1.0).shared_settings() != one.shared_settings()


@pytest.mark.parametrize(
    ("asked", "told"),
    [
        ({"sync_every": 20}, "--sync-every belongs to --sync diloco, this run is --sync ddp"),
        ({"fragments": 2, "outer_lr": 0.6}, "--outer-lr, --fragments belong to --sync diloco"),
        ({"sync": "diloco", "compress": "powersgd"}, "goes with --sync ddp"),
        ({"sync": "diloco", "sync_every": 4, "overlap_steps": 4}, "use 3 or fewer"),
        ({"sync": "diloco", "sync_every": 4, "fragments": 5}, "use 4 fragments or fewer"),
        ({"sync": "diloco", "sync_every": 30, "eval_every": 100}, "use 90 or 120"),
        ({"sync": "diloco", "sync_every": 0}, "--sync-every is 0: use 1 or more"),
        ({"sync": "diloco", "outer_momentum": 1.0}, "from 0 to below 1"),
        ({"sync": "diloco", "outer_lr": 0.0}, "--outer-lr is 0.0: use a number above 0"),
        ({"sync": "auto", "compress": "int8"}, "leave out --compress int8"),
        ({"compress": "int8", "powersgd_rank": 2}, "belongs to --compress powersgd"),
        ({"compress": "int4,powersgd"}, "choose from none, fp16, bf16, int8, int4, powersgd"),
    ],
)
def test_settings_of_sync_that_do_not_fit_are_refused_with_a_mend(asked, told):
    with pytest.raises(ForgeError) as error:
        TrainConfig("data", "run", **asked).problems().raise_any()
    assert told in str(error.value)


def test_streaming_runs_may_be_evaluated_at_any_update():
    asked = {"sync": "diloco", "sync_every": 30, "fragments": 2, "eval_every": 100}
    TrainConfig("data", "run", **asked).problems().raise_any()
    with pytest.raises(ForgeError, match="--eval-every 100 is not a multiple"):
        TrainConfig("data", "run", **{**asked, "fragments": 1}).problems().raise_any()
