"""Options of generate.py and export.py."""

from __future__ import annotations

import subprocess
import sys

import pytest

from p2p_llm_forge.config import ExportConfig, GenerateConfig, name_first, parse
from tests import ROOT


def test_a_model_may_stand_first():
    config = parse(GenerateConfig, name_first(["artifacts/demo", "--seed", "3"]), "generate.py")
    assert (config.model_name, config.seed) == ("artifacts/demo", 3)
    named = parse(ExportConfig, name_first(["--model-name", "a/b"]), "export.py")
    assert (named.model_name, named.dtype, named.output_file) == ("a/b", "f16", None)
    assert name_first([]) == []


def test_a_recipe_gives_defaults(tmp_path):
    recipe = tmp_path / "story.yaml"
    recipe.write_text("model-name: a/b\ntemperature: 0.5\ntop-k: 3\n")
    config = parse(GenerateConfig, ["--config", str(recipe), "--top-k", "9"], "generate.py")
    assert (config.model_name, config.temperature, config.top_k) == ("a/b", 0.5, 9)


@pytest.mark.parametrize("script", ["generate.py", "export.py"])
def test_help_fits_a_screen_and_needs_no_heavy_library(script):
    words = [sys.executable, "-m", "tests.config.help_imports", script, "--help"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True, check=False)
    *lines, imported = done.stdout.splitlines()
    assert done.returncode == 0 and imported == "imported: []", done.stderr
    assert len(lines) <= 45 and any("--model-name" in line for line in lines)


@pytest.mark.parametrize(
    ("words", "field", "value"),
    [
        ("--start Hello", "prompt", "Hello"),
        ("--length 5", "max_new_tokens", 5),
        ("--k 5", "top_k", 5),
        ("--p 0.5", "top_p", 0.5),
        ("--model_name_or_path x", "model_name", "x"),
        ("--no-chat-template", "chat", "off"),
        ("--no-chat", "chat", "off"),
        ("--chat-template", "chat", "on"),
        ("--chat", "chat", "on"),
    ],
)
def test_names_that_other_scripts_have_are_understood(words, field, value):
    config = parse(GenerateConfig, ["--model-name", "m", *words.split()], "generate.py")
    assert getattr(config, field) == value


@pytest.mark.parametrize(
    ("wrong", "right"),
    [
        ({"temperature": -1.0}, {"temperature": 0.8}),
        ({"temperature": float("inf")}, {"temperature": 0.0}),
        ({"top_p": 0.0}, {"top_p": 1.0}),
        ({"top_k": -1}, {"top_k": 0}),
        ({"max_new_tokens": 0}, {"max_new_tokens": 1}),
        ({"seed": -1}, {"seed": 0}),
        ({"seed": 2**63}, {"seed": 2**63 - 1}),
    ],
)
def test_the_fix_of_a_number_is_one_that_is_taken(wrong, right):
    (problem,) = GenerateConfig(model_name="m", **wrong).problems().found
    assert str(*right.values()) in problem.fix or "or more" in problem.fix or "0" in problem.fix
    assert not GenerateConfig(model_name="m", **right).problems().found
