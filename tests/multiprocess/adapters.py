"""A small model that was trained before, and the flags of runs that adapt it to another text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from tests.runs import finish, loaded
from tests.texts import write_text

LORA: dict[str, Any] = {
    **{"model_type": None, "config_overrides": None, "lora_rank": 4, "lora_targets": "all-linear"},
    **{"optimizer": "adamw", "learning_rate": 1e-2, "mixed_precision": "no"},
    **{"warmup_steps": 0, "lr_scheduler": "cosine"},
}


def prepare_other_text(folder: Path, tokenizer: Path) -> Path:
    """Another text in the words of the first."""
    from p2p_llm_forge.config import PrepareConfig
    from prepare_data import prepare

    folder.mkdir()
    text = write_text(folder / "other.txt", documents=120, seed=7)
    text.write_text(text.read_text().replace("bread", "bread and nets").replace("Mara", "Ines"))
    prepare(
        PrepareConfig(
            dataset_path=[str(text)],
            output_dir=str(folder / "data"),
            tokenizer=str(tokenizer),
            sequence_length=32,
            validation_fraction=0.1,
        )
    )
    return folder / "data"


def train_base(zygote: Any, data: Path, folder: Path) -> Path:
    """A model that knows the first text a little."""
    return finish(zygote, data, folder, 1, max_steps=60, learning_rate=1e-2, lora_rank=None)


def adapters(folder: Path, step: int) -> dict:
    """Adapters and optimizer state of a checkpoint, which holds no weights of the base."""
    saved = folder / f"checkpoint-{step}"
    assert not (saved / "model.safetensors").exists() and not (saved / "config.json").exists()
    optimizer = loaded(saved / "optimizer.safetensors")
    assert all(".lora_" in name for name in optimizer)
    found = loaded(saved / "adapter_model.safetensors")
    return found | {f"optimizer: {key}": tensor for key, tensor in optimizer.items()}
