"""Blocks on disk: rows of `sequence_length` tokens in Arrow files, as `datasets` reads them."""

from __future__ import annotations

import bisect
import hashlib
import io
import itertools
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import write_json

STATE = "state.json"
TOKENS = "input_ids"
# Of conversations, for every token: whether it is a target that counts in the loss, and whether it
# is the first of a conversation, or of the padding after a block's last. Bits, the lowest first.
TRAINED, BEGINS = MARKS = "trained", "begins"
UNTRAINED = -100  # the target that no loss counts: torch's own number for it
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

    has_marks: of conversations, whose tokens are each marked (MARKS).
    """

    def __init__(
        self, folder: Path, sequence_length: int, dtype: str, has_marks: bool = False
    ) -> None:
        from datasets import Features, List, Value

        self.blocks = 0
        self._folder = folder
        columns = {TOKENS: List(Value(dtype), length=sequence_length)}
        for name in MARKS if has_marks else ():
            columns[name] = List(Value("uint8"), length=bytes_of_marks(sequence_length))
        self._features = Features(columns)
        self._sequence_length = sequence_length
        block_bytes = sequence_length * np.dtype(dtype).itemsize
        self._size = max(1, BATCH_BYTES // block_bytes) * sequence_length  # of a batch, in tokens
        kinds = {name: dtype if name == TOKENS else "bool" for name in columns}
        self._batch = {name: np.empty(self._size, kind) for name, kind in kinds.items()}
        self._filled = 0  # tokens of the batch
        self._shards: list[Path] = []
        self._sha256: list[str] = []  # of the shards
        self._file: _HashedFile | None = None
        self._stream: Any = None
        folder.mkdir(parents=True)

    def append(self, tokens: np.ndarray, **marks: np.ndarray) -> None:
        """Add tokens to the stream; whole record batches go to disk.

        marks: `trained` and `begins` of conversations, bool, shaped like the tokens.
        """
        columns, place = {TOKENS: tokens, **marks}, 0
        assert columns.keys() == self._batch.keys()
        while place < len(tokens):
            taken = min(len(tokens) - place, self._size - self._filled)
            for name, column in columns.items():
                part = column[place : place + taken]
                self._batch[name][self._filled : self._filled + taken] = part
            place += taken
            self._filled += taken
            if self._filled == self._size:
                self._write(self._size)
                self._filled = 0

    def finish(self) -> np.ndarray:
        """Write the whole blocks that are left; return the tokens that fill no block."""
        whole = self._filled // self._sequence_length * self._sequence_length
        if whole:
            self._write(whole)
        self.close()
        return self._batch[TOKENS][whole : self._filled]

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

    def _write(self, count: int) -> None:
        """Write so many tokens of the batch, which are whole blocks."""
        schema = self._features.arrow_schema
        if self._file is None:
            self._shards.append(self._folder / f"data-{len(self._shards):05d}.arrow")
            self._file = _HashedFile(self._shards[-1])
            self._stream = pa.ipc.new_stream(self._file, schema)
        columns = []
        for name, column in self._batch.items():
            rows = column[:count].reshape(-1, self._sequence_length)
            if name != TOKENS:
                rows = np.packbits(rows, axis=1, bitorder="little")
            values = pa.array(rows.reshape(-1))
            columns.append(pa.FixedSizeListArray.from_arrays(values, rows.shape[1]))
        self._stream.write_batch(pa.record_batch(columns, schema=schema))
        self.blocks += count // self._sequence_length
        if self.blocks * self._sequence_length % (BATCHES_PER_SHARD * self._size) == 0:
            self.close()


def bytes_of_marks(sequence_length: int) -> int:
    """What the bits of one kind of mark take of a block."""
    return -(-sequence_length // 8)


class Blocks:
    """The blocks of one split, read from memory-mapped files without copying the table."""

    def __init__(
        self, folder: Path, sequence_length: int, eos_token_id: int, vocab_size: int = 2**32
    ) -> None:
        import datasets

        self._arguments = folder, sequence_length, eos_token_id, vocab_size
        try:
            table = datasets.load_from_disk(str(folder)).data
            # All blocks, as arrays of some of them each (blocks x sequence_length), not copied.
            self.chunks = _rows(table.column(TOKENS), sequence_length)
            names = [name for name in MARKS if name in table.column_names]
            width = bytes_of_marks(sequence_length)
            self._marks = {name: _rows(table.column(name), width) for name in names}
            if names and names != list(MARKS):
                raise ValueError(f"it marks only which tokens are {names[0]}")
            if any(rows.dtype != np.uint8 for of in self._marks.values() for rows in of):
                raise ValueError("its marks are not bits in bytes")
        except Exception as error:  # datasets and Arrow raise many classes for damaged files
            raise ForgeError(f"{folder} cannot be read: {error}", PREPARE_AGAIN) from error
        self._first_blocks = list(itertools.accumulate(map(len, self.chunks), initial=0))

    def __len__(self) -> int:
        return self._first_blocks[-1]

    def __reduce__(self) -> tuple[Any, ...]:
        # A worker process maps the files itself instead of receiving a copy of them.
        return Blocks, self._arguments

    @property
    def is_of_conversations(self) -> bool:
        """Whether its tokens are marked: which are trained, and where a conversation begins."""
        return bool(self._marks)

    def inputs_and_targets(self, indices: Sequence[int]) -> tuple[np.ndarray, np.ndarray]:
        """Inputs and targets of the blocks `indices`, each int64 of len(indices) x sequence_length.

        Targets are the block's own tokens, of conversations UNTRAINED where they do not count.
        Inputs are the token before the block and its tokens but the last. Before a block of text is
        the last token of the previous block of the split, before the first one and before every
        block of conversations, which are whole in it, EOS.
        """
        eos_token_id = self._arguments[2]
        targets = self.tokens(indices)
        inputs = np.empty_like(targets)
        for row, index in enumerate(indices):
            follows = index and not self._marks
            inputs[row, 0] = self._row(self.chunks, index - 1)[-1] if follows else eos_token_id
        inputs[:, 1:] = targets[:, :-1]
        self._require_tokens(inputs[:, :1])
        if self._marks:
            targets[~self.trained(indices)] = UNTRAINED
        return inputs, targets

    def tokens(self, indices: Sequence[int]) -> np.ndarray:
        """The tokens of the blocks, int64 of len(indices) x sequence_length."""
        found = np.empty((len(indices), self._arguments[1]), np.int64)
        for row, index in enumerate(indices):
            found[row] = self._row(self.chunks, index)
        self._require_tokens(found)
        return found

    def trained(self, indices: Sequence[int]) -> np.ndarray:
        """Which tokens count in the loss, bool of len(indices) x sequence_length; of text all."""
        found = self._bits(TRAINED, indices)
        if found is None:
            return np.ones((len(indices), self._arguments[1]), bool)
        if not found.any(axis=1).all():
            raise ForgeError(
                f"{self._arguments[0]} is damaged: it holds a block of which nothing is trained",
                PREPARE_AGAIN,
            )
        return found

    def begins(self, indices: Sequence[int]) -> np.ndarray | None:
        """Which tokens are the first of a conversation, bool as `trained`; None of text."""
        return self._bits(BEGINS, indices)

    def trained_tokens(self, indices: Sequence[int]) -> int:
        """How many tokens of the blocks count in the loss."""
        if not self._marks:
            return len(indices) * self._arguments[1]
        return int(np.count_nonzero(self.trained(indices)))

    def that_count(self) -> Iterator[np.ndarray]:
        """The tokens of all blocks that count in the loss, many at a time."""
        for number, chunk in enumerate(self.chunks):
            if not self._marks:
                yield chunk.reshape(-1)
            elif len(chunk):
                packed, length = self._marks[TRAINED][number], chunk.shape[1]
                is_trained = np.unpackbits(packed, axis=1, count=length, bitorder="little")
                yield chunk[is_trained.astype(bool)]

    def _bits(self, name: str, indices: Sequence[int]) -> np.ndarray | None:
        if not self._marks:
            return None
        found = np.empty((len(indices), self._arguments[1]), bool)
        for row, index in enumerate(indices):
            packed = self._row(self._marks[name], index)
            found[row] = np.unpackbits(packed, count=found.shape[1], bitorder="little")
        return found

    def _row(self, chunks: list[np.ndarray], index: int) -> np.ndarray:
        """What a column holds of a block. chunks: of that column."""
        if not 0 <= index < len(self):
            raise IndexError(f"block {index} of {len(self)}")
        chunk = bisect.bisect_right(self._first_blocks, index) - 1
        return chunks[chunk][index - self._first_blocks[chunk]]

    def _require_tokens(self, found: np.ndarray) -> None:
        """Raise ForgeError where one is not in the vocabulary."""
        folder, _, _, vocab_size = self._arguments
        if (largest := found.max(initial=0)) >= vocab_size:
            what = f"{folder} is damaged: it holds the token {largest}, the vocabulary has"
            raise ForgeError(f"{what} {vocab_size}", PREPARE_AGAIN)


def _rows(column: Any, width: int) -> list[np.ndarray]:
    """The chunks of a column, each (blocks, width). Raises ValueError for another width."""
    if (found := column.type.list_size) != width:
        raise ValueError(f"it holds blocks of {found} tokens, not of {width}")
    return [
        chunk.flatten().to_numpy(zero_copy_only=True).reshape(-1, width) for chunk in column.chunks
    ]
