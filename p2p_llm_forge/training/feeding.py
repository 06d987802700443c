"""Blocks on their way to the device: read ahead and copied without waiting, where that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import TypeVar

import torch

from p2p_llm_forge.data.blocks import Blocks

Batch = tuple[torch.Tensor, torch.Tensor]
Item = TypeVar("Item")
Made = TypeVar("Made")


def fed(blocks: Blocks, batches: list[list[int]], device: torch.device) -> Iterator[Batch]:
    """Inputs and targets of each micro-batch on the device; batches: the numbers of its blocks.

    To a GPU they are copied from pinned memory, so that the program need not wait for what the GPU
    was given before, and the next ones are read meanwhile. A CPU computes all the while, and a
    thread that reads would only take time from it.
    """
    if device.type != "cuda":
        for numbers in batches:
            inputs, targets = read(blocks, numbers)
            yield inputs.to(device), targets.to(device)
        return
    for inputs, targets in ahead(batches, lambda numbers: pinned(read(blocks, numbers))):
        yield inputs.to(device, non_blocking=True), targets.to(device, non_blocking=True)


def read(blocks: Blocks, numbers: list[int]) -> Batch:
    """Inputs and targets of the blocks, in memory."""
    inputs, targets = blocks.inputs_and_targets(numbers)
    return torch.from_numpy(inputs), torch.from_numpy(targets)


def pinned(batch: Batch) -> Batch:
    """The same in memory that a GPU reads by itself."""
    inputs, targets = batch
    return inputs.pin_memory(), targets.pin_memory()


def ahead(items: Iterable[Item], make: Callable[[Item], Made]) -> Iterator[Made]:
    """`make` of each item, in order; the next one is made while the last one is used."""
    with ThreadPoolExecutor(1, "blocks") as thread:
        coming = None
        for item in items:
            made, coming = coming, thread.submit(make, item)
            if made is not None:
                yield made.result()
        if coming is not None:
            yield coming.result()
