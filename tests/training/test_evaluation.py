"""The figures of an evaluation are those of a plain loop over the split."""

from __future__ import annotations

import math

import evaluate
import numpy as np
import pytest
import torch

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.model.build import build_model
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.join import join
from p2p_llm_forge.training.evaluation import evaluate_split, sample_text
from p2p_llm_forge.training.learner import text_spec_of
from tests.runs import TINY


@pytest.mark.parametrize("micro_batch_size", [1, 3, 8])
def test_every_token_of_the_split_is_predicted_once(prepared, micro_batch_size, monkeypatch):
    # Nothing is written where downloads lie, which need not be writable.
    monkeypatch.setattr(evaluate.config, "HF_METRICS_CACHE", "/proc/never")
    data = open_prepared(prepared)
    blocks = data.blocks("validation")
    with join(TrainConfig(output_dir=str(prepared))) as cluster:
        lm = build_model(TrainConfig(**TINY), text_spec_of(data)).eval()
        size = data.manifest.splits["validation"].bytes
        figures = evaluate_split(NextTokenLoss(lm), blocks, size, micro_batch_size, cluster)
    # The oracle reads the table's rows as `datasets` does and predicts them token by token.
    import datasets

    rows = np.array(datasets.load_from_disk(str(prepared))["validation"]["input_ids"], np.int64)
    assert len(rows) > 1
    before = np.concatenate([[data.manifest.eos_token_id], rows.flatten()[:-1]]).reshape(rows.shape)
    with torch.no_grad():
        logits = lm(input_ids=torch.from_numpy(before)).logits.double()
    chosen = logits.log_softmax(-1).gather(-1, torch.from_numpy(rows).unsqueeze(-1))
    nats = -chosen.sum().item()
    assert figures["eval_loss"] == pytest.approx(nats / rows.size, rel=1e-6)
    assert figures["bits_per_byte"] == pytest.approx(nats / math.log(2) / size, rel=1e-6)
    right = (logits.argmax(-1).numpy() == rows).mean()
    assert figures["token_accuracy"] == pytest.approx(right)


def test_a_sample_goes_on_from_its_prompt_and_repeats_with_its_seed(prepared):
    data = open_prepared(prepared)
    lm = build_model(TrainConfig(**TINY), text_spec_of(data))
    sample = sample_text(lm, text_spec_of(data), "Mara bakes", seed=1, new_tokens=10)
    assert sample.startswith("Mara bakes")
    assert sample == sample_text(lm, text_spec_of(data), "Mara bakes", seed=1, new_tokens=10)
