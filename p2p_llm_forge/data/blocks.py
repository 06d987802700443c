"""Blocks on disk: rows of `sequence_length` tokens in Arrow files, as `datasets` reads them."""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import write_json

STATE = "state.json"
BATCH_BYTES = 4 << 20  # tokens in one record batch of an Arrow file
BATCHES_PER_SHARD = 128
PREPARE_AGAIN = "prepare the text again with --overwrite"


class _HashedFile(io.BufferedWriter):
    """A new file, and the SHA-256 of what is written to it: later all of it would be read again."""

    def __init__(self, path: Path) -> None:
        super().__init__(io.FileIO(path, "wb"))
        self.sha256 = hashlib.sha256()

    def write(self, content: Any) -> int:
        self.sha256.update(content)
        return super().write(content)


class BlockWriter:
    """Packs a stream of tokens into blocks, of which no more than a record batch is in memory.

    The files depend on the tokens alone, not on the pieces in which they came: every record batch
    holds the same number of blocks, every file the same number of batches.
    """

    def __init__(self, folder: Path, sequence_length: int, dtype: str) -> None:
        from datasets import Features, List, Value

        self.blocks = 0
        self._folder = folder
        self._features = Features({"input_ids": List(Value(dtype), length=sequence_length)})
        self._sequence_length = sequence_length
        block_bytes = sequence_length * np.dtype(dtype).itemsize
        self._batch = np.empty(max(1, BATCH_BYTES // block_bytes) * sequence_length, dtype)
        self._filled = 0  # tokens of the batch
        self._shards: list[Path] = []
        self._sha256: list[str] = []  # of the shards
        self._file: _HashedFile | None = None
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
        """End the file that is being written. Raises OSError."""
        stream, file = self._stream, self._file
        self._stream = self._file = None
        if file is not None:
            with file:
                stream.close()
            self._sha256.append(file.sha256.hexdigest())

    def describe(self, split: str, fingerprint: str) -> dict[str, str]:
        """Write the JSON files of `datasets`, without which it does not open the folder.

        fingerprint: names this content to the caches of `datasets`. Returns the SHA-256 of the
        files that hold the blocks, by their names, which they have from now on.
        """
        names = [f"{shard.stem}-of-{len(self._shards):05d}.arrow" for shard in self._shards]
        for shard, name in zip(self._shards, names, strict=True):
            shard.rename(self._folder / name)
        state: dict[str, Any] = {
            "_data_files": [{"filename": name} for name in names],
            "_fingerprint": fingerprint,
            "_format_columns": None,
            "_format_kwargs": {},
            "_format_type": None,
            "_output_all_columns": False,
            "_split": split,
        }
        info = dict.fromkeys(("citation", "description", "homepage", "license"), "")
        features = {"features": self._features.to_dict()}
        write_json(self._folder / STATE, state, durable=False)
        write_json(self._folder / "dataset_info.json", info | features, durable=False)
        return dict(zip(names, self._sha256, strict=True))

    def _write(self, tokens: np.ndarray) -> None:
        schema = self._features.arrow_schema
        if self._file is None:
            self._shards.append(self._folder / f"data-{len(self._shards):05d}.arrow")
            self._file = _HashedFile(self._shards[-1])
            self._stream = pa.ipc.new_stream(self._file, schema)
        column = pa.FixedSizeListArray.from_arrays(pa.array(tokens), self._sequence_length)
        self._stream.write_batch(pa.record_batch([column], schema=schema))
        self.blocks += len(column)
        if self.blocks * self._sequence_length % (BATCHES_PER_SHARD * len(self._batch)) == 0:
            self.close()


class Blocks:
    """The blocks of one split, read from memory-mapped files without copying the table."""

    def __init__(
        self, folder: Path, sequence_length: int, eos_token_id: int, vocab_size: int = 2**32
    ) -> None:
        import datasets

        self._arguments = folder, sequence_length, eos_token_id, vocab_size
        try:
            column = datasets.load_from_disk(str(folder)).data.column("input_ids")
            if (width := column.type.list_size) != sequence_length:
                raise ValueError(f"it holds blocks of {width} tokens, not of {sequence_length}")
            # All blocks, as arrays of some of them each (blocks x sequence_length), not copied.
            self.chunks = [
                chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, sequence_length)
                for chunk in column.chunks
            ]
        except Exception as error:  # datasets and Arrow raise many classes for damaged files
            raise ForgeError(f"{folder} cannot be read: {error}", PREPARE_AGAIN) from error
        self._first_blocks = list(itertools.accumulate(map(len, self.chunks), initial=0))

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
        folder, sequence_length, eos_token_id, vocab_size = self._arguments
        targets = np.empty((len(indices), sequence_length), np.int64)
        inputs = np.empty_like(targets)
        for row, index in enumerate(indices):
            targets[row] = self._block(index)
            inputs[row, 0] = self._block(index - 1)[-1] if index else eos_token_id
        inputs[:, 1:] = targets[:, :-1]
        if (largest := max(inputs.max(initial=0), targets.max(initial=0))) >= vocab_size:
            found = f"{folder} is damaged: it holds the token {largest}, the vocabulary has"
            raise ForgeError(f"{found} {vocab_size}", PREPARE_AGAIN)
        return inputs, targets

    def _block(self, index: int) -> np.ndarray:
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        chunk = bisect.bisect_right(self._first_blocks, index) - 1
        return self.chunks[chunk][index - self._first_blocks[chunk]]
