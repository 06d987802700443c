"""train.py on conversations, in one process: updates, evaluations and resumes count what is marked.

What several processes make of them: tests/multiprocess/test_conversations.py.
"""

from __future__ import annotations

import copy
import json
import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import order
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.training.learner import text_spec_of
from prepare_data import prepare
from tests.conversations import bytes_of, nats_by_hand, step_by_hand, trained_of
from tests.data import talks
from tests.runs import CLOCKED
from train import train

PLAIN_SGD = {
    **{"optimizer": "sgd", "learning_rate": 0.5, "lr_scheduler": "constant"},
    **{"max_grad_norm": 0.0, "weight_decay": 0.0},
}


@pytest.fixture
def chats(config, prepared_conversations):
    """A short run on conversations."""
    return replace(config, dataset_path=str(prepared_conversations))


def lines_of(config):
    text = (Path(config.output_dir) / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in found]


@pytest.mark.parametrize(("micro_batch_size", "masked"), [(8, False), (1, True), (4, True)])
def test_an_update_is_a_step_on_the_mean_over_what_is_trained_in_all_of_it(
    chats, conversations, micro_batch_size, masked
):
    """Against plain SGD in float64, over the conversations one by one where they are masked."""
    asked = replace(chats, **PLAIN_SGD, max_steps=2, micro_batch_size=micro_batch_size, log_every=1)
    data, there = open_prepared(asked.dataset_path), conversations["train"]
    end = data.manifest.eos_token_id
    lm = build_model(asked, text_spec_of(data)).double()
    first, losses = copy.deepcopy(lm), []
    for step in range(2):
        own = [there[number] for number in order.blocks_at(8 * step, 8, len(there), asked.seed)]
        counts = [sum(trained_of(block)) for block in own]
        assert max(counts) > 4 * min(counts), "else a mean of means would do"
        nats = sum(nats_by_hand(lm, block, end, masked)[0].item() for block in own)
        losses.append(nats / sum(counts))
        step_by_hand(lm, own, end, 0.5, alone=masked)
    train(replace(asked, document_mask=masked))
    got = load_file(Path(asked.output_dir) / "model.safetensors")
    for name, tensor in got.items():
        expected = lm.get_parameter(name)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=2e-6, msg=name)
    moved = [(got[name].double() - first.get_parameter(name)).abs().max() for name in got]
    assert max(moved) > 1e-2
    shown = [line["loss"] for line in lines_of(asked) if "loss" in line]
    assert shown == pytest.approx(losses, rel=1e-6)


def test_an_update_learns_from_rows_what_transformers_marks_in_each_of_them(config, tmp_path):
    """From a file of rows to the weights, against the rows one by one, in float64."""
    tokenizer = talks.talking_tokenizer()
    rows = talks.rows(30, most=8)
    prepare(
        PrepareConfig(
            [str(talks.write(tmp_path / "talks.jsonl", rows))],
            str(tmp_path / "data"),
            tokenizer=str(talks.saved(tokenizer, tmp_path / "tokenizer")),
            sequence_length=512,
            validation_fraction=0.0,
        )
    )
    data = open_prepared(tmp_path / "data")
    settings = {"dataset_path": str(tmp_path / "data"), "batch_size": len(data.train_blocks())}
    asked = replace(config, **settings, **PLAIN_SGD, max_steps=1, micro_batch_size=1)
    assert 3 < asked.batch_size < len(rows) / 2, "several in a block"
    lm = build_model(asked, text_spec_of(data)).double()
    marked = [talks.by_transformers(tokenizer, row["messages"]) for row in rows]
    found = [list(zip(tokens, map(bool, marks), strict=True)) for tokens, marks in marked]
    assert max(map(len, found)) <= 512
    end = data.manifest.eos_token_id
    count = step_by_hand(lm, [[conversation] for conversation in found], end, 0.5, alone=True)
    train(replace(asked, document_mask=True))
    got = load_file(Path(asked.output_dir) / "model.safetensors")
    for name, tensor in got.items():
        expected = lm.get_parameter(name)
        torch.testing.assert_close(tensor.double(), expected, rtol=1e-5, atol=2e-6, msg=name)
    assert data.manifest.splits["train"].trained == count


