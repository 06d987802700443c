"""What is asked of a preparation: its text and arguments, and whether that dataset is there."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import readers, sources
from p2p_llm_forge.data.dataset import MANIFEST, UNFINISHED, Manifest
from p2p_llm_forge.data.parts import Part, ReadOptions
from p2p_llm_forge.data.pieces import digest_of
from p2p_llm_forge.data.sources import Found
from p2p_llm_forge.data.tokenizer import tokenizer_fingerprint
from p2p_llm_forge.data.tokenizing import in_order
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import fingerprint


@dataclass(frozen=True)
class Preparation:
    """A preparation that is asked for, and the text that was found for it."""

    config: PrepareConfig
    found: Found

    @classmethod
    def of(cls, config: PrepareConfig) -> Preparation:
        """Find the text, in the order given. Raises ForgeError for what is no text."""
        options = ReadOptions.of(config)
        found = sources.find(config.dataset_path, options)
        if not found.parts:
            raise ForgeError(
                f"{', '.join(config.dataset_path)}: the file is empty, there is no text to prepare",
                "give a file that holds text",
            )
        if config.validation_path:
            held_out = sources.find(config.validation_path, options, validation=True)
            found = dataclasses.replace(
                found,
                parts=found.parts + held_out.parts,
                unreadable=found.unreadable + held_out.unreadable,
            )
        return cls(config, found)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def folder(self) -> Path:
        """Where the dataset grows until it is finished."""
        return self.output_dir / UNFINISHED

    @cached_property
    def read_options(self) -> ReadOptions:
        """How the files are read."""
        return ReadOptions.of(self.config)

    @property
    def validation_fraction(self) -> float:
        """The part of the documents that is held out: none where other text is given for that."""
        return 0.0 if self.config.validation_path else self.config.validation_fraction

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments that decide what the dataset holds; paths by their last part only."""
        config, tokenizer = self.config, self.config.tokenizer
        if tokenizer and Path(tokenizer).exists():
            tokenizer = Path(tokenizer).resolve().name
        return {
            "dataset_path": [Path(path).name for path in config.dataset_path],
            "weights": [sources.split_weight(path)[1] for path in config.dataset_path],
            "validation_path": [Path(path).name for path in config.validation_path],
            "document_separator": config.separator(),
            "one_document_per_file": config.one_document_per_file,
            "text_column": config.text_column,
            "dataset_config": config.dataset_config,
            "dataset_split": config.dataset_split,
            "skip_bad_rows": config.skip_bad_rows,
            "encoding_errors": config.encoding_errors,
            "eos_token": config.eos_token,
            "seed": config.seed,
            "sequence_length": config.sequence_length,
            "tokenizer": tokenizer,
            "validation_fraction": self.validation_fraction,
            "vocab_size": None if config.tokenizer else config.vocab_size,
        }

    def text_fingerprint(self) -> str:
        """The fingerprint of the text as it stands now; reads all of it."""

        def digests(part: Part) -> list[str]:
            pieces = readers.read_pieces(part, self.read_options)
            return [digest_of(piece.column) for piece in pieces]

        of_parts = in_order(digests, self.found.parts, self.config.workers())
        return fingerprint([digest for part in of_parts for digest in part])


# --- is it there already? -------------------------------------------------------------------------


def already_prepared(preparation: Preparation, tokenizer: Any) -> Manifest | None:
    """The manifest of the dataset in the output folder, if it is what would be made now.

    tokenizer: None where one is to be trained. None means that the dataset may be made there: the
    folder is new or empty, holds what a preparation left unfinished, or `--overwrite` allows to
    replace the dataset in it. Raises ForgeError when the folder holds anything else.
    """
    output_dir = preparation.output_dir
    if output_dir.exists() and not output_dir.is_dir():
        raise ForgeError(f"--output-dir {output_dir} is a file", "give another folder")
    if not output_dir.exists() or not any(output_dir.iterdir()):
        return None
    if not (output_dir / MANIFEST).exists():
        if preparation.folder.exists():
            return None
        raise ForgeError(
            f"--output-dir {output_dir} is not empty and holds no prepared dataset",
            "give another folder",
        )
    if preparation.config.overwrite:
        return None
    there = Manifest.load(output_dir)
    differences = _differences(there, preparation, tokenizer)
    if differences:
        raise ForgeError(
            f"--output-dir {output_dir} holds another dataset ({'; '.join(differences)})",
            "give a new folder, or --overwrite to replace it",
        )
    return there


def _differences(there: Manifest, preparation: Preparation, tokenizer: Any) -> list[str]:
    """In what a dataset differs from the one that is asked for, in words."""
    asked = preparation.arguments
    differences = [
        f"{name}: {there.arguments.get(name)!r} there, {asked[name]!r} asked"
        for name in asked
        # What the names of files and tokenizers mean is compared below.
        if name not in ("dataset_path", "validation_path", "tokenizer")
        and there.arguments.get(name) != asked[name]
    ]
    trained_there = there.arguments.get("tokenizer") is None
    if trained_there != (tokenizer is None) or (
        tokenizer is not None and tokenizer_fingerprint(tokenizer) != there.tokenizer_fingerprint
    ):
        differences.append("another tokenizer")
    if not differences and there.content_fingerprint != preparation.text_fingerprint():
        differences.append("made from another text")
    return differences
