"""The precision in which a run was computed, so that it resumes in the same."""

from __future__ import annotations

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.training.settle import begun_in


def precision_begun(config: TrainConfig) -> str | None:
    """What the newest checkpoint that is resumed from says; None where there is none.

    Whether it is good is found out later: all of a run say the same.
    """
    begun = begun_in(config) if config.resume else None
    said = (begun or {}).get("mixed_precision")
    return said if said in ("no", "bf16", "fp16") else None
