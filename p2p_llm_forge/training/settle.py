"""What was not asked for, settled once: as the run has begun, else by this version's defaults."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.train import WEIGHT_DECAY
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.shape import DEPTH, family_of, learning_rate_of
from p2p_llm_forge.training.identity import of_today
from p2p_llm_forge.training.manifest import checkpoint_dir, read_manifest, read_state, steps_saved
from p2p_llm_forge.training.run_record import RunRecord
from p2p_llm_forge.training.tuning import as_tuned, defaults_of, in_words, width_of

OPTIMIZER = "muon"  # of a model from scratch
OPTIMIZER_OF_LOADED = "adamw"


def settle(
    config: TrainConfig, begun: dict[str, Any] | None = None, width: int | None = None
) -> TrainConfig:
    """The configuration with a family, a depth, an optimizer and a rate where none were given.

    begun: the settings that the run has begun with, which rule then (see `begun_in`). Of a family
    that was given without a depth, sizes stay the family's own; of a loaded model, its own, and
    epochs and schedule are those of tuning. width: of the loaded model (see `width_for`).
    """
    before, depth, family = begun or {}, config.depth, config.model_type
    if not config.model_name and family is None and depth is None and not before:
        depth = DEPTH
    if not config.model_name:
        usual_family = family_of(depth, config.config_overrides)
        family = family or before.get("model_type") or usual_family
        depth = depth or before.get("depth")
    usual = OPTIMIZER_OF_LOADED if config.model_name else OPTIMIZER
    optimizer = config.optimizer or before.get("optimizer") or usual
    rate = config.learning_rate
    if rate is None:
        rate = before.get("learning_rate")
    if rate is None:
        is_tuned = bool(config.model_name) and optimizer == OPTIMIZER_OF_LOADED
        usual_rate = learning_rate_of(optimizer, depth)
        rate = defaults_of(config).rate_at(width) if is_tuned else usual_rate
    dropout = before.get("dropout") if config.dropout is None else config.dropout
    decay = before.get("weight_decay") if config.weight_decay is None else config.weight_decay
    settled = replace(
        config,
        model_type=family,
        depth=depth,
        dropout=dropout,
        weight_decay=WEIGHT_DECAY if decay is None else decay,
        optimizer=optimizer,
        learning_rate=rate,
    )
    return as_tuned(settled, before) if config.model_name else settled


def width_for(config: TrainConfig, begun: dict[str, Any] | None) -> int | None:
    """How wide the loaded model is, where `settle` needs that for a rate."""
    needs = config.model_name and config.learning_rate is None
    if not needs or (begun or {}).get("learning_rate") is not None:
        return None
    return width_of(str(config.model_name))


def begun_in(config: TrainConfig) -> dict[str, Any] | None:
    """The settings of the run that the configuration names, if there is one, quickly read.

    Those in its newest checkpoint; before there is one, what run.json holds of them.
    """
    if config.overwrite:
        return None
    for folder in _checkpoints(config):
        with contextlib.suppress(OSError, ValueError):
            read_manifest(folder)
            return of_today(read_state(folder)["config"])
    with contextlib.suppress(ForgeError):
        record = RunRecord.read(Path(config.output_dir)) if config.output_dir else None
        # One without a depth is of a version that built other models, and nothing of it is saved.
        return record.identity if record and "depth" in record.identity else None
    return None


def _checkpoints(config: TrainConfig) -> Iterator[Path]:
    """What may be resumed from, newest first."""
    if config.resume not in (None, "auto"):
        yield Path(str(config.resume))
    elif config.output_dir:
        folder = Path(config.output_dir)
        yield from (checkpoint_dir(folder, step) for step in steps_saved(folder))


def settled_lines(config: TrainConfig) -> list[str]:
    """What a settled configuration comes to, for a person."""
    by = f"by {config.optimizer}, peak learning rate {config.learning_rate:g}"
    lines = [f"optimizer {by}, weight decay {config.decay():g}"]
    if config.dropout:
        lines.append(f"dropout   {config.dropout:g} of the embedding and of every layer's outputs")
    if config.model_name:
        lines.insert(0, in_words(config))
    if config.depth is not None:
        lines.insert(0, f"depth     {config.depth}; --depth N makes the model smaller or larger")
    return lines
