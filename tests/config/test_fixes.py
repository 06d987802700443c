"""Flags and recipes are fixed as it is said, to the letter; then they are taken."""

from __future__ import annotations

import re

import pytest

from p2p_llm_forge.config import CheckConfig, TrainConfig, parse
from p2p_llm_forge.errors import ForgeError

NEEDED = ["--dataset-path", "data", "--output-dir", "run"]
ROUNDS = ["--sync", "diloco", "--sync-every", "30"]
# What was typed, what the fix says, and what is typed then. #: a number that the fix names.
FLAGS = [
    (["--max-steps", "many"], "give a whole number", ["--max-steps", "7"]),
    (["--learning-rate", "fast"], "give a number", ["--learning-rate", "1e-3"]),
    (["--cpu", "maybe"], "give true or false", ["--cpu", "true"]),
    (["--sync", "dilocco"], "did you mean diloco?", ["--sync", "diloco"]),
    (["--learning-rate", "0"], "use a finite number above 0", ["--learning-rate", "1e-3"]),
    (["--learning-rate", "inf"], "use a finite number above 0", ["--learning-rate", "1e-3"]),
    (["--log-every", "1" + "0" * 30], "use less than #", ["--log-every", "#-"]),
    (["--keep-checkpoints", "0"], "use # or more", ["--keep-checkpoints", "#"]),
    (["--save-every", "1" + "0" * 30], "use less than #", ["--save-every", "#-"]),
    (["--sequence-length", "1"], "use # or more", ["--sequence-length", "#"]),
    (
        ["--master-port", "70000", "--world-size", "1"],
        "use # or less",
        ["--master-port", "#", "--world-size", "1"],
    ),
    (["--peer-timeout", "0"], "use a finite number above 0", ["--peer-timeout", "10"]),
    (["--peer-timeout", "1e10"], "use less than #", ["--peer-timeout", "1e8"]),
    (["--sample-prompt", "a\udcff"], "write it in UTF-8", ["--sample-prompt", "aü"]),
    (["--sample-prompt", "a\0"], "without NUL characters", ["--sample-prompt", "a"]),
    (["--output-dir", "x" * 300], "use a shorter one", ["--output-dir", "x"]),
    (["--seed", str(2**63)], "use a number of at most 63 bits", ["--seed", str(2**63 - 1)]),
    (["--optimizer", "adamv"], "did you mean adamw", ["--optimizer", "adamw"]),
    (["--lr-scheduler", "cosin"], "did you mean cosine", ["--lr-scheduler", "cosine"]),
    (["--minutes", "2", "--epochs", "3"], "leave out --minutes or --epochs", ["--epochs", "3"]),
    (["--minutes", "2", "--max-steps", "3"], "or --max-steps", ["--minutes", "2"]),
    (["--micro-batch-size", "some"], "a whole number or auto", ["--micro-batch-size", "auto"]),
    (
        ["--micro-batch-size", "auto", "--gradient-accumulation-steps", "2"],
        "give --batch-size instead of it",
        ["--micro-batch-size", "auto", "--batch-size", "16"],
    ),
    (["--model-name", "a", "--depth", "2"], "give one or the other", ["--depth", "2"]),
    (["--depth", "0"], "use 1 or more", ["--depth", "1"]),
    (["--eval-only", "--overwrite"], "leave --overwrite out", ["--eval-only"]),
    (["--dropout", "1"], "0 or more and less than 1", ["--dropout", "0.1"]),
    (["--model-name", "a", "--model-type", "gpt2"], "give one or the other", ["--model-name", "a"]),
    (["--resume", "auto", "--overwrite"], "give one of them", ["--resume", "auto"]),
    (["--keep-best"], "add --eval-every N", ["--keep-best", "--eval-every", "100"]),
    (
        ["--keep-best", "--eval-every", "30", "--save-every", "100"],
        "use --save-every #",
        ["--keep-best", "--eval-every", "30", "--save-every", "#"],
    ),
    (["--outer-momentum", "1", *ROUNDS], "from 0 to below 1", ["--outer-momentum", "0.9", *ROUNDS]),
    (["--sync", "auto", "--compress", "int8"], "leave out --compress", ["--sync", "auto"]),
    (
        ["--sync", "auto", "--compress", "int8"],
        "or choose --sync ddp or diloco",
        ["--sync", "ddp", "--compress", "int8"],
    ),
    (
        ["--powersgd-rank", "4"],
        "add --compress powersgd",
        ["--powersgd-rank", "4", "--compress", "powersgd"],
    ),
    (["--sync-every", "30"], "add --sync diloco", ROUNDS),
    (["--sync-every", "30"], "or leave them out", []),
    (
        [*ROUNDS, "--compress", "powersgd"],
        "use --compress int8 or int4",
        [*ROUNDS, "--compress", "int4"],
    ),
    ([*ROUNDS, "--fragments", "40"], "use # fragments or fewer", [*ROUNDS, "--fragments", "#"]),
    ([*ROUNDS, "--overlap-steps", "30"], "use # or fewer", [*ROUNDS, "--overlap-steps", "#"]),
    ([*ROUNDS, "--eval-every", "50"], "use #", [*ROUNDS, "--eval-every", "#"]),
    (
        ["--overwrite", "--model-name", "run/final"],
        "choose another --output-dir",
        ["--overwrite", "--model-name", "run/final", "--output-dir", "another"],
    ),
    (
        ["--compress", "powersgd", "--cluster-secret-file", "s"],
        "use --compress int8 or int4",
        ["--compress", "int8", "--cluster-secret-file", "s"],
    ),
    (["--batch-siez", "8"], "did you mean --batch-size", ["--batch-size", "8"]),
    (["eight"], "put the flag before them", ["--batch-size", "8"]),
    (["--config", ""], "or leave --config out", []),
]


