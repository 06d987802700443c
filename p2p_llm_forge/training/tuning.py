"""How a loaded model is tuned where nothing else is given: rate, epochs, warm-up and schedule.

Measured by benchmarks/tuning_rates.py on bases 128 and 256 wide. From there rates fall with the
width to what is usual for bases 4096 wide: 2e-5 in full, 2e-4 by LoRA. (That LoRA wants several
times the rate, whatever its rank: https://thinkingmachines.ai/blog/lora.)
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import counted
from p2p_llm_forge.files import read_json
from p2p_llm_forge.model.lora import base_of, is_adapter_folder
from p2p_llm_forge.shapes import is_positive

WARMUP = 0.05  # of the updates
SCHEDULE = "linear"
WIDTH, LARGE = 256, 4096  # of the bases that were measured; and where a base says nothing
WIDTHS = ("hidden_size", "n_embd", "d_model")  # what families call it


@dataclass(frozen=True)
class Defaults:
    """What one kind of tuning takes. rate: the peak by AdamW of a base that is 256 wide."""

    rate: float
    power: float  # of the width, by which the rate falls
    epochs: float

    def rate_at(self, width: int | None) -> float:
        return float(f"{self.rate * (WIDTH / (width or LARGE)) ** self.power:.2g}")


FULL, LORA = Defaults(1e-3, 1.4, 2.0), Defaults(5e-3, 1.1, 3.0)


def defaults_of(config: TrainConfig) -> Defaults:
    """Those of LoRA, or of tuning every weight."""
    return LORA if config.lora_rank else FULL


def as_tuned(config: TrainConfig, begun: dict[str, Any]) -> TrainConfig:
    """The configuration with a schedule and epochs where none were given: as the run has begun.

    begun: the settings of its newest checkpoint, if it has one.
    """
    usual: dict[str, Any] = {"epochs": defaults_of(config).epochs, "lr_scheduler": SCHEDULE}
    if "warmup_steps" in begun:  # older versions wrote down None, and took none, for none given
        usual |= {"lr_scheduler": begun.get("lr_scheduler"), "warmup_steps": begun["warmup_steps"]}
        usual["warmup_steps"] = usual["warmup_steps"] or 0
        if not (begun.get("max_steps") or begun.get("minutes")):
            usual["epochs"] = begun.get("epochs")
    if config.max_steps or config.minutes:
        del usual["epochs"]
    return replace(
        config, **{name: one for name, one in usual.items() if getattr(config, name) is None}
    )


def with_warmup(config: TrainConfig, updates: int) -> TrainConfig:
    """The configuration of a loaded model with a warm-up that suits so many updates."""
    if not config.model_name or config.warmup_steps is not None:
        return config
    return replace(config, warmup_steps=math.ceil(WARMUP * updates))


def width_of(model_name: str) -> int | None:
    """How wide the layers of a model are, in a folder or on the Hub; None where it does not say."""
    try:
        folder = Path(model_name)
        if is_adapter_folder(folder):
            return width_of(base_of(folder))
        path = folder / "config.json"
        if not folder.is_dir():
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(model_name, path.name))
        facts = read_json(path, dict)
    except Exception:  # a model that cannot be read is refused where it is loaded
        return None
    facts = {**facts, **(facts.get("text_config") or {})}
    return next((facts[key] for key in WIDTHS if is_positive(facts.get(key))), None)


def in_words(config: TrainConfig) -> str:
    """How the loaded model is tuned, for a person."""
    rank = config.lora_rank
    how = f"by LoRA of rank {rank}" if rank else "in full"
    passes = "" if config.epochs is None else f", {config.epochs:g} passes over the blocks"
    passes = passes.replace("1 passes", "1 pass") if config.epochs == 1 else passes
    warmup = counted(config.warmup_steps or 0, "update")
    return (
        f"tuning    {how}{passes}; warm-up of {warmup}, then {config.lr_scheduler or 'cosine'}"
        " (--epochs, --warmup-steps, --lr-scheduler)"
    )
