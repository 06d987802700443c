"""What a run shows of itself: options of train.py."""

from __future__ import annotations

from dataclasses import dataclass

from p2p_llm_forge.config.fields import Options, flag


@dataclass
class ShowingOptions(Options):
    """What a run shows of itself, beside metrics.jsonl."""

    heading = "showing"
    PER_RANK = ["report_to", "pictures", "sample_prompt"]
    COMMON = ["report_to", "sample_prompt"]

    report_to: str = flag(
        "tensorboard",
        "trackers beside metrics.jsonl, comma-separated, or none; tensorboard, wandb, trackio, ...",
    )
    pictures: bool = flag(True, "draw loss.png and peers.png, where matplotlib is installed")
    sample_prompt: list[str] = flag(
        [], "texts, each in quotes, that samples at every evaluation continue; default: none"
    )

    def prompts(self) -> list[str]:
        """The texts that samples continue; an empty one begins a document."""
        return self.sample_prompt or [""]
