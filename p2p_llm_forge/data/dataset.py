"""A prepared dataset: its manifest, how it is put in its folder, and how it is opened."""

from __future__ import annotations

import shutil
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from p2p_llm_forge.data.blocks import PREPARE_AGAIN, STATE, Blocks
from p2p_llm_forge.data.splits import TRAIN, VALIDATION
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import fingerprint, fsync, read_json, sha256_of, write_json

FORMAT_VERSION = 3
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # the folder inside the output folder where a dataset grows
TOKENIZER = "tokenizer"
DATASET_DICT = "dataset_dict.json"


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    bytes: UTF-8 bytes of the text of just the tokens in the blocks. EOS stands for no text, and
    the separators between documents count nowhere, so bits per byte pays for predicting the ends
    of documents without being credited for them: never too low. dropped_tokens: the tail of the
    split that fills no block; its bytes are not counted. left_out_tokens: by a mixture's weights.
    """

    documents: int
    blocks: int
    tokens: int
    bytes: int
    dropped_tokens: int
    left_out_tokens: int = 0


@dataclass(frozen=True)
class Manifest:
    """What a prepared dataset is and from what it was made; written last, so it proves the rest.

    It holds no time, machine or absolute path: the same input and arguments give the same bytes.
    What follows the arguments is known at the end: files are size and SHA-256 of every other file,
    skipped_rows the bad rows that were left out.
    """

    sequence_length: int
    vocab_size: int
    eos_token_id: int
    dtype: str
    tokenizer_fingerprint: str
    arguments: dict[str, Any]
    splits: dict[str, SplitFacts] = field(default_factory=dict)
    content_fingerprint: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped_rows: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Identifies the blocks: equal for two datasets that hold the same (64 hex digits)."""
        content = asdict(self) | {"arguments": None, "files": None}
        # Names of files may differ where the text does not; the rest is in the fields already
        # but for how documents were divided.
        for key in ("seed", "validation_fraction", "document_separator", "encoding_errors"):
            content[key] = self.arguments.get(key)
        return fingerprint(content)

    def save(self, folder: Path) -> Manifest:
        """Write the manifest into `folder`, with the files that are there; return it."""
        files: dict[str, dict[str, Any]] = {}
        for path in filter(Path.is_file, folder.rglob("*")):
            facts = {"bytes": path.stat().st_size, "sha256": sha256_of(path)}
            files[path.relative_to(folder).as_posix()] = facts
        complete = replace(self, files=files)
        write_json(folder / MANIFEST, asdict(complete))
        return complete

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest in `folder`. Raises ForgeError when there is none that can be read."""
        path = folder / MANIFEST
        try:
            content = read_json(path)
            if content["format_version"] != FORMAT_VERSION:
                versions = f"{content['format_version']}, this program reads {FORMAT_VERSION}"
                raise ForgeError(f"{path} has format version {versions}", PREPARE_AGAIN)
            splits = {name: SplitFacts(**facts) for name, facts in content.pop("splits").items()}
            return cls(splits=splits, **content)
        except FileNotFoundError as error:
            is_unfinished = (folder / UNFINISHED).exists()
            what = "a preparation that did not finish" if is_unfinished else f"no {MANIFEST}"
            found = f"{folder} is not a prepared dataset: found {what}"
            raise ForgeError(
                found if folder.exists() else f"{folder}: no such folder",
                f"prepare it: python prepare_data.py --dataset-path TEXT --output-dir {folder}",
            ) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"{path} cannot be read as a manifest: {error}"
            raise ForgeError(found, PREPARE_AGAIN) from error


def publish(finished: Path, folder: Path) -> None:
    """Move a dataset from `finished`, inside `folder`, to its place there; replace an older one.

    At any moment `folder` holds a manifest only if it holds the whole dataset that it describes.
    """
    for path in finished.rglob("*"):
        fsync(path)
    (folder / MANIFEST).unlink(missing_ok=True)
    fsync(folder)
    for name in (TRAIN, VALIDATION, TOKENIZER):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / DATASET_DICT).unlink(missing_ok=True)
    *parts, manifest = sorted(finished.iterdir(), key=lambda path: path.name == MANIFEST)
    for path in parts:
        path.rename(folder / path.name)
    fsync(folder)
    manifest.rename(folder / MANIFEST)
    fsync(folder)


def looks_like_prepared(path: str | Path) -> bool:
    """Whether `path` is meant as a prepared dataset, complete or not, rather than as text."""
    return any(Path(path, mark).exists() for mark in (MANIFEST, UNFINISHED, DATASET_DICT, STATE))


def open_prepared(path: str | Path) -> PreparedDataset:
    """Open a prepared dataset; its blocks stay on disk. Raises ForgeError when it is not one."""
    return PreparedDataset(Path(path), Manifest.load(Path(path)))


@dataclass(frozen=True)
class PreparedDataset:
    """A prepared dataset on disk."""

    path: Path
    manifest: Manifest

    @property
    def tokenizer_dir(self) -> Path:
        """The tokenizer, as `AutoTokenizer.from_pretrained` reads it."""
        return self.path / TOKENIZER

    def blocks(self, split: str) -> Blocks | None:
        """The blocks of `train` or `validation`; None when the dataset has no such split."""
        manifest, folder = self.manifest, self.path / split
        if split not in manifest.splits:
            return None
        blocks = Blocks(folder, manifest.sequence_length, manifest.eos_token_id)
        promised = manifest.splits[split].blocks
        if len(blocks) != promised:
            found = f"{folder} holds {len(blocks)} blocks where the manifest promises {promised}"
            raise ForgeError(found, PREPARE_AGAIN)
        return blocks

    def train_blocks(self) -> Blocks:
        """The blocks to learn from. Raises ForgeError when the dataset has none."""
        blocks = self.blocks(TRAIN)
        if not blocks:
            raise ForgeError(f"{self.path} has no blocks to train on", "prepare a longer text")
        return blocks
