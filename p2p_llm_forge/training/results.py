"""What a run came to: the result that `train()` returns, and all_results.json."""

from __future__ import annotations

import shlex
from dataclasses import dataclass, fields
from pathlib import Path

from p2p_llm_forge.config.lora import CONFIG
from p2p_llm_forge.files import read_json
from p2p_llm_forge.shapes import is_count, is_flag
from p2p_llm_forge.training.numbers import duration
from p2p_llm_forge.training.run_record import LOSS

RESULTS = "all_results.json"
MODEL_CONFIGS = ("config.json", CONFIG)  # of a whole model, of adapters
SHAPE = {
    "output_dir": str,
    **dict.fromkeys(("steps", "tokens", "processes"), is_count),
    **dict.fromkeys(("discarded_updates",), (None, is_count)),
    **dict.fromkeys(("train_loss", "tokens_per_second", "communication"), (None, int, float)),
    **dict.fromkeys(("bytes_sent_per_update", "eval_loss", "perplexity"), (None, int, float)),
    **dict.fromkeys(("bits_per_byte", "token_accuracy", "mfu", "seconds"), (None, int, float)),
    **dict.fromkeys(("eval_loss_stderr", "bits_per_byte_stderr"), (None, int, float)),
    **dict.fromkeys(("eval_blocks", "eval_split_blocks"), (None, is_count)),
    "memory_peak_bytes": (None, is_count),
    "sample": (None, str),
    "is_published": (None, is_flag),
}


@dataclass(frozen=True)
class TrainResult:
    """The figures of a finished run; without validation data, some are None."""

    output_dir: str
    steps: int  # updates that count
    tokens: int  # of those updates
    train_loss: float | None  # nats per token, mean over the last --log-every updates
    tokens_per_second: float | None  # of all peers together, while updates were taken
    processes: int
    communication: float | None = None  # fraction of the time that the main process waited for it
    bytes_sent_per_update: float | None = None  # by the main process
    eval_loss: float | None = None  # nats per token
    perplexity: float | None = None
    bits_per_byte: float | None = None
    token_accuracy: float | None = None
    eval_blocks: int | None = None  # that those four are of, drawn by chance if not all
    eval_split_blocks: int | None = None  # of the whole split
    eval_loss_stderr: float | None = None  # of a sample, as an estimate for the whole split
    bits_per_byte_stderr: float | None = None
    sample: str | None = None
    discarded_updates: int = 0  # of rounds that were given up, which count nowhere else
    mfu: float | None = None  # model FLOPs utilisation of all peers, 0 to 1, of this session
    memory_peak_bytes: int | None = None  # of the process that held most, in this session
    seconds: float | None = None  # of this session, from its start
    is_published: bool = True  # whether the model lies beside these results

    @staticmethod
    def load(output_dir: Path) -> TrainResult | None:
        """The result that a finished run left in its folder; None if there is none of ours."""
        try:
            content = read_json(output_dir / RESULTS, SHAPE)
        except (OSError, ValueError):
            return None
        known = {field.name for field in fields(TrainResult)}
        return TrainResult(**content) if set(content) <= known else None

    @property
    def updates_taken(self) -> int:
        """All updates, also those that do not count."""
        return self.steps + self.discarded_updates

    @property
    def is_sampled(self) -> bool:
        """Whether the evaluation was of a part of the held-out blocks."""
        return (self.eval_blocks or 0) < (self.eval_split_blocks or 0)

    def summary(self) -> str:
        """The result for a person, in a few lines."""
        tokens = f" ({self.tokens:,} tokens)" if self.tokens else ""
        lines = [f"model     {self.output_dir} after {self.steps:,} updates{tokens}"]
        if self.discarded_updates:
            lines.append(f"discarded {self.discarded_updates:,} more updates, of rounds given up")
        if self.train_loss is not None:
            lines.append(f"training  loss {self.train_loss:.4f} nats per token")
        if self.tokens_per_second is not None:
            speed = f"{self.tokens_per_second:,.0f} tokens/s"
            used = "unknown" if self.mfu is None else f"{self.mfu:.1%}"
            lines.append(f"speed     {speed} over {self.processes} process(es), MFU {used}")
        if self.seconds is not None:
            most = self.memory_peak_bytes
            memory = f", at most {most / 1e9:.2f} GB of memory in a process" if most else ""
            lines.append(f"spent     {duration(self.seconds)}{memory}")
        if self.bytes_sent_per_update:
            sent = f"{self.bytes_sent_per_update / 1e6:.2f} MB/step from each peer"
            lines.append(f"network   communication {self.communication:.1%}, {sent}")
        if self.eval_loss is not None:
            perplexity = "infinite" if self.perplexity is None else f"{self.perplexity:,.1f}"
            loss, bits = with_error(self.eval_loss, self.eval_loss_stderr, 4), ""
            if self.bits_per_byte is not None:
                size = with_error(self.bits_per_byte, self.bits_per_byte_stderr, 3)
                bits = f", {size} bits per byte"
            lines.append(
                f"held out  loss {loss} nats per token, perplexity {perplexity}{bits},"
                f" {self.token_accuracy:.1%} of tokens guessed right"
            )
        if self.is_sampled:
            lines.append(
                f"sampled   {self.eval_blocks:,} of {self.eval_split_blocks:,} held-out blocks"
                " (± standard error); all of them: the same line with --eval-only"
            )
        if self.sample:
            lines.append(f"sample    {self.sample!r}")
        return "\n".join([*lines, *self._what_to_do_next()])

    def _what_to_do_next(self) -> list[str]:
        """Where to look, and what to type to read more of the model that lies there."""
        folder, lines = Path(self.output_dir), []
        if (folder / LOSS).is_file():
            lines.append(f"picture   {folder / LOSS}")
        if self.is_published and any((folder / name).is_file() for name in MODEL_CONFIGS):
            beside = Path(__file__).resolve().parents[2]  # a clone, or where packages lie
            script = "generate.py" if beside == Path.cwd() else str(beside / "generate.py")
            lines.append(f"write     python {shlex.join([script, self.output_dir])}")
        return lines


def with_error(value: float, error: float | None, digits: int) -> str:
    """A figure, and how far it may be off if it is an estimate: 1.234 ± 0.005."""
    return f"{value:.{digits}f}" + ("" if error is None else f" ± {error:.{digits}f}")
