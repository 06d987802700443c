"""Small checkpoints for tests: real tensors and a real state, without a run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file

from p2p_llm_forge.files import write_json

WEIGHTS = "model.safetensors"


def state_of(step: int, **more: Any) -> dict[str, Any]:
    """What a trainer's state holds at the least."""
    settings = {"sync": "ddp"}
    state = {"step": step, "blocks_read": 8 * step, "config": {}, "figures": {}}
    return {**state, "format_version": 1, "sync": {"settings": settings}, **more}


def writer(step: int, fill: float = 1.0, **more: Any) -> Callable[[Path], None]:
    """Writes the files of a checkpoint; fill: of its weights; more: of the trainer's state."""

    def write(folder: Path) -> None:
        save_file({"weight": torch.full((500,), fill)}, folder / WEIGHTS)
        save_file({"weight.exp_avg": torch.ones(500)}, folder / "optimizer.safetensors")
        (folder / "config.json").write_text("{}")
        write_json(folder / "trainer_state.json", state_of(step, **more))

    return write
