"""The benchmark of shapes counts every token once and repeats no finished run."""

from __future__ import annotations

import math
import re

import pytest
import torch
import torch.nn.functional as F

from benchmarks.shapes import Arm, Training, batches, bits_per_byte, encoded, main, orthogonal
from tests.texts import write_text

TINY = "layers=2 width=32 head=16 block=16 batch=64 tokens=640 vocab=300"


@pytest.fixture
def text(tmp_path):
    return write_text(tmp_path / "text.txt", documents=200)


def test_every_family_runs_once_and_is_kept(text, tmp_path, capsys):
    words = ["--text", str(text), "--results", str(tmp_path / "found.jsonl"), "--base", TINY]
    words += ["--work-dir", str(tmp_path / "tokens"), "--arm", "vocab=256 shift=1 ema=0.9"]
    words += ["--arm", "type=nanochat", "--arm", "type=llama optimizer=adamw tie=1"]
    main(words)
    first = capsys.readouterr().out
    assert len(re.findall(r"^\d\.\d{4} ", first, re.MULTILINE)) == 3
    kept = (tmp_path / "found.jsonl").read_text()
    main(words)
    assert capsys.readouterr().out == first
    assert (tmp_path / "found.jsonl").read_text() == kept


def test_times_are_told_against_the_first(text, tmp_path, capsys):
    words = ["--text", str(text), "--base", TINY, "--work-dir", str(tmp_path), "--time", "1"]
    main([*words, "--burst", "1", "--arm", "", "--arm", "batch=128"])
    first, second = capsys.readouterr().out.splitlines()
    assert "1.000 x the first" in first and second.endswith("batch=128 tokens=640")


def test_every_token_but_the_first_is_predicted_once(text, tmp_path):
    arm = Arm.parse(Arm(), TINY)
    train, validation, size_bytes = encoded(text.read_bytes(), arm.vocab, tmp_path)
    assert len(validation) % arm.block != 1, "a last block that is shorter"
    model = Training(arm, 0, train).model
    nats = 0.0
    with torch.no_grad():
        for position in range(1, len(validation)):
            start = (position - 1) // arm.block * arm.block
            logits = model(validation[None, start:position]).logits[0, -1]
            nats += float(F.cross_entropy(logits, validation[position]))
    expected = nats / math.log(2) / size_bytes
    assert bits_per_byte(arm, model, validation, size_bytes) == pytest.approx(expected, rel=1e-5)


def test_an_epoch_has_every_block_once():
    arm = Arm.parse(Arm(), TINY)
    tokens = torch.arange(16 * 12 + 1)
    source = batches(arm, tokens, seed=3)
    inputs, targets = zip(*(next(source) for _ in range(3)), strict=True)
    assert sorted(torch.cat(inputs).flatten().tolist()) == list(range(16 * 12))
    assert torch.equal(torch.cat(targets), torch.cat(inputs) + 1)


@pytest.mark.parametrize("shape", [(3, 24, 24), (2, 16, 48), (2, 48, 16)])
def test_newton_schulz_brings_singular_values_near_1(shape):
    matrices = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    left, values, right = torch.linalg.svd(matrices, full_matrices=False)
    found = orthogonal(matrices, 5, torch.float32)
    rotated = left.mT @ found @ right.mT
    diagonal = rotated.diagonal(dim1=1, dim2=2)
    well_conditioned = values > 0.05 * values.norm(dim=1, keepdim=True)
    assert torch.allclose(rotated, torch.diag_embed(diagonal), atol=1e-4)
    assert ((diagonal > 0.6) & (diagonal < 1.3))[well_conditioned].all()
