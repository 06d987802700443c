"""From documents to packed blocks on disk and back: splits, tokens, blocks, manifest, reader."""

from __future__ import annotations

import bisect
import dataclasses
import hashlib
import io
import json
import os
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from p2p_llm_forge.data.columns import values_and_offsets
from p2p_llm_forge.errors import ForgeError

if TYPE_CHECKING:
    import numpy as np
    import pyarrow as pa

FORMAT_VERSION = 2
MANIFEST = "manifest.json"
UNFINISHED = "unfinished"  # the folder inside the output folder where a dataset grows
TRAIN, VALIDATION, TOKENIZER = "train", "validation", "tokenizer"
DATASET_DICT = "dataset_dict.json"

BATCH_BYTES = 4 << 20  # tokens in one record batch of an Arrow file
BATCHES_PER_SHARD = 128


# --- the splits ----------------------------------------------------------------------------------


def held_out(piece_number: int, documents: int, fraction: float, seed: int) -> np.ndarray:
    """Which of a piece's documents are for validation (bool): a seeded hash of each one's number.

    A document's number is its piece's number and its place there, so no worker needs to know what
    the others have counted. The hash is SplitMix64 (Steele, Lea and Flood, 2014).
    """
    import numpy as np

    if fraction == 0:
        return np.zeros(documents, bool)
    of_piece = _mixed(_mixed(np.array([seed % 2**64], np.uint64)) + np.uint64(piece_number))
    numbers = _mixed(of_piece + np.arange(documents, dtype=np.uint64))
    return numbers < np.uint64(int(fraction * 2**64))


