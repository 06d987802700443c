"""benchmarks/gpu.py works where it can be tried: its tables, what it skips, its cheapest parts."""

from __future__ import annotations

import json
import sys
from argparse import Namespace

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM

from benchmarks.gpu import MODELS, Model, Part, Report, Runner, lacking, numbers, tokens_per_s
from tests import ROOT

GPU = ROOT / "benchmarks" / "gpu.py"
# Programs of parts. Each gets `--json FILE` after its own words, but for that of tests.
WRITES_FIGURES = "import sys; open(sys.argv[2], 'w').write('{\"seen\": 1}')"
PRINTS_OUTCOMES = """
print('tests/gpu/test_a.py::test_one PASSED    [ 20%]')
print('tests/gpu/test_a.py::test_two[a CPU] FAILED [ 40%]')
print('tests/gpu/test_b.py::test_three SKIPPED (needs a GPU) [ 60%]')
"""


@pytest.mark.slow
def test_a_rehearsal_measures_and_writes_its_tables(run, tmp_path):
    asked = ["blocks", "GPT-2 124M, train.py", "GPT-2 124M, Hugging Face's loop"]
    words = ["--device", "cpu", "--tiny", "--results", tmp_path, "--only", *asked]
    status, printed = run(sys.executable, GPU, *words)
    assert status == 0, printed
    found = json.loads((tmp_path / "gpu.json").read_text())
    outcomes = {part["name"]: part["outcome"] for part in found["parts"]}
    done = {name for name, outcome in outcomes.items() if outcome == "done"}
    assert done == {"torch", *asked}
    assert {outcomes[name] for name in outcomes.keys() - done} == {"not asked for"}
    ours, theirs = (found["figures"][name] for name in asked[1:])
    assert len(ours["segments_s"]) == len(ours["bare_s"]) == len(theirs["segments_s"]) == 3
    assert ours["tokens_per_update"] == theirs["tokens_per_update"] == 4 * 32
    assert ours["parameters"] == theirs["parameters"]
    table = (tmp_path / "gpu.md").read_text()
    faster = tokens_per_s(ours) / tokens_per_s(theirs)
    assert f"| {asked[1]} | 0 M | {tokens_per_s(ours):,.0f} | {faster:.2f} |" in table
    assert "=== blocks" in (tmp_path / "gpu.log").read_text()


def test_a_machine_without_a_gpu_or_packages_skips_and_says_why(run, tmp_path):
    # -S: as if nothing were installed.
    words, environ = (
        [sys.executable, "-S", GPU, "--results", tmp_path],
        {"CUDA_VISIBLE_DEVICES": ""},
    )
    status, printed = run(*words, environ=environ)
    assert status == 0, printed
    table = (tmp_path / "gpu.md").read_text()
    assert "| tests | 0 s | skipped: torch sees no GPU |" in table
    assert "transformers (missing)" in table and "torch (missing)" in table


@pytest.fixture
def runner(tmp_path):
    """Runs parts for an hour, in a folder of its own."""
    report = Report(tmp_path, {"date": "today"}, [], length=32)
    asked = Namespace(seconds=3600, device="cpu")
    return Runner(report, tmp_path, asked, tmp_path / "site"), report


def test_a_part_that_hangs_is_ended_and_one_that_fails_is_shown(runner, tmp_path):
    runs, report = runner
    hangs = Part("hangs", ["-c", "import time; time.sleep(1e5)"], 2.0)
    fails = Part("fails", ["-c", "raise SystemExit('what is wrong')"], 60.0)
    works = Part("works", ["-c", WRITES_FIGURES], 60.0)
    late = Part("late", ["-c", ""], 60.0, least_s=1e6)
    report.parts = [hangs, fails, works, late]
    for part in report.parts:
        runs.run(part)
    assert hangs.outcome == "cut off after 2 s"
    assert fails.outcome == "ended with status 1" and "what is wrong" in fails.tail
    assert works.outcome == "done" and report.figures == {"works": {"seen": 1}}
    assert late.outcome == "skipped: no time was left"
    table = (tmp_path / "gpu.md").read_text()
    assert "### fails\n\n```\n" in table and "what is wrong" in table
    assert json.loads((tmp_path / "gpu.json").read_text())["figures"] == report.figures


def test_outcomes_of_tests_are_read_as_they_come(runner, tmp_path):
    runs, report = runner
    tests = Part("tests", ["-c", PRINTS_OUTCOMES, "pytest"], 60.0)
    report.parts = [tests]
    runs.run(tests)
    assert report.tests == {
        "tests/gpu/test_a.py::test_one": "PASSED",
        "tests/gpu/test_a.py::test_two[a CPU]": "FAILED",
        "tests/gpu/test_b.py::test_three": "SKIPPED",
    }
    table = (tmp_path / "gpu.md").read_text()
    assert "1 failed, 1 passed, 1 skipped" in table
    assert "- tests/gpu/test_a.py::test_two[a CPU]: FAILED" in table


def test_versions_are_compared_as_numbers(tmp_path):
    assert numbers("2.11.0+cu130") == (2, 11) == numbers("2.11")
    assert numbers("5.9") < numbers("5.23")
    listed = tmp_path / "requirements.txt"
    listed.write_text("pytest>=1,<900\nno-such-thing>=1,<2\nnumpy>=900,<901  # why\ntorch>=1,<2\n")
    found = lacking(listed)
    assert found.keys() == {"no-such-thing", "numpy", "torch"}
    assert found["no-such-thing"] == "missing"
    assert "older than 900" in found["numpy"] and "not below 2" in found["torch"]


def lm_of(model: Model, length: int, vocab_size: int) -> torch.nn.Module:
    config = CONFIG_MAPPING[model.family](vocab_size=vocab_size, bos_token_id=0, eos_token_id=0)
    config.update({**model.sizes, "n_positions": length, "max_position_embeddings": length})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager")


@pytest.mark.parametrize(("number", "counted"), [(0, 124e6), (1, 490e6)])
def test_the_models_are_as_large_as_their_names_say(number, counted):
    with torch.device("meta"):
        lm = lm_of(MODELS[False][number], 1024, 50_257)
    assert sum(p.numel() for p in lm.parameters()) == pytest.approx(counted, rel=0.01)


@pytest.mark.parametrize("number", [0, 1])
def test_flops_are_those_that_torch_counts(number):
    """For a forward, a third of both; torch leaves out biases and norms, which are few."""
    model, length = MODELS[True][number], 64
    lm = lm_of(model, length, 512)
    with FlopCounterMode(display=False) as counter:
        lm(input_ids=torch.zeros(1, length, dtype=torch.int64), use_cache=False)
    parameters = sum(p.numel() for p in lm.parameters())
    ours = model.flops_per_token(parameters, length) * length / 3
    assert ours == pytest.approx(counter.get_total_flops(), rel=0.05)
