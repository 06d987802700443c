"""Every mistake in a configuration, found before anything is opened."""

from __future__ import annotations

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, Problems


def mistakes_in(config: TrainConfig) -> Problems:
    """Every problem that can be seen without data and peers.

    Names that only a library knows are looked up only where some are given: importing
    transformers takes seconds, and that --output-dir is missing should be reported at once.
    """
    problems = config.problems()
    try:
        if config.model_type or config.config_overrides:
            from p2p_llm_forge.model.sizes import sizes_asked_for

            sizes_asked_for(config)
    except ForgeError as error:
        problems.add(error)
    try:
        if config.report_to != TrainConfig.report_to:
            from p2p_llm_forge.training.tracking import tracker_names

            tracker_names(config.report_to)
    except ForgeError as error:
        problems.add(error)
    return problems
