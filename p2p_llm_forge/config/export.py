"""ExportConfig: all that export.py can be asked."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from p2p_llm_forge.config.fields import Options, flag
from p2p_llm_forge.config.generate import ModelOptions


@dataclass
class FileOptions(Options):
    """The file that is written."""

    heading = "file"
    COMMON = ["output_file", "dtype", "overwrite"]

    output_file: str | None = flag(
        None, "the GGUF file (default: named after the model, in its folder)", "--outfile"
    )
    dtype: Literal["f16", "f32"] = flag(
        "f16", "how matrices are stored; f16: half the size", "--outtype"
    )
    overwrite: bool = flag(False, "replace the file if it is there already")


@dataclass
class ExportConfig(FileOptions, ModelOptions):
    """Write a model as a GGUF file, which llama.cpp, ollama and LM Studio run."""

    GROUPS = [ModelOptions, FileOptions]
