"""What is asked of a preparation: its text and arguments, and whether that dataset is there."""

from __future__ import annotations

import os
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import chat_template, sources
from p2p_llm_forge.data.chat_template import ChatTemplate
from p2p_llm_forge.data.dataset import ANOTHER_TEXT, MANIFEST, UNFINISHED, Manifest
from p2p_llm_forge.data.kinds_of_rows import are_conversations
from p2p_llm_forge.data.parts import Part, ReadOptions
from p2p_llm_forge.data.pieces import digest_of
from p2p_llm_forge.data.readers import read_pieces
from p2p_llm_forge.data.splits import TRAIN, VALIDATION
from p2p_llm_forge.data.tokenizer import padding_of, tokenizer_fingerprint
from p2p_llm_forge.errors import ForgeError, counted
from p2p_llm_forge.files import fingerprint
from p2p_llm_forge.shapes import is_number

# Arguments that decide what the dataset holds, just as they are given.
DECIDING = (
    *("one_document_per_file", "text_column", "dataset_config", "dataset_split", "skip_bad_rows"),
    *("encoding_errors", "eos_token", "seed", "sequence_length"),
    *("csv_delimiter", "deduplicate", "min_document_tokens", "max_document_tokens"),
)


@dataclass(frozen=True)
class Preparation:
    """A preparation that is asked for, and the text that was found for it (see `Found`)."""

    config: PrepareConfig
    read_options: ReadOptions
    parts: list[Part]
    weights: tuple[float, ...]
    unreadable: int
    left_out: Counter[str] = field(default_factory=Counter)
    left_out_folders: list[Path] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)  # on how rows are read

    @classmethod
    def of(cls, config: PrepareConfig) -> Preparation:
        """Find the text, in the order given. Raises ForgeError for what is no text."""
        options = ReadOptions.of(config)
        output = Path(config.output_dir)
        found = sources.find(config.dataset_path, options, output_dir=output)
        if not found.parts and found.unreadable:
            raise ForgeError(
                f"{', '.join(config.dataset_path)}: left out "
                f"{counted(found.unreadable, 'file')} that cannot be read (--skip-bad-rows), so "
                "there is no text to prepare",
                "copy or download them again, or give other files",
            )
        if not found.parts:
            raise ForgeError(
                f"{', '.join(config.dataset_path)}: the file is empty, there is no text to prepare",
                "give a file that holds text",
            )
        held_out = sources.find(config.validation_path, options, True, output)
        parts, unreadable = found.parts + held_out.parts, found.unreadable + held_out.unreadable
        left_out = found.left_out + held_out.left_out
        not_read = sorted({*found.left_out_folders, *held_out.left_out_folders})
        is_one, notes = are_conversations(parts, config, options)
        if is_one:
            options = replace(options, train_on=config.trained)
        return cls(config, options, parts, found.weights, unreadable, left_out, not_read, notes)

    @property
    def output_dir(self) -> Path:
        return Path(self.config.output_dir)

    @property
    def folder(self) -> Path:
        """Where the dataset grows until it is finished."""
        return self.output_dir / UNFINISHED

    @property
    def validation_fraction(self) -> float:
        """The part of the documents that is held out: none where other text is given for that."""
        return 0.0 if self.config.validation_path else self.config.validation_fraction

    @property
    def splits(self) -> tuple[str, ...]:
        has_validation = self.validation_fraction or self.config.validation_path
        return (TRAIN, VALIDATION) if has_validation else (TRAIN,)

    @property
    def tokenizer_arguments(self) -> dict[str, Any] | None:
        """The arguments of `load_tokenizer`; None when a tokenizer is to be trained."""
        config = self.config
        options = {"trust_remote_code": config.trust_remote_code, "eos_token": config.eos_token}
        return options | {"name": config.tokenizer} if config.tokenizer is not None else None

    def template(self, tokenizer: Any) -> ChatTemplate | None:
        """What makes text of conversations; None where there are none. Raises ForgeError."""
        if not self.read_options.train_on:
            return None
        return ChatTemplate.of(tokenizer, self.config.chat_template)

    def conversations(self, tokenizer: Any) -> dict[str, Any] | None:
        """What decides how conversations become blocks; None: there are none.

        tokenizer: None where one is to be trained.
        """
        if not self.read_options.train_on:
            return None
        template, _ = chat_template.text_of(tokenizer, self.config.chat_template)
        found = {
            "train_on": self.read_options.train_on,
            "chat_template": chat_template.sha256_of(template),
            "long_conversations": self.config.long_conversations,
        }
        return found if tokenizer is None else found | {"padding": padding_of(tokenizer)}

    @property
    def whole_files(self) -> list[str] | None:
        """The kinds of files that are one document each without being asked for; None: no file."""
        kinds = {part.kind for part in self.parts}
        return [kind for kind in ("code", "markdown") if kind in kinds] or None

    @cached_property
    def arguments(self) -> dict[str, Any]:
        """The arguments that decide what the dataset holds; paths by their last part only."""
        config, tokenizer = self.config, self.config.tokenizer
        if tokenizer and Path(tokenizer).exists():
            tokenizer = Path(tokenizer).resolve().name
        of_conversations = {
            "train_on": self.read_options.train_on,
            "long_conversations": self.config.long_conversations,
            "chat_template": name_of(config.chat_template) if config.chat_template else None,
        }
        return {
            "dataset_path": [
                name_of(sources.split_weight(path)[0]) for path in config.dataset_path
            ],
            "weights": list(self.weights or (None,) * len(config.dataset_path)),
            "validation_path": [name_of(path) for path in config.validation_path],
            "document_separator": config.separator(),
            "one_document_each": self.whole_files,
            "tokenizer": tokenizer,
            "validation_fraction": self.validation_fraction,
            "vocab_size": None if config.tokenizer else config.vocab_size,
            **{name: getattr(config, name) for name in DECIDING},
            **(of_conversations if self.read_options.train_on else {}),
        }

    def text_fingerprint(self) -> str:
        """The fingerprint of the text as it stands now; reads all of it."""

        def digests(part: Part) -> list[str]:
            return [digest_of(piece.column) for piece in read_pieces(part, self.read_options)]

        with ThreadPoolExecutor(self.config.workers()) as pool:
            return fingerprint([digest for of in pool.map(digests, self.parts) for digest in of])


