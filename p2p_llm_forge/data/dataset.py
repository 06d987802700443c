"""A prepared dataset: its manifest, how it is put in its folder, and how it is opened."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

from p2p_llm_forge.config.train import LONGEST_BLOCK
from p2p_llm_forge.data.blocks import PREPARE_AGAIN, STATE, Blocks
from p2p_llm_forge.data.splits import TRAIN, VALIDATION, SplitCounts
from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.files import (
    erase,
    files_in,
    fingerprint,
    fsync,
    parse_json,
    read_json,
    sha256_of,
    write_file,
)
from p2p_llm_forge.shapes import is_count, is_number, is_path_inside, is_positive, require_shape

FORMAT_VERSION = 4
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # the folder inside the output folder where a dataset grows
COMING = "fetched-"  # in the unfinished folder: what has come from another machine, see fetched.py
TOKENIZER = "tokenizer"
DATASET_DICT = "dataset_dict.json"
FETCHED = "fetched.json"  # of which manifest it is true that the dataset came from a peer
REPLACED = "replaced.json"  # in the unfinished folder: the manifest of what is being replaced
ANOTHER_TEXT = "made from another text"  # among the differences to what is asked for
NO_DIGEST = b'"digest": ""'
NEW_FOLDER = "prepare the text into a new folder: --overwrite replaces only what a manifest names"
TRUST_CODE = "read that code and, only if you trust it, add --trust-remote-code"

# Arguments that choose documents, in the dataset's fingerprint.
DECIDES_DOCUMENTS = (
    *("encoding_errors", "deduplicate", "min_document_tokens", "max_document_tokens"),
)
COUNTS = ("documents", "bytes", "tokens", "dropped_tokens", "left_out_tokens")
SPLIT_SHAPE = {
    **dict.fromkeys((*COUNTS, "blocks"), is_count),
    "trained_tokens": (None, is_count),
}
SOURCE_SHAPE = {
    **dict.fromkeys((*COUNTS, "left_out_documents"), is_count),
    **{"name": str, "weight": (None, is_number)},
}
FILES_SHAPE = {str: {"bytes": is_count, "sha256": str}}
OF_ANY_VERSION = {
    **{"format_version": is_count, "files": FILES_SHAPE},
    **{"splits": dict, "tokenizer_fingerprint": str},
}
SHAPE = {
    "sequence_length": lambda length: is_positive(length) and length <= LONGEST_BLOCK,
    "vocab_size": lambda size: is_positive(size) and size <= 2**32,
    **{"eos_token_id": is_count, "skipped_rows": is_count, "dtype": str},
    **{"tokenizer_fingerprint": str, "content_fingerprint": str, "arguments": dict},
    **{"splits": {TRAIN: SPLIT_SHAPE, str: SPLIT_SHAPE}, "files": FILES_SHAPE, "digest": str},
    "sources": [SOURCE_SHAPE],
    "left_out": {str: dict.fromkeys(("documents", "bytes", "tokens"), is_count)},
    "conversations": (None, dict),
}


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    bytes: UTF-8 bytes of the text of just the tokens in the blocks. EOS stands for no text, and
    the separators between documents count nowhere, so bits per byte pays for predicting the ends
    of documents without being credited for them: never too low. dropped_tokens: the tail of the
    split that fills no block; its bytes are not counted. left_out_tokens: by a mixture's weights.
    trained_tokens: of conversations those that count in the loss, and then `bytes` are those of
    their text alone; None: all.
    """

    documents: int
    blocks: int
    tokens: int
    bytes: int
    dropped_tokens: int
    left_out_tokens: int = 0
    trained_tokens: int | None = None

    @property
    def trained(self) -> int:
        """Tokens that count in the loss."""
        return self.tokens if self.trained_tokens is None else self.trained_tokens


@dataclass(frozen=True)
class SourceFacts:
    """What one --dataset-path has given to the split to train on, counted as in `SplitFacts`.

    name: the last part of the path; weight: its share as it was asked for, of 1; None: no mixture.
    left_out_documents: of its text, by their length or because of others (see `Manifest.left_out`).
    """

    name: str
    weight: float | None
    documents: int
    bytes: int
    tokens: int
    dropped_tokens: int
    left_out_tokens: int
    left_out_documents: int = 0

    @property
    def found(self) -> int:
        """Tokens to train on that it has, taken or not."""
        return self.tokens + self.dropped_tokens + self.left_out_tokens


