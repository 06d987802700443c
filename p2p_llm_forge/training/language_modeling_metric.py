"""Loss, perplexity, bits per byte and token accuracy as an `evaluate.Metric`.

Works offline: the class needs no script of a hub (`evaluate.load` would ask for one).
"""

from __future__ import annotations

import math

import datasets
import evaluate


class LanguageModelingMetric(evaluate.Metric):
    """Token-weighted figures of a language model: eval_loss (nats per token), perplexity,
    bits_per_byte, token_accuracy.

    Inputs, one entry per batch: nats (summed negative log likelihood), tokens (predicted), correct
    (tokens whose most probable prediction was right); and bytes_of_text, the UTF-8 bytes that all
    the tokens together stand for (None if unknown).
    """

    def _info(self) -> evaluate.MetricInfo:
        types = {"nats": "float64", "tokens": "int64", "correct": "int64"}
        features = datasets.Features({key: datasets.Value(kind) for key, kind in types.items()})
        return evaluate.MetricInfo(description=str(self.__doc__), citation="", features=features)

    def _compute(
        self, nats: list[float], tokens: list[int], correct: list[int], bytes_of_text: float | None
    ) -> dict[str, float | None]:
        total_nats, total_tokens = math.fsum(nats), sum(tokens)
        loss = total_nats / total_tokens
        return {
            "eval_loss": loss,
            "perplexity": math.exp(loss) if loss < 700 else math.inf,
            "bits_per_byte": total_nats / math.log(2) / bytes_of_text if bytes_of_text else None,
            "token_accuracy": sum(correct) / total_tokens,
        }