def name_of(path: str) -> str:
    """The last part of a path, as it can be written: bytes that are not UTF-8 become U+FFFD."""
    return os.fsencode(Path(path).name).decode(errors="replace")


def already_prepared(preparation: Preparation, tokenizer: Any) -> Manifest | None:
    """The manifest of the dataset in the output folder, if it is what would be made now.

    tokenizer: None where one is to be trained. None means that the dataset may be made there: the
    folder is new or empty, holds what a preparation left unfinished, or `--overwrite` allows to
    replace the dataset in it. Raises ForgeError when the folder holds anything else.
    """
    output_dir = preparation.output_dir
    if output_dir.exists() and not output_dir.is_dir():
        raise ForgeError(f"--output-dir {output_dir} is a file", "give another folder")
    names = {path.name for path in output_dir.iterdir()} if output_dir.exists() else set()
    if MANIFEST not in names:
        if not names or UNFINISHED in names:
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


def _are_same_shares(there: Any, asked: Any) -> bool:
    """Whether weights are the same mixture: earlier versions have recorded them as typed."""
    if not isinstance(there, list) or len(there) != len(asked):
        return False
    if not all(is_number(weight) and weight > 0 for weight in [*there, *asked]):
        return False
    return bool(np.allclose(sources.shares_of(there), asked, rtol=1e-9, atol=0))


def _differences(there: Manifest, preparation: Preparation, tokenizer: Any) -> list[str]:
    """In what a dataset differs from the one that is asked for, in words."""
    differences = [
        f"{name}: {there.arguments.get(name)!r} there, {asked!r} asked"
        for name, asked in preparation.arguments.items()
        # What the names of files and tokenizers mean is compared below.
        if name not in ("dataset_path", "validation_path", "tokenizer", "chat_template")
        and there.arguments.get(name) != asked
        and not (name == "weights" and _are_same_shares(there.arguments.get(name), asked))
    ]
    was_trained = there.arguments.get("tokenizer") is None
    if was_trained != (tokenizer is None) or (
        tokenizer is not None and tokenizer_fingerprint(tokenizer) != there.tokenizer_fingerprint
    ):
        differences.append("another tokenizer")
    asked_of, known = preparation.conversations(tokenizer) or {}, there.conversations or {}
    if not differences and any(known.get(name) != asked for name, asked in asked_of.items()):
        differences.append("another chat template")
    if not differences and there.content_fingerprint != preparation.text_fingerprint():
        differences.append(ANOTHER_TEXT)
    return differences
