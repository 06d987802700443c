"""Blocks on their way to the device: read ahead and copied without waiting, where that helps."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import NamedTuple, TypeVar

import torch

from p2p_llm_forge.data.blocks import Blocks

Item = TypeVar("Item")
Made = TypeVar("Made")


class Batch(NamedTuple):
    """Blocks as `NextTokenLoss` takes them, each (blocks, tokens)."""

    inputs: torch.Tensor
    targets: torch.Tensor
    begins: torch.Tensor | None  # of conversations

    def each(self, act: Callable[[torch.Tensor], torch.Tensor]) -> Batch:
        """What `act` makes of its tensors."""
        begins = None if self.begins is None else act(self.begins)
        return Batch(act(self.inputs), act(self.targets), begins)


def fed(blocks: Blocks, batches: list[list[int]], device: torch.device) -> Iterator[Batch]:
    """Each micro-batch on the device; batches: the numbers of its blocks.

    To a GPU they are copied from pinned memory, so that the program need not wait for what the GPU
    was given before, and the next ones are read meanwhile. A CPU computes all the while, and a
    thread that reads would only take time from it.
    """
    if device.type != "cuda":
        for numbers in batches:
            yield read(blocks, numbers).each(lambda one: one.to(device))
        return
    for batch in ahead(
        batches, lambda numbers: read(blocks, numbers).each(torch.Tensor.pin_memory)
    ):
        yield batch.each(lambda one: one.to(device, non_blocking=True))


def read(blocks: Blocks, numbers: Sequence[int]) -> Batch:
    """The blocks in memory."""
    inputs, targets = blocks.inputs_and_targets(numbers)
    batch = Batch(torch.from_numpy(inputs), torch.from_numpy(targets), None)
    begins = blocks.begins(numbers)
    return batch if begins is None else batch._replace(begins=torch.from_numpy(begins))


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
