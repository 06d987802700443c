"""DiLoCo's outer step, and which part of the model takes it when: pure functions."""

from __future__ import annotations

import math
from itertools import accumulate, pairwise
from typing import Any

import torch
from torch import Tensor

from p2p_llm_forge.errors import ForgeError

FULL_ROUND = 20  # updates in a round from which on the outer step is as large as it ever is
FULL_MOMENTUM = 0.8
# With Muon: between two ranks, and how much more each doubling of their number takes.
OF_MUON = (0.6, 0.15), (0.6, 0.05)  # rate, momentum
Unit = list[tuple[str, torch.nn.Parameter]]  # neighbours that are synchronised together


def outer_step(
    anchor: Tensor,
    pseudo_gradient: Tensor,
    momentum_buffer: Tensor | None,
    lr: float,
    momentum: float,
) -> tuple[Tensor, Tensor | None]:
    """One step of SGD with Nesterov momentum. Returns the new anchor and momentum buffer.

    anchor: the weights that the peers agreed on last. pseudo_gradient: anchor minus the peers'
    averaged weights. momentum_buffer: what the step before returned, None before the first. All
    float32 of one shape; none is changed, so a round that fails has changed nothing. The arithmetic
    is that of torch.optim.SGD(nesterov=True), bit for bit. Momentum 0 has no buffer, and with lr 1
    gives anchor - pseudo_gradient exactly: plain averaging.
    Source: DiLoCo, arXiv 2311.08105, algorithm 1.
    """
    if momentum == 0:
        return torch.add(anchor, pseudo_gradient, alpha=-lr), None
    if momentum_buffer is None:
        buffer = pseudo_gradient.clone()
    else:
        buffer = torch.mul(momentum_buffer, momentum).add_(pseudo_gradient)
    direction = torch.add(pseudo_gradient, buffer, alpha=momentum)
    return torch.add(anchor, direction, alpha=-lr, out=direction), buffer


def settings_of_rounds(
    lr: float | None, momentum: float | None, ranks: int, every: int, optimizer: str | None = None
) -> tuple[float, float]:
    """The outer rate and momentum asked for; what is not asked suits so many ranks and updates.

    optimizer: that of the updates.

    In rounds of FULL_ROUND updates and more: momentum 0.8, and rate 0.5 of two ranks, 0.7 of four,
    1 of eight. The rate grows with the root of their number. Where noise rules, AdamW divides a
    gradient by the noise of its batch: ranks that read a part each take steps of the same size, but
    that much less of them is common to all and outlives the average.
    Shorter rounds part less, so both come closer to plain averaging (1 and 0), by the cube root of
    their length. With Muon less momentum is best: 0.6 and 0.6 of two ranks, 0.75 and 0.65 of four;
    of eight it is a guess. Figures: benchmarks/README.md.
    """
    reach = min(1.0, (every / FULL_ROUND) ** (1 / 3))
    usual_lr = 1 + (min(1.0, math.sqrt(ranks / 8)) - 1) * reach
    usual_momentum = FULL_MOMENTUM * reach
    if optimizer == "muon":
        doublings = math.log2(max(ranks, 2) / 2)
        of_rate, of_momentum = (at + more * doublings for at, more in OF_MUON)
        usual_lr = max(usual_lr, min(1.0, of_rate))
        usual_momentum = min(usual_momentum, of_momentum)
    return usual_lr if lr is None else lr, usual_momentum if momentum is None else momentum


def outer_settings(
    rounds_done: int, lr: float, momentum: float, warmup_rounds: int
) -> tuple[float, float]:
    """The rate and momentum of the outer step after so many rounds.

    They go from those of plain averaging (1 and 0) in equal steps to those asked for, which they
    reach after `warmup_rounds`: the first pseudo-gradients are large and soon outdated, and a run
    of few rounds would end before momentum has made up for a rate below 1. Rate 1 and momentum 0
    stay exactly so. Figures: benchmarks/diloco_sweep.py.
    """
    if rounds_done >= warmup_rounds:
        return lr, momentum
    progress = rounds_done / warmup_rounds
    return 1 + (lr - 1) * progress, momentum * progress


def units_of(lm: Any) -> list[Unit]:
    """The model's parameters in the parts that a fragment is made of: what comes before the layers
    (embeddings), each layer, what comes after. Tied weights count where they come first; what is
    not trained, nowhere."""
    sizes = {
        f"{name}.": sum(p.numel() for p in module.parameters())
        for name, module in lm.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    }
    # The largest: a layer may itself hold a longer list, of experts.
    stack, unit = max(sizes, key=lambda name: sizes[name], default="no list"), "before"
    units: dict[str, Unit] = {}
    trained = ((name, p) for name, p in lm.named_parameters() if p.requires_grad)
    for name, parameter in trained:
        if name.startswith(stack):
            unit = name.removeprefix(stack).partition(".")[0]  # the layer's number
        elif unit != "before":
            unit = "behind"
        units.setdefault(unit, []).append((name, parameter))
    return list(units.values())


def fragments_of(sizes_by_unit: list[int], count: int) -> list[list[int]]:
    """Divide units into `count` fragments of neighbours, the largest as small as possible.

    sizes_by_unit: parameters of the embedding, of each layer, of the head, in order. Returns the
    units' numbers, fragment by fragment; of equally good divisions an even one. Raises ForgeError
    where there are fewer units than fragments. Source: Streaming DiLoCo, arXiv 2501.18512.
    """
    units = len(sizes_by_unit)
    if not 1 <= count <= units:
        raise ForgeError(
            f"--fragments {count} was asked, but this model has {units} parts (its layers, and"
            " what lies before and behind)",
            f"use {units} or fewer",
        )
    until = [0, *accumulate(sizes_by_unit)]
    # The best division of the units before each end: its largest, its evenness, where it cuts.
    best: dict[int, tuple[int, int, list[int]]] = {0: (0, 0, [0])}
    for number in range(1, count + 1):
        best = {
            end: min(
                (max(largest, size := until[end] - until[cut]), squares + size**2, [*cuts, end])
                for cut, (largest, squares, cuts) in best.items()
                if cut < end
            )
            for end in range(number, len(until))
        }
    return [list(range(first, end)) for first, end in pairwise(best[units][2])]


def fragment_due(done: int, every: int, fragments: int) -> list[int]:
    """The fragments that are synchronised after update number `done`, counted from 1.

    Each once in `every` updates, evenly spread, the last (or only) one when `every` divides `done`.
    """
    return [p for p in range(fragments) if done % every == (p + 1) * every // fragments % every]
