"""A trained model is one that lm_eval takes as it is, with a task of one's own."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.runs import finish

TEXTS = ["Mara bakes bread.", "Ines mends the nets.", "The ferry is late."]
QUESTIONS = [
    {"question": "Mara bakes", "choices": ["bread", "nets"], "answer": 0},
    {"question": "Ines mends the", "choices": ["late", "nets", "ferry"], "answer": 1},
    {"question": "The ferry", "choices": ["is late", "bakes bread"], "answer": 0},
]
BYTES = """
task: own_texts
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/texts.jsonl}}
test_split: test
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list: [{metric: bits_per_byte}]
"""
CHOICES = """
task: own_questions
dataset_path: json
dataset_kwargs: {data_files: {test: FOLDER/questions.jsonl}}
test_split: test
output_type: multiple_choice
doc_to_text: "{{question}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{answer}}"
metric_list: [{metric: acc}]
"""


@pytest.mark.slow
def test_lm_eval_takes_a_run_as_it_is(zygote, prepared, tmp_path):
    run = finish(zygote, prepared, tmp_path / "run", 1, max_steps=6)
    for name, rows in (("texts", [{"text": text} for text in TEXTS]), ("questions", QUESTIONS)):
        lines = "".join(json.dumps(row) + "\n" for row in rows)
        (tmp_path / f"{name}.jsonl").write_text(lines)
    for name, task in (("texts", BYTES), ("questions", CHOICES)):
        (tmp_path / f"{name}.yaml").write_text(task.replace("FOLDER", str(tmp_path)))
    words = ["--model", "hf", "--model_args", f"pretrained={run}", "--device", "cpu"]
    words += ["--tasks", "own_texts,own_questions", "--include_path", tmp_path]
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [Path(sys.executable).parent / "lm_eval", *words, "--output_path", tmp_path / "found"],
        env=environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (file,) = (tmp_path / "found").rglob("results_*.json")
    found = json.loads(file.read_text())["results"]
    bits, right = by_hand(run)
    assert found["own_texts"]["bits_per_byte,none"] == pytest.approx(bits, rel=1e-4)
    assert found["own_questions"]["acc,none"] == pytest.approx(right)


def by_hand(run: Path) -> tuple[float, float]:
    """Bits per byte of the texts, and the share of questions guessed right."""
    lm = AutoModelForCausalLM.from_pretrained(run).eval()
    tokenizer = AutoTokenizer.from_pretrained(run)

    def nats(before: list[int], text: list[int]) -> float:
        with torch.no_grad():
            logs = lm(torch.tensor([before + text])).logits[0].log_softmax(-1)
        places = range(len(before) - 1, len(before) + len(text) - 1)
        return -sum(float(logs[at, token]) for at, token in zip(places, text, strict=True))

    total = sum(nats([tokenizer.bos_token_id], tokenizer(text)["input_ids"]) for text in TEXTS)
    guesses = []
    for one in QUESTIONS:
        before = tokenizer(one["question"])["input_ids"]
        whole = [tokenizer(f"{one['question']} {choice}")["input_ids"] for choice in one["choices"]]
        costs = [nats(before, tokens[len(before) :]) for tokens in whole]
        guesses.append(costs.index(min(costs)) == one["answer"])
    size = sum(len(text.encode()) for text in TEXTS)
    return total / math.log(2) / size, sum(guesses) / len(guesses)
