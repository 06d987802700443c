"""Preparations for tests: of text of every kind, in pieces so small that a little text has many."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any
from unittest import mock

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import blocks, packing, parts
from tests.texts import some_text, write_rows

ROOT = Path(__file__).resolve().parents[2]


def make_pieces_small(set_attribute: Callable[[object, str, int], None] = setattr) -> None:
    """Many pieces of work, record batches and files, of which a small text would have one."""
    set_attribute(parts, "PIECE_BYTES", 3_000)
    set_attribute(blocks, "BATCH_BYTES", 1_000)
    set_attribute(blocks, "BATCHES_PER_SHARD", 4)


def write_text_of_every_kind(folder: Path) -> Path:
    """Text of every way of reading: cut by bytes, row by row, and as a stream."""
    (folder / "a.txt").write_bytes(some_text(200).encode())
    rows = some_text(300, seed=5).split("\n\n")
    write_rows(folder / "b.jsonl", rows[:100])
    write_rows(folder / "c.jsonl.gz", rows[100:200])
    write_rows(folder / "d.parquet", rows[200:240])
    return folder


def config(text: Path, folder: Path, **changes) -> PrepareConfig:
    """A small preparation of `text` into `folder`."""
    asked = {"dataset_path": [str(text)], "output_dir": str(folder), "sequence_length": 32}
    return PrepareConfig(**asked | {"vocab_size": 400, "validation_fraction": 0.2} | changes)


def with_tokenizer(path: object, folder: Path, tokenizer: Path, **changes) -> PrepareConfig:
    """A preparation of the text in `path`, or in several, with a tokenizer that is there."""
    paths = path if isinstance(path, list) else [str(path)]
    asked = {"dataset_path": paths, "output_dir": str(folder), "tokenizer": str(tokenizer)}
    return PrepareConfig(**asked | {"sequence_length": 8, "validation_fraction": 0.0} | changes)


def start(
    zygote: Any, text: Path, folder: Path, *more: str, pause_s: float = 0.0, **how
) -> tuple[int, Path]:
    """The script on its way, with the arguments of `config`; pause_s: before every piece.

    Returns its process id and the file with what it prints.
    """
    words = [str(pause_s), f"--dataset-path={text}", f"--output-dir={folder}"]
    words += ["--sequence-length=32", "--vocab-size=400", "--validation-fraction=0.2", *more]
    log = folder.with_name(f"{folder.name}.log")
    return zygote.start(words, log, script="tests.data.slow_preparation", **how), log


def interrupt(*_: object) -> None:
    """What to put in the place of a function at which the user interrupts."""
    raise KeyboardInterrupt


# Ends a preparation when all is tokenized.
BEFORE_PACKING = mock.patch.object(packing.Packer, "finish", interrupt)
