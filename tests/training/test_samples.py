"""Samples: the same prompts by the same seed, at every evaluation, each kept once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.training.learner import text_spec_of
from p2p_llm_forge.training.samples import sample_text
from tests.runs import TINY
from train import train

PROMPTS = ["Mara bakes", "A \u2013"]


@pytest.fixture
def sampled(config):
    return replace(config, eval_every=2, save_every=3, sample_prompt=PROMPTS)


def samples(config):
    text = (Path(config.output_dir) / "samples.jsonl").read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


def test_a_sample_goes_on_from_its_prompt_and_repeats_with_its_seed(prepared):
    data = open_prepared(prepared)
    lm = build_model(TrainConfig(**TINY), text_spec_of(data))
    sample = sample_text(lm, text_spec_of(data), "Mara bakes", seed=1, new_tokens=10)
    assert sample.startswith("Mara bakes")
    assert sample == sample_text(lm, text_spec_of(data), "Mara bakes", seed=1, new_tokens=10)


def test_every_prompt_is_continued_at_every_evaluation(sampled, capsys):
    result = train(sampled)
    found = samples(sampled)
    assert [(one["step"], one["prompt"]) for one in found] == [
        (step, prompt) for step in (2, 4, 6) for prompt in PROMPTS
    ]
    assert all(one["text"].startswith(one["prompt"]) and one["seed"] == 0 for one in found)
    assert result.sample == found[-2]["text"]
    printed = capsys.readouterr().out
    assert all(f"sample    {one['text']!r}\n" in printed for one in found)


def test_samples_do_not_change_what_is_learnt(sampled, tmp_path):
    from tests.runs import weights

    train(sampled)
    alone = replace(sampled, eval_every=0, sample_prompt=[], output_dir=str(tmp_path / "alone"))
    train(alone)
    ours, others = weights(tmp_path / "run"), weights(tmp_path / "alone")
    assert all((ours[name] == others[name]).all() for name in others)


def test_a_resumed_run_has_every_sample_once(sampled, tmp_path):
    """As a kill after step 5 leaves it: of checkpoint 3, samples of step 4, and a torn line."""
    train(sampled)
    whole, path = samples(sampled), tmp_path / "run" / "samples.jsonl"
    for name in ("checkpoint-6", "all_results.json"):
        (tmp_path / "run" / name).rename(tmp_path / name)
    lines = path.read_text(encoding="utf-8").splitlines(keepends=True)
    path.write_text("".join(lines[:4]) + lines[4][:20], encoding="utf-8")
    train(replace(sampled, resume="auto"))
    assert samples(sampled) == whole and len(whole) == 6


def test_a_run_that_had_only_its_results_to_write_samples_once(sampled, tmp_path):
    result = train(sampled)
    whole = samples(sampled)
    (tmp_path / "run" / "all_results.json").unlink()
    again = train(replace(sampled, resume="auto"))
    assert samples(sampled) == whole and again.sample == result.sample


def test_samples_of_others_stay_as_they_are(sampled, tmp_path):
    train(replace(sampled, max_steps=2))
    path = tmp_path / "run" / "samples.jsonl"
    path.unlink()
    record = tmp_path / "run" / "run.json"
    content = json.loads(record.read_text())
    content["wrote"].remove("samples.jsonl")
    record.write_text(json.dumps(content))
    path.write_text("mine")
    train(replace(sampled, resume="auto", max_steps=4))
    assert path.read_text() == "mine"


@pytest.mark.parametrize("prompts", [[], ["one"], ["two", "prompts"]])
def test_without_a_prompt_a_document_begins(prompts):
    assert TrainConfig(sample_prompt=prompts).prompts() == (prompts or [""])