def refused(words, config_class=TrainConfig):
    with pytest.raises(ForgeError) as error:
        parse(config_class, words, "train.py")
    return [problem.fix for problem in error.value.problems]


@pytest.mark.parametrize(("words", "fix", "then"), FLAGS, ids=range(len(FLAGS)))
@pytest.mark.parametrize("config_class", [TrainConfig, CheckConfig])
def test_the_fix_of_flags_makes_flags_that_are_taken(words, fix, then, config_class):
    said = refused([*NEEDED, *words], config_class)
    pattern = re.escape(fix).replace(r"\#", r"(\d+)")
    found = [match for one in said if (match := re.search(pattern, one))]
    assert found, said
    number = int(found[0][1]) if "#" in fix else 0
    numbers = {"#": str(number), "#-": str(number - 1)}
    typed = [numbers.get(word, word) for word in then]
    assert parse(config_class, [*NEEDED, *typed], "train.py")


def test_the_fixes_of_what_is_missing_add_it():
    assert refused(NEEDED[2:]) == [
        "add --dataset-path FOLDER (made by prepare_data.py) or a text file"
    ]
    assert refused(NEEDED[:2]) == ["add --output-dir FOLDER"]
    assert parse(TrainConfig, NEEDED, "train.py")
    assert refused([*NEEDED, "--max-steps"])[0] == "see train.py --help"
    assert parse(TrainConfig, [*NEEDED, "--max-steps", "7"], "train.py")


# What a recipe holds, what the fix says, and what it holds then.
RECIPES = [
    ("batch_siez: 8", "did you mean batch_size", "batch_size: 8"),
    ("batch_size: [8]", "give one value", "batch_size: 8"),
    ("batch_size: {a: 8}", "give one value", "batch_size: 8"),
    ("- batch_size", "write `key: value` lines", "batch_size: 8"),
    ("batch_size: {", "write `key: value` lines", "batch_size: 8"),
    ("# " + "x" * 100_000, "for what differs from the defaults", "batch_size: 8"),
    ("a: " + "[" * 30 + "]" * 30, "write every value out, as one line", "batch_size: 8"),
]


@pytest.mark.parametrize(("text", "fix", "then"), RECIPES, ids=range(len(RECIPES)))
def test_the_fix_of_a_recipe_makes_one_that_is_taken(tmp_path, text, fix, then):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text)
    assert any(fix in one for one in refused([*NEEDED, "--config", str(recipe)]))
    recipe.write_text(then)
    assert parse(TrainConfig, [*NEEDED, "--config", str(recipe)], "train.py").batch_size == 8


def test_the_fixes_of_a_recipe_that_cannot_be_read_name_those_that_can(tmp_path):
    recipe = tmp_path / "recipe.yaml"
    for path in (recipe, tmp_path):
        (fix,) = refused([*NEEDED, "--config", str(path)])
        assert fix == "check the path; recipes that come with the project lie in recipes/"
    assert parse(TrainConfig, [*NEEDED, "--config", "recipes/demo.yaml"], "train.py")
