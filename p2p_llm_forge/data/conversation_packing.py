"""Conversations into blocks: whole ones where they fit, several in a block.

A conversation goes into the open block in which it leaves least room (best fit); where it fits in
none, a new one is opened. Few blocks are open at a time, so that a dataset of any size is packed in
one pass: one that is full is closed, and where there are too many, the one with least room. The
same conversations in the same order give the same blocks.
"""

from __future__ import annotations

import bisect
from collections.abc import Iterator

import numpy as np

from p2p_llm_forge.data.conversation_encoder import IS_TRAINED

OPEN_BLOCKS = 256  # more fill blocks hardly better: 99 % at lengths up to half a block


def parts_of(tokens: np.ndarray, sequence_length: int) -> Iterator[np.ndarray]:
    """A conversation in parts that fit a block; those of which nothing is trained are left out.

    Each part but the first begins with the last token of the one before, which is not trained
    there: so every trained token is predicted from one of its own conversation.
    """
    if len(tokens) <= sequence_length:
        yield tokens
        return
    for start in range(0, len(tokens) - 1, sequence_length - 1):
        part = tokens[start : start + sequence_length].copy()
        part[0] &= ~IS_TRAINED
        if (part >= IS_TRAINED).any():
            yield part


class OpenBlocks:
    """Blocks that are being filled. padding: the token that fills what is left of one."""

    def __init__(self, sequence_length: int, padding: int, most: int = OPEN_BLOCKS) -> None:
        self._length, self._padding, self._most = sequence_length, padding, most
        self._rooms: list[tuple[int, int]] = []  # room and number of each open block, in order
        self._parts: dict[int, list[np.ndarray]] = {}
        self._opened = 0

    def add(self, part: np.ndarray) -> Iterator[list[np.ndarray]]:
        """Put a part into a block. Gives the parts of every block that is closed with that."""
        place = bisect.bisect_left(self._rooms, (len(part), 0))
        if place < len(self._rooms):
            room, number = self._rooms.pop(place)
        else:
            if len(self._rooms) == self._most:
                yield self._parts.pop(self._rooms.pop(0)[1])
            room, number = self._length, self._opened
            self._opened += 1
            self._parts[number] = []
        self._parts[number].append(part)
        if room == len(part):
            yield self._parts.pop(number)
        else:
            bisect.insort(self._rooms, (room - len(part), number))

    def close_all(self) -> Iterator[list[np.ndarray]]:
        """The parts of every block that is open, in the order in which these were opened."""
        self._rooms = []
        for number in sorted(self._parts):
            yield self._parts.pop(number)

    def block_of(self, parts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """A block's tokens (without marks), which are trained, and where a conversation begins."""
        filled = np.concatenate(parts)
        tokens = np.full(self._length, self._padding, np.uint32)
        tokens[: len(filled)] = filled
        trained = tokens >= IS_TRAINED
        begins = np.zeros(self._length, bool)
        starts = np.cumsum([0, *map(len, parts)])  # of the padding, too
        begins[starts[starts < self._length]] = True
        return tokens & ~IS_TRAINED, trained, begins
