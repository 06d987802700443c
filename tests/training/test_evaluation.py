"""The figures of an evaluation are those of a plain loop over the split."""

from __future__ import annotations

import math

import datasets
import evaluate
import numpy as np
import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.data.held_out import held_out, sample
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.join import join
from p2p_llm_forge.training import progress
from p2p_llm_forge.training.evaluation import (
    blocks_beside,
    evaluate_blocks,
    standard_errors,
)
from p2p_llm_forge.training.learner import text_spec_of
from tests.conversations import bytes_of, nats_by_hand, right_by_hand
from tests.runs import TINY


def figures_by_oracle(lm, folder, eos):
    """Each block's nats, right guesses and bytes: rows as `datasets` reads them, token by token."""
    rows = np.array(datasets.load_from_disk(str(folder))["validation"]["input_ids"], np.int64)
    assert len(rows) > 1
    before = np.concatenate([[eos], rows.flatten()[:-1]]).reshape(rows.shape)
    with torch.no_grad():
        logits = lm(input_ids=torch.from_numpy(before)).logits.double()
    chosen = logits.log_softmax(-1).gather(-1, torch.from_numpy(rows).unsqueeze(-1))
    return rows, -chosen.squeeze(-1).sum(1).numpy(), (logits.argmax(-1).numpy() == rows).sum(1)


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_every_token_of_the_split_is_predicted_once(prepared, micro_batch_size, monkeypatch):
    # Nothing is written where downloads lie, which need not be writable.
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/proc/never")
    data = open_prepared(prepared)
    with join(TrainConfig(output_dir=str(prepared))) as cluster:
        lm = build_model(TrainConfig(**TINY), text_spec_of(data)).eval()
        size = data.manifest.splits["validation"].bytes
        blocks = held_out(data, None)
        figures = evaluate_blocks(NextTokenLoss(lm), blocks, micro_batch_size, cluster)
    rows, nats, right = figures_by_oracle(lm, prepared, data.manifest.eos_token_id)
    assert figures["eval_loss"] == pytest.approx(nats.sum() / rows.size, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(nats.sum() / math.log(2) / size, rel=1e-6)
    assert figures["token_accuracy"] == pytest.approx(right.sum() / rows.size)
    assert figures["eval_blocks"] == figures["eval_split_blocks"] == len(rows)
    assert "eval_loss_stderr" not in figures, "of a whole split nothing is estimated"


@pytest.mark.parametrize("micro_batch_size", [1, 4])
def test_a_sample_has_the_figures_of_its_blocks_and_their_errors(
    prepared, micro_batch_size, monkeypatch, capsys
):
    monkeypatch.setattr(progress, "BETWEEN_LINES_S", 0.0)
    data = open_prepared(prepared)
    with join(TrainConfig(output_dir=str(prepared))) as cluster:
        lm = build_model(TrainConfig(**TINY), text_spec_of(data)).eval()
        blocks = held_out(data, 21)
        figures = evaluate_blocks(NextTokenLoss(lm), blocks, micro_batch_size, cluster)
    shown = capsys.readouterr().out.splitlines()
    assert f"evaluating {micro_batch_size} of 21 blocks, " in shown[0] and shown[0].endswith("left")
    assert len(shown) == -(-21 // micro_batch_size) - 1, "until the last"
    eos = data.manifest.eos_token_id
    rows, nats, right = figures_by_oracle(lm, prepared, eos)
    tokenizer, drawn = data.load_tokenizer(), list(blocks.numbers)
    assert len(set(drawn)) == 21 < len(rows)
    # The text is ASCII, so a token's letters are its bytes.
    size = np.array(
        [
            sum(len(tokenizer.decode([token])) for token in rows[number] if token != eos)
            for number in drawn
        ]
    )
    nats, right = nats[drawn], right[drawn]
    assert figures["eval_loss"] == pytest.approx(nats.mean() / 32, rel=1e-6)
    assert figures["token_accuracy"] == pytest.approx(right.mean() / 32)
    bits = nats.sum() / math.log(2) / size.sum()
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    assert (figures["eval_blocks"], figures["eval_split_blocks"]) == (21, len(rows))
    left_out = 1 - 21 / len(rows)
    error = math.sqrt(left_out * nats.var(ddof=1) / 21) / 32
    assert figures["eval_loss_stderr"] == pytest.approx(error, rel=1e-4)
    residuals = nats / math.log(2) - bits * size
    error = math.sqrt(left_out * residuals.var(ddof=1) / 21) / size.mean()
    assert figures["bits_per_byte_stderr"] == pytest.approx(error, rel=1e-4)


@pytest.mark.parametrize("masked", [False, True])
def test_a_sample_of_conversations_has_the_figures_of_what_is_trained_in_them(
    prepared_conversations, conversations, masked
):
    data, there = open_prepared(prepared_conversations), conversations["validation"]
    end, tokenizer = data.manifest.eos_token_id, data.load_tokenizer()
    with join(TrainConfig(output_dir=str(prepared_conversations))) as cluster:
        lm = build_model(TrainConfig(**TINY), text_spec_of(data)).eval()
        blocks = held_out(data, 13)
        assert blocks.scale == pytest.approx(1)
        model = NextTokenLoss(lm, end if masked else None)
        figures = evaluate_blocks(model, blocks, 3, cluster)
    drawn = [there[number] for number in blocks.numbers]
    with torch.no_grad():
        by_hand = [nats_by_hand(lm.double(), block, end, masked) for block in drawn]
        right = sum(right_by_hand(lm, block, end, masked) for block in drawn)
    nats = np.array([one.item() for one, _ in by_hand])
    tokens = np.array([count for _, count in by_hand])
    size = np.array([bytes_of(tokenizer, block, end) for block in drawn])
    assert tokens.max() > 3 * tokens.min()
    assert figures["token_accuracy"] == pytest.approx(right / tokens.sum())
    assert figures["eval_loss"] == pytest.approx(nats.sum() / tokens.sum(), rel=1e-6)
    bits = nats.sum() / math.log(2) / size.sum()
    assert figures["bits_per_byte"] == pytest.approx(bits, rel=1e-6)
    left_out = 1 - 13 / len(there)
    for unit, name in ((tokens, "eval_loss"), (size * math.log(2), "bits_per_byte")):
        residuals = nats - nats.sum() / unit.sum() * unit
        error = math.sqrt(left_out * residuals.var(ddof=1) / 13) / unit.mean()
        assert figures[f"{name}_stderr"] == pytest.approx(error, rel=1e-4)


def a_split(seed, documents=160):
    """Nats and bytes of the blocks of a made-up split, in its order: neighbours are much alike.

    Blocks of 256 tokens; a document is hard or easy as a whole, some are of another kind.
    """
    draw = np.random.default_rng(seed)
    nats, size = [], []
    for _ in range(documents):
        length = 1 + int(draw.pareto(1.2) * 4) % 200
        of_document = 3.3 + 0.5 * draw.standard_normal() + 3.0 * (draw.random() < 0.05)
        per_token = of_document + 0.1 * draw.standard_normal(length)
        nats += list(256 * per_token)
        # Text that is hard is of rare words, cut into short tokens.
        size += list(256 * (4.2 - 0.4 * (per_token - 3.3) + 0.1 * draw.standard_normal(length)))
    return np.array(nats), np.array(size)


@pytest.mark.parametrize("seed", range(4))
def test_nineteen_of_twenty_samples_are_within_two_standard_errors_of_the_split(seed):
    nats, size = a_split(seed)
    total, count, samples = len(nats), 150, 1500
    assert total > 500
    true = nats.sum() / total / 256, nats.sum() / size.sum()
    found, errors = [], []
    for number in range(samples):
        drawn = sample(count, total, seed=1000 * seed + number)
        x, b = nats[drawn], size[drawn]
        sums = {"nats": x.sum(), "tokens": 256 * count, "bytes": b.sum()}
        sums |= {"nats_nats": x @ x, "nats_bytes": x @ b, "bytes_bytes": b @ b}
        sums |= {"nats_tokens": 256 * x.sum(), "tokens_tokens": 256**2 * count}
        found.append((x.mean() / 256, x.sum() / b.sum()))
        errors.append(standard_errors(sums, count, total))
    found, errors = np.array(found), np.array(errors)
    inside = (abs(found - true) < 1.96 * errors).mean(axis=0)
    assert (abs(inside - 0.95) < 0.025).all(), inside
    # Their mean is that of what the figures really vary by.
    assert errors.mean(axis=0) == pytest.approx(found.std(axis=0), rel=0.06)
    assert abs(found.mean(axis=0) / true - 1).max() < 0.002


def test_a_sample_of_one_block_has_no_error_and_one_of_all_none_left():
    sums = {"nats": 800.0, "tokens": 256, "bytes": 900.0}
    sums |= {"nats_nats": 640_000.0, "nats_bytes": 720_000.0, "bytes_bytes": 810_000.0}
    sums |= {"nats_tokens": 800.0 * 256, "tokens_tokens": 256.0**2}
    assert all(math.isnan(one) for one in standard_errors(sums, 1, 10))
    twice = {name: 2 * value for name, value in sums.items()}
    assert standard_errors(twice, 2, 10) == (0.0, 0.0), "of two blocks alike"


@pytest.mark.parametrize("length", [32, 256, 1024])
def test_an_evaluation_reads_less_than_the_training_beside_it(length):
    usual = 4096 // length
    for trained in (1, 10, 100, 1000, 10**6):
        for there in (1, 10, 100, 1000, 10**6):
            count = blocks_beside(trained, there, length) or there
            assert count <= max(trained / 2, usual)
            if trained > 1024:
                assert count <= trained / 8, "less than a sixteenth of the time"
            assert count == there or count >= min(trained // 2, 128), "enough for a figure"


def test_a_tenth_held_out_is_evaluated_exactly_after_an_epoch():
    for train in (20, 700, 90_000):
        assert blocks_beside(train, there=train // 9, sequence_length=256) == 0
    assert blocks_beside(1_000, there=10_000, sequence_length=256) == 128
