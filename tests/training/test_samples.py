"""Samples: the same prompts by the same seed, at every evaluation, each kept once."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.training.learner import text_spec_of
from p2p_llm_forge.training.newest import was_trained_to_chat
from p2p_llm_forge.training.samples import sample_text
from prepare_data import prepare
from tests.data import talks
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


def test_a_run_on_conversations_answers_what_a_user_says(config, tmp_path):
    """As transformers does by the published model and the template of its tokenizer."""
    rows = talks.write(tmp_path / "talks.jsonl", talks.rows(60, most=6))
    tokenizer = str(talks.saved(talks.talking_tokenizer(), tmp_path / "tokenizer"))
    asked = PrepareConfig(
        [str(rows)], str(tmp_path / "data"), tokenizer=tokenizer, sequence_length=64
    )
    prepare(asked)
    run = replace(config, dataset_path=str(tmp_path / "data"), sample_prompt=["Who bakes?"])
    train(replace(run, max_steps=2))
    (sample,) = samples(config)

    folder, cached = tmp_path / "run", {"use_cache": True}
    published, lm = (
        AutoTokenizer.from_pretrained(folder),
        AutoModelForCausalLM.from_pretrained(folder).eval(),
    )
    said = published.apply_chat_template(
        [{"role": "user", "content": "Who bakes?"}],
        **{"add_generation_prompt": True, "return_dict": True, "return_tensors": "pt"},
    )
    torch.manual_seed(0)
    ends = [published.eos_token_id, published.convert_tokens_to_ids("<|im_end|>")]
    room = min(60, 64 - said["input_ids"].shape[1])
    drawn = lm.generate(
        **said, max_new_tokens=room, do_sample=True, top_k=40, temperature=0.8,
        eos_token_id=ends, pad_token_id=ends[0], **cached,
    )  # fmt: skip
    answer = published.decode(drawn[0, said["input_ids"].shape[1] :], skip_special_tokens=True)
    assert room > 5 and sample["prompt"] == "Who bakes?" and sample["text"] == answer
    assert was_trained_to_chat(folder) and was_trained_to_chat(folder / "checkpoint-2")


def test_what_was_trained_on_text_is_not_talked_with(config, tmp_path):
    train(replace(config, max_steps=1))
    assert was_trained_to_chat(tmp_path / "run") is False
    assert was_trained_to_chat(tmp_path / "run" / "checkpoint-1") is False
    assert was_trained_to_chat(tmp_path) is None