@pytest.mark.parametrize("masked", [False, True])
def test_the_evaluation_is_of_what_is_trained_alone(chats, conversations, masked):
    asked = replace(chats, document_mask=masked, max_steps=2)
    result = train(asked)
    data, there = open_prepared(asked.dataset_path), conversations["validation"]
    from transformers import AutoModelForCausalLM

    lm = AutoModelForCausalLM.from_pretrained(asked.output_dir).double()
    end, tokenizer = data.manifest.eos_token_id, data.load_tokenizer()
    with torch.no_grad():
        found = [nats_by_hand(lm, block, end, masked) for block in there]
    nats, tokens = sum(one.item() for one, _ in found), sum(count for _, count in found)
    assert 0 < tokens < 0.7 * data.manifest.splits["validation"].tokens
    assert result.eval_loss == pytest.approx(nats / tokens, rel=1e-6)
    size = sum(bytes_of(tokenizer, block, end) for block in there)
    assert result.bits_per_byte == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    again = train(replace(asked, eval_only=True))
    assert again.eval_loss == pytest.approx(result.eval_loss, rel=1e-6)


@pytest.mark.parametrize("settings", [{"micro_batch_size": 2}, {"document_mask": True}])
def test_a_resumed_run_ends_bit_for_bit_like_one_that_was_not_stopped(chats, tmp_path, settings):
    """Also where it was saved between two lines, whose loss counts what came before."""
    settings = {**settings, "log_every": 4, "max_steps": 8, "keep_checkpoints": 9}
    whole = replace(chats, **settings, output_dir=str(tmp_path / "whole"))
    train(whole)
    parts = replace(chats, **settings, output_dir=str(tmp_path / "parts"))
    train(parts)
    folder = tmp_path / "parts"
    for name in ("all_results.json", "model.safetensors"):
        (folder / name).unlink()
    for step in (6, 8):
        (folder / f"checkpoint-{step}" / "manifest.json").unlink()
    train(replace(parts, resume="auto"))
    assert "resumed_from" in (folder / "metrics.jsonl").read_text()
    expected = load_file(tmp_path / "whole" / "model.safetensors")
    for name, tensor in load_file(folder / "model.safetensors").items():
        assert torch.equal(tensor, expected[name]), name
    assert lines_of(parts) == lines_of(whole)


def test_a_checkpoint_of_the_version_before_conversations_is_resumed_to_the_same_lines(
    config, tmp_path
):
    """It has kept how many updates there were since the last line, and not of how many tokens."""
    settings = {"log_every": 4, "max_steps": 8, "keep_checkpoints": 9}
    runs = [replace(config, **settings, output_dir=str(tmp_path / name)) for name in "ab"]
    for one in runs:
        train(one)
    folder = tmp_path / "b"
    (folder / "model.safetensors").unlink()
    for step in (6, 8):
        (folder / f"checkpoint-{step}" / "manifest.json").unlink()
    saved = folder / "checkpoint-3"
    state = json.loads((saved / "trainer_state.json").read_text())
    assert state["since_log"].pop("tokens") == 3 * 8 * 32
    write_again(saved, "trainer_state.json", json.dumps(state).encode())
    train(replace(runs[1], resume="auto"))
    assert "resumed_from" in (folder / "metrics.jsonl").read_text()
    assert lines_of(runs[1]) == lines_of(runs[0])


def write_again(saved, name, content):
    """Change a file of a checkpoint, and its manifest with it."""
    import hashlib

    (saved / name).write_bytes(content)
    manifest = json.loads((saved / "manifest.json").read_text())
    digest = hashlib.sha256(content).hexdigest()
    manifest["files"][name] = {"size": len(content), "sha256": digest}
    (saved / "manifest.json").write_text(json.dumps(manifest))


def test_a_time_is_planned_by_what_there_is_to_learn(chats, conversations, capsys):
    """Bytes of the text of what is trained, and how well that alone can be compressed."""
    from p2p_llm_forge.training import timing

    seen = []
    asked = replace(chats, max_steps=None, batch_size=None, minutes=1.0, dry_run=True)
    with pytest.MonkeyPatch.context() as patched:
        measured = timing.compressed_bits
        patched.setattr(timing, "compressed_bits", lambda text: seen.append(text) or measured(text))
        patched.setattr(timing.planner, "require_text", seen.append)
        train(asked)
    data = open_prepared(chats.dataset_path)
    learnt = [t for b in conversations["train"] for c in b for t, is_trained in c if is_trained]
    text, planned = seen
    assert text == data.load_tokenizer().decode(learnt).encode()
    size = sum(bytes_of(data.load_tokenizer(), b, 0) for b in conversations["train"])
    assert planned.tokens * planned.bytes_per_token == pytest.approx(size)
    share = len(learnt) / (90 * 32)
    assert f"; conversations, {len(learnt):,} tokens to learn ({share:.0%})" in (
        capsys.readouterr().out
    )


def test_text_and_conversations_are_two_runs(chats, config):
    train(replace(config, max_steps=3))
    with pytest.raises(ForgeError, match="holds another run"):
        train(replace(chats, max_steps=3, resume="auto"))
