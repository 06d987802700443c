"""Runs of train.py for the tests that kill and signal them."""

from __future__ import annotations

import json
from pathlib import Path

from tests.conftest import TINY_MODEL


def flags(data: Path, folder: Path, **settings: object) -> list[str]:
    """The command line of a short run; `settings` by field names."""
    settings = {
        "dataset_path": data,
        "output_dir": folder,
        "config_overrides": TINY_MODEL,
        "batch_size": 8,
        "max_steps": 3,
        "report_to": "none",
        "cpu_threads": 1,
        "resume": "auto",
        **settings,
    }
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def tensors(folder: Path, step: int) -> dict:
    """Weights and optimizer state of a checkpoint."""
    from safetensors.torch import load_file

    found = {}
    for name in ("model.safetensors", "optimizer.safetensors"):
        loaded = load_file(folder / f"checkpoint-{step}" / name)
        assert loaded
        found |= {f"{name}: {key}": tensor for key, tensor in loaded.items()}
    return found


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    text = (folder / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert found
    clocked = ("tokens_per_second", "communication", "bytes_sent_per_update")
    return [{k: v for k, v in line.items() if k not in clocked} for line in found]
