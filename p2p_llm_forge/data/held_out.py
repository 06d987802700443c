"""What a model is evaluated on: the blocks of a split, or a sample of them, and their bytes.

The manifest counts the bytes of text of a whole split. What a few blocks stand for is the sum over
their tokens, which is exact in a byte-level vocabulary; in any other one the sizes of tokens are
scaled so that all blocks of the split together have just the bytes that were counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.data.order import blocks_at
from p2p_llm_forge.data.splits import VALIDATION
from p2p_llm_forge.data.text_bytes import token_sizes

SAMPLE_SEED = 0  # the same in every run: what runs come to is compared on the same blocks


@dataclass(frozen=True)
class HeldOut:
    """Blocks to be evaluated on. numbers: which of the split's, in their order."""

    blocks: Blocks
    split_bytes: int  # of the text of all blocks of the split
    numbers: Sequence[int]
    sizes: np.ndarray | None = None  # of a sample: bytes of text by token, before `scale`

    @property
    def is_sample(self) -> bool:
        return len(self.numbers) < len(self.blocks)

    def in_words(self) -> str:
        """How many blocks are evaluated, for a person."""
        total = f"{len(self.blocks):,} blocks"
        if not self.is_sample:
            return f"{total}, all of which are evaluated"
        return f"{total}, of which a sample of {len(self.numbers):,} is evaluated; --eval-blocks N"

    def sizes_of(self, targets: np.ndarray) -> np.ndarray:
        """Bytes of text of each block, before `scale` (blocks,); 0 where all are evaluated.

        targets: of blocks, (blocks, tokens); those below 0 do not count.
        """
        if self.sizes is None:
            return np.zeros(len(targets))
        return (self.sizes[targets] * (targets >= 0)).sum(axis=1)

    @cached_property
    def scale(self) -> float:
        """Bytes of text over what the sizes of its tokens come to, in the whole split.

        1 where tokens stand for bytes as they are. Reads all blocks, at about 1 GB a second.
        """
        assert self.sizes is not None
        counts = np.zeros(len(self.sizes), np.int64)
        for tokens in self.blocks.that_count():
            # A token outside of the vocabulary is found where its block is read.
            counts += np.bincount(tokens, minlength=len(counts))[: len(counts)]
        found = float(counts @ self.sizes)
        return self.split_bytes / found if found else 0.0


def held_out(
    data: PreparedDataset, count: int | None, trust_remote_code: bool = False
) -> HeldOut | None:
    """The blocks of the validation split to evaluate on; None where nothing is held out.

    count: how many; None or 0, and more than there are: all. Raises ForgeError for damaged data.
    """
    blocks = data.blocks(VALIDATION)
    if not blocks:
        return None
    size, total = data.manifest.splits[VALIDATION].bytes, len(blocks)
    if not count or count >= total:
        return HeldOut(blocks, size, range(total))
    tokenizer = data.load_tokenizer(trust_remote_code)
    sizes = sizes_by_token(tokenizer, data.manifest.vocab_size)
    sizes[data.manifest.eos_token_id] = 0  # stands for no text
    if blocks.is_of_conversations:  # so do the marks around its turns
        controls = [one for one in tokenizer.all_special_ids if one < len(sizes)]
        sizes[controls] = 0
    return HeldOut(blocks, size, sample(count, total), sizes)


def sample(count: int, total: int, seed: int = SAMPLE_SEED) -> list[int]:
    """So many different numbers below `total`, drawn by chance, ascending.

    All sets are equally likely, and a larger one holds the smaller ones of its seed.
    """
    return sorted(blocks_at(0, count, total, seed))


def sizes_by_token(tokenizer: Any, vocab_size: int) -> np.ndarray:
    """About how many bytes of text every token stands for (vocab_size,), float64."""
    found = np.zeros(vocab_size)
    exact = token_sizes(tokenizer)
    if exact is None:
        numbers = sorted(set(tokenizer.get_vocab().values()))
        exact = np.zeros(numbers[-1] + 1)
        exact[numbers] = [
            # SentencePiece writes a space as a letter of three bytes, and WordPiece marks what
            # continues a word.
            len(token.replace("\u2581", " ").removeprefix("##").encode())
            for token in tokenizer.convert_ids_to_tokens(numbers)
        ]
    found[: len(exact)] = exact[:vocab_size]
    return found
