"""The plan of a run's updates: batch size, each rank's share of it, micro-batches, steps."""

from __future__ import annotations

import math
from dataclasses import dataclass

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError

AT_ONCE = 4096  # tokens in a forward, at least, where that many are in an update


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
    batch_size, micro = config.batch_size, config.micro_batch()
    if config.gradient_accumulation_steps is not None:
        micro = micro or 8
        product = micro * config.gradient_accumulation_steps * world_size
        if batch_size not in (None, product):
            raise ForgeError(
                f"--batch-size {batch_size} is not micro-batch {micro} x accumulation "
                f"{config.gradient_accumulation_steps} x {world_size} processes = {product}",
                f"leave --batch-size out, or use {product}",
            )
        batch_size = product
    unit = world_size * (micro or 1)
    batch_size = batch_size or max(16, unit)
    if batch_size < world_size or (batch_size % unit and not may_be_uneven):
        below = batch_size // unit * unit
        sizes = [str(size) for size in (below, below + unit) if size]
        raise ForgeError(
            f"--batch-size {batch_size} cannot be divided among {world_size} processes in"
            f" micro-batches of {micro or 1}",
            f"use {' or '.join(sizes)}",
        )
    size, left = divmod(batch_size, world_size)
    shares = [size + (rank < left) for rank in range(world_size)]
    return Plan(
        batch_size=batch_size,
        micro_batch_size=micro or even_size(shares[0], usual_micro_batch(config, sequence_length)),
        shares=shares,
        tokens_per_update=batch_size * sequence_length,
        total_steps=config.max_steps
        or steps_of_epochs(config.epochs or 1.0, num_blocks, batch_size),
    )


def more_processes_than_blocks(batch_size: int, larger: Plan, world_size: int) -> ForgeError:
    """What is wrong where a run goes on with more processes than its batch has blocks.

    larger: a plan for so many processes.
    """
    return ForgeError(
        f"the run in --output-dir has {batch_size} blocks in an update, and each of the"
        f" {world_size} processes needs one at least",
        f"start at most {batch_size} processes, or add --batch-size {larger.batch_size}"
        " --resume-changed on all machines",
    )


def usual_micro_batch(config: TrainConfig, sequence_length: int) -> int:
    """The most blocks in a forward where nothing is asked: 8, or AT_ONCE tokens of short ones.

    Every operation of a small model costs its start, and more of them at once take no more memory
    than 8 long blocks. A loaded model is rarely small, and memory is what it lacks.
    """
    return 8 if config.model_name else max(8, AT_ONCE // sequence_length)


def even_size(share: int, most: int) -> int:
    """The micro-batch of at most `most` blocks that cuts a share into the fewest equal parts."""
    parts = -(-share // most)
    return -(-share // parts)


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


def steps_of_epochs(epochs: float, num_blocks: int, batch_size: int) -> int:
    """Updates that read every block at least `epochs` times."""
    return max(1, math.ceil(round(epochs * num_blocks, 6) / batch_size))
