"""What a run learns from, and the folder that it writes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar, Literal

from p2p_llm_forge.config.fields import Options, flag, require_at_least
from p2p_llm_forge.errors import Problems


@dataclass
class DataOptions(Options):
    """What a run learns from, and the folder that it writes."""

    _argument_group_name = "data and output"
    PER_RANK: ClassVar[tuple[str, ...]] = ("dataset_path", "output_dir", "tokenizer")

    dataset_path: str = flag(
        "",
        "folder made by prepare_data.py, or a text file, which is prepared first",
        "--dataset_name",
    )
    output_dir: str = flag("", "folder of the run: checkpoints, figures, the final model")
    tokenizer: str | None = flag(
        None, "for a text file: tokenizer to use; without it that of --model-name, or a new one"
    )
    vocab_size: int = flag(8192, "for a text file: entries of a tokenizer that is trained on it")
    encoding_errors: Literal["strict", "replace"] = flag(
        "strict", "for a text file: bytes that are not UTF-8 are refused, or replaced by U+FFFD"
    )
    sequence_length: int | None = flag(
        None,
        "tokens in a block; must be that of the prepared data; default for a text file: 256",
        "--block_size",
    )

    def check(self, problems: Problems) -> None:
        problems.require(
            bool(self.dataset_path),
            "no data given",
            "add --dataset-path FOLDER (made by prepare_data.py) or a text file",
        )
        require_at_least(2, self, problems, "sequence_length")
