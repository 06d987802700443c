"""Flags of LoRA: what goes together, what other programs call it, and what there is not."""

from __future__ import annotations

import importlib.util

import pytest

from p2p_llm_forge.config import TrainConfig, parse
from p2p_llm_forge.config.lora import INSTALL
from p2p_llm_forge.errors import ForgeError

NEEDED = ["--dataset-path", "data", "--output-dir", "run"]
LORA = [*NEEDED, "--model-name", "base", "--lora-rank", "16"]


def problem_of(*words):
    with pytest.raises(ForgeError) as error:
        parse(TrainConfig, [*words], "train.py")
    assert len(error.value.problems) == 1
    return error.value.problems[0]


def test_alpha_is_twice_the_rank_unless_given():
    assert parse(TrainConfig, LORA, "train.py").scaling == 32
    assert parse(TrainConfig, [*LORA, "--lora-alpha", "8"], "train.py").scaling == 8
    assert TrainConfig().scaling is None


@pytest.mark.parametrize(
    "typed",
    [
        ["--lora-targets", "q_proj", "v_proj"],
        ["--lora-targets=q_proj,v_proj"],
        ["--lora_targets", "q_proj, v_proj"],
        ["--lora_target_modules", "q_proj", "v_proj"],
    ],
)
def test_targets_are_typed_with_spaces_or_commas(typed):
    assert parse(TrainConfig, [*LORA, *typed], "train.py").lora_targets == ["q_proj", "v_proj"]
    assert parse(TrainConfig, [*LORA], "train.py").lora_targets == ["auto"]


def test_a_notebook_and_a_recipe_may_give_targets_as_one_text(tmp_path):
    assert TrainConfig(lora_targets="q_proj,v_proj").lora_targets == ["q_proj", "v_proj"]
    recipe = tmp_path / "lora.yaml"
    recipe.write_text("model_name: base\nlora_rank: 8\nlora_targets: [q_proj, o_proj]\n")
    config = parse(TrainConfig, [*NEEDED, "--config", str(recipe)], "train.py")
    assert (config.lora_rank, config.lora_targets) == (8, ["q_proj", "o_proj"])


@pytest.mark.parametrize(
    ("typed", "found"),
    [
        ("--lora-alpha 8", "--lora-alpha is for LoRA"),
        ("--lora-dropout 0.1", "--lora-dropout is for LoRA"),
        ("--lora-targets all-linear", "--lora-targets is for LoRA"),
        ("--base-dtype bfloat16", "--base-dtype is for LoRA"),
        ("--merge-lora", "--merge-lora is for LoRA"),
    ],
)
def test_options_of_lora_need_its_rank(typed, found):
    problem = problem_of(*NEEDED, "--model-name", "base", *typed.split())
    assert problem.found.startswith(found)
    flag = typed.split()[0]
    assert problem.fix == f"add --lora-rank 16, or leave {flag} out"
    parse(TrainConfig, [*LORA, *typed.split()], "train.py")


@pytest.mark.parametrize(
    ("typed", "found", "fix", "then"),
    [
        ("--lora-rank 0", "--lora-rank is 0", "use 1 or more", "--lora-rank 1"),
        ("--lora-alpha 0", "--lora-alpha is 0", "use 1 or more", "--lora-alpha 1"),
        ("--lora-dropout 1", "is not a share", "such as 0.05", "--lora-dropout 0.05"),
        ("--lora-targets auto q_proj", "beside auto", "leave out auto", "--lora-targets q_proj"),
        ("--lora-targets auto q_proj", "beside auto", "or the others", "--lora-targets auto"),
        ("--lora-targets ,", "names no layer", "q_proj v_proj", "--lora-targets q_proj v_proj"),
        ("--model-name=", "none is given", "add --model-name MODEL", "--model-name MODEL"),
    ],
)
def test_the_fixes_of_values_make_flags_that_are_taken(typed, found, fix, then):
    problem = problem_of(*LORA, *typed.split())
    assert found in problem.found and fix in problem.fix
    parse(TrainConfig, [*LORA, *then.split()], "train.py")


def test_without_peft_the_line_that_installs_it_is_given(monkeypatch):
    found = importlib.util.find_spec
    without = lambda name, *rest: None if name == "peft" else found(name, *rest)  # noqa: E731
    monkeypatch.setattr(importlib.util, "find_spec", without)
    problem = problem_of(*LORA)
    assert problem.found == "--lora-rank needs the package peft, which is not installed"
    assert problem.fix == INSTALL


@pytest.mark.parametrize(
    ("typed", "same"),
    [
        ("--lora_r 8", "--lora-rank 8"),
        ("--r 8", "--lora-rank 8"),
        ("--lora_target_linear True", "--lora-rank 16 --lora-targets all-linear"),
        ("--load_in_4bit False", "--lora-rank 16"),
        ("--use_dora False", "--lora-rank 16"),
    ],
)
def test_names_of_other_programs_mean_the_same(typed, same):
    theirs = [*LORA, *typed.split()]
    assert parse(TrainConfig, theirs, "train.py") == parse(
        TrainConfig, [*LORA, *same.split()], "train.py"
    )


def test_quantised_bases_are_refused_with_the_reason():
    for typed in ("--load_in_4bit", "--qlora True", "--quantize bnb.nf4"):
        problem = problem_of(*LORA, *typed.split())
        assert "no GPU has shown bitsandbytes working here" in problem.fix
    assert parse(TrainConfig, [*LORA, "--base-dtype", "bfloat16"], "train.py")  # as the fix says
    assert "--lora-rank 16" in problem_of(*NEEDED, "--use_peft", "True").fix
