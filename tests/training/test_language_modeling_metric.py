"""The metric's figures are token-weighted, and need no network."""

from __future__ import annotations

import math

import pytest

from p2p_llm_forge.training.language_modeling_metric import LanguageModelingMetric


def test_the_metric_weighs_every_token_alike_and_works_offline():
    figures = LanguageModelingMetric().compute(
        nats=[10.0, 50.0], tokens=[10, 20], correct=[5, 1], bytes_of_text=90
    )
    assert figures["eval_loss"] == pytest.approx(2.0)
    assert figures["perplexity"] == pytest.approx(math.e**2)
    assert figures["bits_per_byte"] == pytest.approx(60 / math.log(2) / 90)
    assert figures["token_accuracy"] == pytest.approx(0.2)


def test_the_metric_adds_up_batches():
    metric = LanguageModelingMetric()
    for nats in (1.0, 3.0):
        metric.add_batch(nats=[nats], tokens=[2], correct=[1])
    assert metric.compute(bytes_of_text=None)["eval_loss"] == pytest.approx(1.0)