@dataclass(frozen=True)
class Manifest:
    """What a prepared dataset is and from what it was made; written last, so it proves the rest.

    It holds no time, machine or absolute path: the same input and arguments give the same bytes.
    In its file it proves itself too: `digest` there is the SHA-256 of that file without it.
    What follows the arguments is known at the end: files are size and SHA-256 of every other file,
    skipped_rows the bad rows that were left out, left_out the documents, by the reason.
    conversations: what decides how they became tokens and marks; None: text.
    """

    sequence_length: int
    vocab_size: int
    eos_token_id: int
    dtype: str
    tokenizer_fingerprint: str
    arguments: dict[str, Any]
    splits: dict[str, SplitFacts] = field(default_factory=dict)
    sources: list[SourceFacts] = field(default_factory=list)
    content_fingerprint: str = ""
    files: dict[str, dict[str, Any]] = field(default_factory=dict)
    skipped_rows: int = 0
    left_out: dict[str, SplitCounts] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION
    conversations: dict[str, Any] | None = None

    def share_trained(self, split: str) -> float:
        """Of the tokens in the blocks of a split, those that count in the loss; of text all."""
        facts = self.splits[split]
        if self.conversations is None:
            return 1.0
        return facts.trained / max(1, facts.blocks * self.sequence_length)

    def content(self) -> dict[str, Any]:
        """All that it says, as JSON values; of text nothing of conversations."""
        content = asdict(self)
        if self.conversations is None:
            del content["conversations"]
        for facts in content["splits"].values():
            if facts["trained_tokens"] is None:
                del facts["trained_tokens"]
        return content

    @property
    def fingerprint(self) -> str:
        """Identifies the blocks: equal for two datasets that hold the same (64 hex digits)."""
        content = self.content() | {"arguments": None, "files": None}
        # Names of files may differ where the text does not, and so may what is a source but for
        # a mixture; the rest is in the fields already but for how documents were divided.
        for source in content["sources"]:
            source["name"] = None
        if not any(source.weight for source in self.sources):
            content["sources"] = None
        for key in ("seed", "validation_fraction", "document_separator", *DECIDES_DOCUMENTS):
            content[key] = self.arguments.get(key)
        return fingerprint(content)

    def save(self, folder: Path, known: Mapping[str, str] = MappingProxyType({})) -> Manifest:
        """Write the manifest into `folder`, with the files that are there; return it.

        known: the SHA-256 of files, by their names as in the manifest: they are not read again.
        """
        files: dict[str, dict[str, Any]] = {}
        for path in filter(Path.is_file, folder.rglob("*")):
            name = path.relative_to(folder).as_posix()
            digest = known.get(name) or sha256_of(path)
            files[name] = {"bytes": path.stat().st_size, "sha256": digest}
        complete = replace(self, files=files)
        write_file(folder / MANIFEST, sealed(complete.content()))
        return complete

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest in `folder`. Raises ForgeError when there is none that can be read."""
        path = folder / MANIFEST
        if folder.is_file():
            raise ForgeError(
                f"{folder} is a file, and a prepared dataset is a folder",
                f"give the folder in which prepare_data.py has written its {MANIFEST}",
            )
        # What no manifest names is never replaced.
        is_replaced = own_files(folder) is not None and not files_of_others(folder)
        fix = PREPARE_AGAIN if is_replaced else NEW_FOLDER
        try:
            text = path.read_bytes()
            content = parse_json(text)
            require_shape(content, dict)
            if content["format_version"] != FORMAT_VERSION:
                versions = f"{ascii(content['format_version'])[:60]}, this program reads"
                raise ForgeError(f"{path} has format version {versions} {FORMAT_VERSION}", fix)
            require_shape(content, SHAPE)
            if content["eos_token_id"] >= content["vocab_size"]:
                raise ValueError("its end of documents is not in its vocabulary")
            if not content["files"]:
                raise ValueError("it names no files")
            if not is_sealed(text, content.pop("digest")):
                raise ValueError("it was changed after it was written: its digest is another one")
            splits = {name: SplitFacts(**facts) for name, facts in content.pop("splits").items()}
            sources = [SourceFacts(**facts) for facts in content.pop("sources")]
            left_out = {why: SplitCounts(**of) for why, of in content.pop("left_out").items()}
            return cls(splits=splits, sources=sources, left_out=left_out, **content)
        except FileNotFoundError as error:
            raise _no_manifest(folder) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            found = f"{path} cannot be read as a manifest: {error}"
            raise ForgeError(found, fix) from error


def _no_manifest(folder: Path) -> ForgeError:
    """What lies there instead of a dataset."""
    found, what = f"{folder}: no such folder", f"no {MANIFEST}"
    fix = f"prepare it: python prepare_data.py --dataset-path TEXT --output-dir {folder}"
    if (folder / UNFINISHED).is_dir():
        what = "a preparation that did not finish"
        works = [path.name for path in (folder / UNFINISHED).iterdir() if path.is_dir()]
        if works and all(one.startswith(COMING) for one in works):
            what = "one that has not come whole from another machine"
            fix = f"start train.py together with the machine that has it: the rest comes; or {fix}"
    if folder.exists():
        found = f"{folder} is not a prepared dataset: found {what}"
    return ForgeError(found, fix)


def sealed(content: dict[str, Any]) -> bytes:
    """The file of a manifest, with its own digest in it, so that every changed byte is found."""
    text = json.dumps(content | {"digest": ""}, indent=2, sort_keys=True, ensure_ascii=False)
    blank = f"{text}\n".encode()
    digest = hashlib.sha256(blank).hexdigest()
    return blank.replace(NO_DIGEST, NO_DIGEST[:-1] + f'{digest}"'.encode(), 1)


def is_sealed(text: bytes, digest: str) -> bool:
    """Whether the file of a manifest is as it was written. digest: what it says of itself."""
    blank = text.replace(NO_DIGEST[:-1] + f'{digest}"'.encode(), NO_DIGEST, 1)
    return hashlib.sha256(blank).hexdigest() == digest


def publish(finished: Path, folder: Path) -> None:
    """Move a dataset from `finished`, inside `folder`, to its place there; replace an older one.

    At any moment `folder` holds a manifest only if it holds the whole dataset that it describes.
    Of an older one only what its manifest names is removed; meanwhile that lies in the parent of
    `finished`, so that `clear_half_published` can do the rest after a kill.
    """
    for path in finished.rglob("*"):
        fsync(path)
    names = own_files(folder)
    if names is not None:
        (folder / MANIFEST).rename(finished.parent / REPLACED)
        fsync(folder)
        erase(folder, {*names, FETCHED})
    *parts, manifest = sorted(finished.iterdir(), key=lambda path: path.name == MANIFEST)
    for path in parts:
        path.rename(folder / path.name)
    fsync(folder)
    manifest.rename(folder / MANIFEST)
    fsync(folder)


def own_files(folder: Path, manifest: str = MANIFEST) -> frozenset[str] | None:
    """The files that the manifest of a dataset of ours names, of any version; else None."""
    try:
        content = read_json(folder / manifest, OF_ANY_VERSION)
    except (OSError, ValueError):
        return None
    return frozenset(content["files"]) if all(map(is_path_inside, content["files"])) else None


def clear_half_published(folder: Path) -> None:
    """Remove what a run that was killed while it published has left beside its unfinished folder.

    The manifests there name it: that of the dataset that was replaced, and that of the new one.
    """
    if (folder / MANIFEST).exists():
        return
    unfinished = folder / UNFINISHED
    erase(folder, own_files(unfinished, REPLACED) or ())
    for place in unfinished.glob("dataset-*"):
        erase(folder, own_files(place) or ())
    folder.mkdir(exist_ok=True)


def files_of_others(folder: Path) -> list[str]:
    """What lies where a dataset is published, and what no manifest of ours names."""
    unfinished = folder / UNFINISHED
    own = set(own_files(folder) or ()) | set(own_files(unfinished, REPLACED) or ())
    for place in unfinished.glob("dataset-*"):
        own |= own_files(place) or set()
    parts = [folder / name for name in (TRAIN, VALIDATION, TOKENIZER)]
    there = [f"{part.name}/{name}" for part in parts for name in files_in(part)]
    there += [part.name for part in parts if part.is_symlink() or part.is_file()]
    there += [DATASET_DICT] if os.path.lexists(folder / DATASET_DICT) else []
    return sorted(set(there) - own)


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

    def load_tokenizer(self, trust_remote_code: bool = False) -> Any:
        """The tokenizer. Raises ForgeError where it cannot be read or is not that of the blocks."""
        from transformers import AutoTokenizer

        try:
            tokenizer = AutoTokenizer.from_pretrained(
                self.tokenizer_dir, trust_remote_code=trust_remote_code
            )
        except Exception as error:  # what transformers raises for damaged files is not one class
            if "trust_remote_code" in str(error) and not trust_remote_code:
                found = f"the tokenizer {self.tokenizer_dir} comes with its own Python code"
                raise ForgeError(found, TRUST_CODE) from error
            found = f"the tokenizer {self.tokenizer_dir} cannot be read ({in_one_line(error, 300)})"
            raise ForgeError(found, PREPARE_AGAIN) from error
        if tokenizer.eos_token_id != self.manifest.eos_token_id:
            found = f"the tokenizer {self.tokenizer_dir} is another one than that of the blocks: it"
            found = f"{found} ends documents with {tokenizer.eos_token_id}, not"
            raise ForgeError(f"{found} {self.manifest.eos_token_id}", PREPARE_AGAIN)
        return tokenizer

    def blocks(self, split: str) -> Blocks | None:
        """The blocks of `train` or `validation`; None when the dataset has no such split."""
        manifest, folder = self.manifest, self.path / split
        if split not in manifest.splits:
            return None
        blocks = Blocks(
            folder, manifest.sequence_length, manifest.eos_token_id, manifest.vocab_size
        )
        promised = manifest.splits[split].blocks
        if blocks.is_of_conversations != (manifest.conversations is not None):
            kinds = ("text", "conversations")[:: -1 if blocks.is_of_conversations else 1]
            found = f"{folder} holds {kinds[0]}, the manifest has {kinds[1]}"
            raise ForgeError(found, PREPARE_AGAIN)
        if any(str(chunk.dtype) != manifest.dtype for chunk in blocks.chunks):
            found = f"{folder} holds {blocks.chunks[0].dtype}, the manifest has dtype"
            raise ForgeError(f"{found} {manifest.dtype}", PREPARE_AGAIN)
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
