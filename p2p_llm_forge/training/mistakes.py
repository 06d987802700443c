"""Every mistake in a configuration, found before anything is opened."""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, Problems, in_one_line


def mistakes_in(config: TrainConfig) -> Problems:
    """Every problem that can be seen without data and peers.

    Names that only a library knows are looked up only where some are given: importing
    transformers takes seconds, and that --output-dir is missing should be reported at once.
    """
    problems = config.problems()
    require_hub_folder(problems)
    try:
        is_asked = config.model_type or config.config_overrides or config.depth
        if is_asked and isinstance(config.depth, int | None):
            from p2p_llm_forge.model.sizes import sizes_asked_for
            from p2p_llm_forge.training.settle import begun_in, settle

            sizes_asked_for(settle(config, begun_in(config)))
    except ForgeError as error:
        problems.add(error)
    try:
        if config.report_to != TrainConfig.report_to:
            from p2p_llm_forge.training.tracking import tracker_names

            tracker_names(config.report_to)
    except ForgeError as error:
        problems.add(error)
    return problems


def require_hub_folder(problems: Problems, environ: Mapping[str, str] = os.environ) -> None:
    """Note a HF_HOME that is a file, or would lie in one; Hugging Face's libraries fail late at it.

    One that is a folder and cannot be written is no mistake: a local run needs nothing of it.
    """
    folder = Path(environ.get("HF_HOME") or "~").expanduser()
    there = next((path for path in (folder, *folder.parents) if os.path.lexists(path)), folder)
    problems.require(
        there.is_dir(),
        f"HF_HOME is {in_one_line(folder)} in the environment; {in_one_line(there)} is no folder",
        "unset HF_HOME, or set it to the folder where downloads are to lie",
    )