def _mixed(numbers: np.ndarray) -> np.ndarray:
    """SplitMix64's step and finalizer on uint64, wrapping around."""
    import numpy as np

    numbers = numbers + np.uint64(0x9E3779B97F4A7C15)
    numbers = (numbers ^ (numbers >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    numbers = (numbers ^ (numbers >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return numbers ^ (numbers >> np.uint64(31))


# --- tokens of a piece ----------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitCounts:
    """What a piece adds to a split: documents, bytes of their text, tokens (EOS included)."""

    documents: int
    bytes: int
    tokens: int


@dataclass(frozen=True)
class EncodeOptions:
    """How documents become splits of tokens: what a worker must know besides the text."""

    encode: Callable[[pa.LargeBinaryArray], tuple[np.ndarray, np.ndarray]]
    eos_token_id: int
    dtype: str
    validation_fraction: float
    seed: int


def digest_of(column: pa.LargeBinaryArray) -> str:
    """A hash of documents, their text and their borders (XXH3, 128 bits)."""
    import xxhash

    # Not against forgers: it tells texts apart at 5 GB/s, where sha256 would take a seventh of all
    # the time that tokenizing takes.
    text, offsets = values_and_offsets(column)
    state = xxhash.xxh3_128(text.data)
    state.update(offsets.data)
    return state.hexdigest()


def encode_piece(
    number: int, column: pa.LargeBinaryArray, is_validation: bool, options: EncodeOptions
) -> tuple[np.ndarray, dict[str, SplitCounts]]:
    """Tokenize documents and divide them between the splits.

    number: seeds the choice of the documents that are held out; is_validation: all are. Returns
    the tokens of the documents to train on, then those of the others, and the splits' counts.
    """
    import numpy as np

    hidden = held_out(number, len(column), options.validation_fraction, options.seed)
    if is_validation:
        hidden[:] = True
    train = len(hidden) - int(hidden.sum())
    if 0 < train < len(hidden):
        # The documents are divided, not their tokens: that moves whole texts, not token by token.
        column = column.take(np.argsort(hidden, kind="stable"))
    tokens, lengths = options.encode(column)
    tokens = with_document_ends(tokens, lengths, options.eos_token_id, options.dtype)
    ends = values_and_offsets(column)[1]
    of_train = SplitCounts(train, int(ends[train]), int(lengths[:train].sum()) + train)
    others = SplitCounts(
        len(hidden) - train, int(ends[-1]) - of_train.bytes, len(tokens) - of_train.tokens
    )
    return tokens, {TRAIN: of_train, VALIDATION: others}


def with_document_ends(
    tokens: np.ndarray, lengths: np.ndarray, eos_token_id: int, dtype: str
) -> np.ndarray:
    """The documents' tokens with EOS after each document, as `dtype`."""
    import numpy as np

    joined = np.empty(len(tokens) + len(lengths), dtype)
    is_text = np.ones(len(joined), bool)
    ends = np.cumsum(lengths + 1) - 1
    is_text[ends] = False
    joined[is_text] = tokens
    joined[ends] = eos_token_id
    return joined


# --- blocks on disk -------------------------------------------------------------------------------


class BlockWriter:
    """Packs a stream of tokens into blocks and writes them as Arrow files that `datasets` reads.

    The files depend on the tokens alone, not on the pieces in which they came: every record batch
    holds the same number of blocks, every file the same number of batches. No more than a batch is
    kept in memory.
    """

    def __init__(self, folder: Path, sequence_length: int, dtype: str) -> None:
        import numpy as np
        from datasets import Features, List, Value

        self.blocks = 0
        self._folder = folder
        self._features = Features({"input_ids": List(Value(dtype), length=sequence_length)})
        self._sequence_length = sequence_length
        block_bytes = sequence_length * np.dtype(dtype).itemsize
        self._batch = np.empty(max(1, BATCH_BYTES // block_bytes) * sequence_length, dtype)
        self._filled = 0  # tokens of the batch
        self._shards: list[_Shard] = []
        self._stream: Any = None
        folder.mkdir(parents=True)

    def append(self, tokens: np.ndarray) -> None:
        """Add tokens to the stream; whole record batches go to disk."""
        while len(tokens):
            taken = tokens[: len(self._batch) - self._filled]
            self._batch[self._filled : self._filled + len(taken)] = taken
            self._filled += len(taken)
            tokens = tokens[len(taken) :]
            if self._filled == len(self._batch):
                self._write(self._batch)
                self._filled = 0

    def finish(self) -> np.ndarray:
        """Write the whole blocks that are left; return the tokens that fill no block."""
        whole = self._filled // self._sequence_length * self._sequence_length
        if whole:
            self._write(self._batch[:whole])
        self.close()
        return self._batch[whole : self._filled]

    def close(self) -> None:
        """End the file that is being written."""
        if self._stream is not None:
            self._stream.close()
            self._stream = None
            self._shards[-1].close()

    def describe(self, split: str, fingerprint: str) -> dict[str, str]:
        """Write the JSON files of `datasets`, without which it does not open the folder.

        fingerprint: names this content to the caches of `datasets`. Returns the checksums of the
        Arrow files by their names.
        """
        names = [f"data-{n:05d}-of-{len(self._shards):05d}.arrow" for n in range(len(self._shards))]
        for shard, name in zip(self._shards, names, strict=True):
            shard.path.rename(self._folder / name)
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        info = {"citation": "", "description": "", "homepage": "", "license": ""}
        write_json(self._folder / "state.json", state)
        write_json(
            self._folder / "dataset_info.json", info | {"features": self._features.to_dict()}
        )
        return {
            f"{self._folder.name}/{name}": shard.checksum
            for name, shard in zip(names, self._shards, strict=True)
        }

    def _write(self, tokens: np.ndarray) -> None:
        import pyarrow as pa

        schema = self._features.arrow_schema
        if self._stream is None:
            self._shards.append(_Shard(self._folder / f"data-{len(self._shards):05d}.arrow"))
            self._stream = pa.ipc.new_stream(self._shards[-1], schema)
        column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), self._sequence_length)
        self._stream.write_batch(pa.record_batch([column], schema=schema))
        self.blocks += len(column)
        self._shards[-1].batches += 1
        if self._shards[-1].batches == BATCHES_PER_SHARD:
            self.close()


class _Shard(io.RawIOBase):
    """A file for pyarrow to write, which knows its checksum without being read again."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self.batches = 0
        self._file = path.open("wb")
        self._digest = hashlib.blake2b(digest_size=32)

    @property
    def checksum(self) -> str:
        return self._digest.hexdigest()

    def writable(self) -> bool:
        return True

    def write(self, content: Any) -> int:
        self._file.write(content)
        self._digest.update(content)
        return len(content)

    def close(self) -> None:
        self._file.close()
        super().close()


def write_json(path: Path, content: Any) -> None:
    """Write JSON that is the same for the same content."""
    text = json.dumps(content, indent=2, sort_keys=True, ensure_ascii=False) + "\n"
    path.write_bytes(text.encode())  # write_text would end lines by the platform's habit


def checksum(path: Path) -> str:
    """BLAKE2b-256 of a file, as `b2sum -l 256` prints it (twice as fast as sha256)."""
    digest = hashlib.blake2b(digest_size=32)
    with path.open("rb") as file:
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def files_of(folder: Path, known: dict[str, str]) -> dict[str, dict[str, Any]]:
    """Size and checksum of every file of a dataset, by its path in it. known: checksums so far."""
    files = sorted(path for path in folder.rglob("*") if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in files]
    return {
        name: {"bytes": path.stat().st_size, "blake2b": known.get(name) or checksum(path)}
        for name, path in zip(names, files, strict=True)
        if name != MANIFEST
    }


def publish(unfinished: Path, folder: Path) -> None:
    """Move a finished dataset from `unfinished` (inside `folder`) to its place in `folder`.

    At any moment `folder` holds a manifest only if it holds the whole dataset that it describes.
    Of what lay in `folder` only an older dataset is removed.
    """
    for path in unfinished.rglob("*"):
        _fsync(path)
    (folder / MANIFEST).unlink(missing_ok=True)
    _fsync(folder)
    for name in (TRAIN, VALIDATION, TOKENIZER):
        shutil.rmtree(folder / name, ignore_errors=True)
    (folder / DATASET_DICT).unlink(missing_ok=True)
    for path in sorted(unfinished.iterdir(), key=lambda path: path.name == MANIFEST):
        if path.name == MANIFEST:
            _fsync(folder)
        path.rename(folder / path.name)
    unfinished.rmdir()
    _fsync(folder)


def _fsync(path: Path) -> None:
    """Have the disk keep a file's content or a folder's names."""
    if os.name == "nt":  # Windows opens no folder, and no file for this without writing to it
        return
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


# --- the manifest ---------------------------------------------------------------------------------


@dataclass(frozen=True)
class SplitFacts:
    """What a split holds.

    bytes: UTF-8 bytes of the text of just the tokens in the blocks. EOS stands for no text, and
    the separators between documents count nowhere, so bits per byte pays for predicting the ends
    of documents without being credited for them: never too low. dropped_tokens: the tail of the
    split that fills no block; its bytes are not counted.
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
    files: size and checksum of every other file. skipped_rows: bad rows that were left out.
    """

    sequence_length: int
    vocab_size: int
    eos_token_id: int
    dtype: str
    splits: dict[str, SplitFacts]
    tokenizer_fingerprint: str
    content_fingerprint: str
    arguments: dict[str, Any]
    files: dict[str, dict[str, Any]] = dataclasses.field(default_factory=dict)
    skipped_rows: int = 0
    format_version: int = FORMAT_VERSION

    @property
    def fingerprint(self) -> str:
        """Identifies the blocks: equal for two datasets that hold the same (64 hex digits)."""
        content = dataclasses.asdict(self) | {"arguments": None, "files": None}
        # Names of files may differ where the text does not; the rest is in the fields already
        # but for how documents were divided.
        for key in ("seed", "validation_fraction", "document_separator", "encoding_errors"):
            content[key] = self.arguments.get(key)
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()

    def with_files(self, files: dict[str, dict[str, Any]]) -> Manifest:
        """The same with the sizes and checksums of the files."""
        return dataclasses.replace(self, files=files)

    def save(self, folder: Path) -> None:
        """Write the manifest into `folder`."""
        write_json(folder / MANIFEST, dataclasses.asdict(self))

    @classmethod
    def load(cls, folder: Path) -> Manifest:
        """The manifest in `folder`. Raises ForgeError when there is none that can be read."""
        path = folder / MANIFEST
        try:
            content = json.loads(path.read_text("utf-8"))
            if content["format_version"] != FORMAT_VERSION:
                raise ForgeError(
                    f"{path} has format version {content['format_version']}, this program reads "
                    f"{FORMAT_VERSION}: prepare the text again with --overwrite"
                )
            splits = {name: SplitFacts(**facts) for name, facts in content.pop("splits").items()}
            return cls(splits=splits, **content)
        except FileNotFoundError as error:
            raise ForgeError(_no_manifest(folder)) from error
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise ForgeError(
                f"{path} cannot be read as a manifest ({error}): prepare the text again with "
                "--overwrite"
            ) from error


def _no_manifest(folder: Path) -> str:
    if not folder.exists():
        return f"{folder}: no such folder. Prepare it: python prepare_data.py --output-dir {folder}"
    found = (
        "a preparation that did not finish"
        if (folder / UNFINISHED).exists()
        else "no manifest.json"
    )
    return (
        f"{folder} is not a prepared dataset: found {found}. Prepare it: "
        f"python prepare_data.py --dataset-path TEXT --output-dir {folder}"
    )


# --- reading --------------------------------------------------------------------------------------


def looks_like_prepared(path: str | Path) -> bool:
    """Whether `path` is meant as a prepared dataset, complete or not, rather than as text."""
    marks = (MANIFEST, UNFINISHED, DATASET_DICT, "state.json")
    return any((Path(path) / mark).exists() for mark in marks)


def open_prepared(path: str | Path) -> PreparedDataset:
    """Open a prepared dataset; its blocks stay on disk. Raises ForgeError when it is not one."""
    folder = Path(path)
    return PreparedDataset(folder, Manifest.load(folder))


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
        if split not in self.manifest.splits:
            return None
        blocks = Blocks(
            self.path / split, self.manifest.sequence_length, self.manifest.eos_token_id
        )
        if len(blocks) != self.manifest.splits[split].blocks:
            raise ForgeError(
                f"{self.path / split} holds {len(blocks)} blocks where the manifest promises "
                f"{self.manifest.splits[split].blocks}: prepare the text again with --overwrite"
            )
        return blocks

    def train_blocks(self) -> Blocks:
        """The blocks to learn from. Raises ForgeError when the dataset has none."""
        blocks = self.blocks(TRAIN)
        if not blocks:
            raise ForgeError(f"{self.path} has no blocks to train on: prepare a longer text")
        return blocks


class Blocks:
    """The blocks of one split, read from memory-mapped files without copying the table."""

    def __init__(self, folder: Path, sequence_length: int, eos_token_id: int) -> None:
        import datasets

        self._arguments = (folder, sequence_length, eos_token_id)
        self._eos_token_id = eos_token_id
        self._sequence_length = sequence_length
        try:
            self._dataset = datasets.load_from_disk(str(folder))
        except (
            Exception
        ) as error:  # what datasets and Arrow raise for damaged files is not one class
            raise ForgeError(
                f"{folder} cannot be read ({error}): prepare the text again with --overwrite"
            ) from error
        self._chunks = [
            chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, sequence_length)
            for chunk in self._dataset.data.column("input_ids").chunks
        ]
        self._first_blocks = [0]
        for chunk in self._chunks:
            self._first_blocks.append(self._first_blocks[-1] + len(chunk))

    def __len__(self) -> int:
        return self._first_blocks[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself instead of receiving a copy of them.
        return Blocks, self._arguments

    def inputs_and_targets(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the blocks `indices`, each int64 of len(indices) x sequence_length.

        Targets are the block's own tokens. Inputs are the token before the block (the last of the
        previous block of the split; EOS before the first) and its tokens but the last.
        """
        import numpy as np

        targets = np.empty((len(indices), self._sequence_length), np.int64)
        inputs = np.empty_like(targets)
        for row, index in enumerate(indices):
            targets[row] = self._block(index)
            inputs[row, 0] = self._block(index - 1)[-1] if index else self._eos_token_id
        inputs[:, 1:] = targets[:, :-1]
        return inputs, targets

    def chunks(self) -> list[np.ndarray]:
        """All blocks, as arrays of some of them each (blocks x sequence_length), not copied."""
        return self._chunks

    def _block(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        chunk = bisect.bisect_right(self._first_blocks, index) - 1
        return self._chunks[chunk][index - self._first_blocks[chunk]]
