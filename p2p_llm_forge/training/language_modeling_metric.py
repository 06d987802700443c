"""Loss, perplexity, bits per byte and token accuracy as an `evaluate.Metric`.

Works offline: the class needs no script of a hub (`evaluate.load` would ask for one).
"""

from __future__ import annotations

import math
from typing import Any

import datasets
import evaluate

DESCRIPTION = """Token-weighted figures of a language model: counts in, means out.
Inputs, one entry per batch: nats (summed negative log likelihood), tokens (predicted), correct
(tokens whose most probable prediction was right); and bytes_of_text, the UTF-8 bytes that all the
tokens together stand for (None if unknown)."""


class LanguageModelingMetric(evaluate.Metric):
    """`compute(nats=[...], tokens=[...], correct=[...], bytes_of_text=N)` -> dict of floats:
    eval_loss (nats per token), perplexity, bits_per_byte, token_accuracy."""

    def _info(self) -> evaluate.MetricInfo:
        features = datasets.Features(
            {
                "nats": datasets.Value("float64"),
                "tokens": datasets.Value("int64"),
                "correct": datasets.Value("int64"),
            }
        )
        return evaluate.MetricInfo(description=DESCRIPTION, citation="", features=features)

    def _compute(
        self,
        nats: list[float],
        tokens: list[int],
        correct: list[int],
        bytes_of_text: int | None = None,
    ) -> dict[str, Any]:
        total_nats, total_tokens = math.fsum(nats), sum(tokens)
        loss = total_nats / total_tokens
        return {
            "eval_loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": total_nats / math.log(2) / bytes_of_text if bytes_of_text else None,
            "token_accuracy": sum(correct) / total_tokens,
        }
