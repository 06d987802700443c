"""Which blocks each rank reads at a step: pure arithmetic on (seed, step, world size).

The epochs form one endless stream of block numbers. Each epoch is a permutation of the blocks,
keyed by seed and epoch and computed a position at a time, so any step of any run can be found
without an array in memory and without replaying what came before.
"""

from __future__ import annotations

import hashlib
import math
from dataclasses import dataclass
from functools import lru_cache

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError

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
    blocks = []
    for place in range(position, position + count):
        epoch, index = divmod(place, num_blocks)
        blocks.append(permute(index, num_blocks, seed, epoch))
    return blocks


def equal_shares(batch_size: int, world_size: int) -> list[int]:
    """Blocks of an update for each rank, as equal as they can be; the first get one more."""
    size, left = divmod(batch_size, world_size)
    return [size + (rank < left) for rank in range(world_size)]


def shares_by_speed(batch_size: int, speeds: list[float]) -> list[int]:
    """Blocks of an update for each rank, in proportion to the ranks' speeds, at least one each.

    Largest remainders: no rank is more than one block from its exact share (but for the one that
    it gets at least).
    """
    left = batch_size - len(speeds)
    exact = [left * speed / sum(speeds) for speed in speeds]
    shares = [int(share) for share in exact]
    by_remainder = sorted(range(len(speeds)), key=lambda rank: (shares[rank] - exact[rank], rank))
    for rank in by_remainder[: left - sum(shares)]:
        shares[rank] += 1
    return [1 + share for share in shares]


def share_of_rank(blocks: list[int], shares: list[int], rank: int) -> list[int]:
    """The rank's slice of an update's blocks; the slices of all ranks make up the list."""
    start = sum(shares[:rank])
    return blocks[start : start + shares[rank]]


def micro_batches(blocks: list[int], micro_batch_size: int) -> list[list[int]]:
    """A rank's blocks cut into micro-batches; the last one takes what is left."""
    return [
        blocks[start : start + micro_batch_size]
        for start in range(0, len(blocks), micro_batch_size)
    ]


def steps_of_epochs(epochs: float, num_blocks: int, batch_size: int) -> int:
    """Updates that read every block at least `epochs` times."""
    return max(1, math.ceil(round(epochs * num_blocks, 6) / batch_size))


def dropout_seed(seed: int, step: int, offset: int) -> int:
    """The seed of the micro-batch that starts at `offset` in the update's list of blocks, 63 bits.

    It does not depend on the rank that computes it: with micro-batches of one size, dropout too is
    the same on 1, 2 or 4 processes.
    """
    digest = hashlib.blake2b(f"dropout {seed} {step} {offset}".encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def largest_micro_batch(share: int, limit: int) -> int:
    """The largest divisor of a rank's share that is at most `limit`."""
    return next(size for size in range(min(share, limit), 0, -1) if share % size == 0)


def sizes_that_divide(batch_size: int, unit: int) -> list[int]:
    """The batch sizes next to `batch_size` that are multiples of `unit`, smaller one first."""
    below = batch_size // unit * unit
    return [size for size in (below, below + unit) if size > 0]


@dataclass(frozen=True)
class Plan:
    """How the updates of a run are made up. Sizes in blocks, except where named."""

    batch_size: int
    micro_batch_size: int
    shares: list[int]  # of each rank, adding up to the batch
    tokens_per_update: int
    total_steps: int


def plan_updates(
    config: TrainConfig,
    num_blocks: int,
    sequence_length: int,
    world_size: int,
    may_be_uneven: bool = False,
) -> Plan:
    """Batch, micro-batch and steps; sizes that do not divide raise a ForgeError.

    may_be_uneven: the number of peers was not chosen but came about (elastic launches, resuming
    elsewhere), so ranks may have a block more or less than others.
    """
    batch_size, micro = config.batch_size, config.micro_batch_size
    if config.gradient_accumulation_steps is not None:
        told = (micro or 8) * config.gradient_accumulation_steps * world_size
        if batch_size not in (None, told):
            raise ForgeError(
                f"--batch-size {batch_size} is not micro-batch {micro or 8} x accumulation "
                f"{config.gradient_accumulation_steps} x {world_size} processes = {told}: leave out"
                " --gradient-accumulation-steps"
            )
        batch_size, micro = told, micro or 8
    batch_size = batch_size or max(16, (micro or 1) * world_size)
    unit = world_size * (micro or 1)
    if batch_size < world_size or (batch_size % unit and not may_be_uneven):
        sizes = " or ".join(map(str, sizes_that_divide(batch_size, unit)))
        raise ForgeError(
            f"--batch-size {batch_size} cannot be dealt to {world_size} processes in micro-batches"
            f" of {micro or 1}: use {sizes}"
        )
    shares = equal_shares(batch_size, world_size)
    micro = micro or largest_micro_batch(shares[0], limit=8)
    steps = config.max_steps or steps_of_epochs(config.epochs, num_blocks, batch_size)
    return Plan(batch_size, micro, shares, batch_size * sequence_length, steps)
