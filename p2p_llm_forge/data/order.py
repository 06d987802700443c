"""The order of data: which blocks each rank reads at a step, by arithmetic on (seed, step, shares).

The epochs form one endless stream of block numbers. Each epoch is a permutation of the blocks,
keyed by seed and epoch and computed a position at a time, so any step of any run can be found
without an array in memory and without replaying what came before.
"""

from __future__ import annotations

import hashlib
from functools import lru_cache

ROUNDS = 6
WORD = 0xFFFFFFFFFFFFFFFF


@lru_cache(maxsize=8)
def _round_keys(seed: int, epoch: int) -> tuple[int, ...]:
    """64-bit keys of the network's rounds, from BLAKE2b."""
    digest = hashlib.blake2b(f"data order {seed} {epoch}".encode(), digest_size=8 * ROUNDS).digest()
    return tuple(int.from_bytes(digest[8 * n : 8 * n + 8], "little") for n in range(ROUNDS))


def _mix(value: int) -> int:
    """Scramble 64 bits (the finalizer of splitmix64; Steele, Lea, Flood 2014)."""
    value = ((value ^ (value >> 30)) * 0xBF58476D1CE4E5B9) & WORD
    value = ((value ^ (value >> 27)) * 0x94D049BB133111EB) & WORD
    return value ^ (value >> 31)


def permute(index: int, size: int, seed: int, epoch: int) -> int:
    """Where the epoch's permutation of range(size) puts `index`.

    A Feistel network on the smallest even number of bits that holds `size`, walked until it lands
    inside (cycle walking: Black and Rogaway, "Ciphers with arbitrary finite domains", 2002); fewer
    than four walks on average.
    """
    half_bits = max(1, (max(size - 1, 1).bit_length() + 1) // 2)
    mask = (1 << half_bits) - 1
    keys = _round_keys(seed, epoch)
    while True:
        left, right = index >> half_bits, index & mask
        for key in keys:
            left, right = right, left ^ (_mix(right ^ key) & mask)
        index = (left << half_bits) | right
        if index < size:
            return index


def blocks_at(position: int, count: int, num_blocks: int, seed: int) -> list[int]:
    """The block numbers at `count` positions of the stream, across an epoch's end too."""
    places = (divmod(place, num_blocks) for place in range(position, position + count))
    return [permute(index, num_blocks, seed, epoch) for epoch, index in places]


def share_of_rank(blocks: list[int], shares: list[int], rank: int) -> list[int]:
    """The rank's slice of an update's blocks; the slices of all ranks make up the list."""
    start = sum(shares[:rank])
    return blocks[start : start + shares[rank]]


def micro_batches(blocks: list[int], micro_batch_size: int) -> list[list[int]]:
    """A rank's blocks cut into micro-batches; the last one takes what is left."""
    starts = range(0, len(blocks), micro_batch_size)
    return [blocks[start : start + micro_batch_size] for start in starts]


def dropout_seed(seed: int, step: int, offset: int) -> int:
    """The seed of the micro-batch that starts at `offset` in the update's list of blocks, 63 bits.

    It does not depend on the rank that computes it: with micro-batches of one size, dropout too is
    the same on 1, 2 or 4 processes.
    """
    digest = hashlib.blake2b(f"dropout {seed} {step} {offset}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1
