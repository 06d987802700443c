"""What DiLoCo's ranks should come to: plain Python, one float64 at a time."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tests.sync.ranks import SIZES, moved

WHOLE = [(0, sum(SIZES))]
HALVES = [(0, SIZES[0]), (SIZES[0], sum(SIZES))]  # the embedding is as large as all layers


def simulated(
    updates: int, tokens: Sequence[int], settings: dict[str, Any], groups: list[tuple[int, int]]
) -> list[list[list[float]]]:
    """The ranks' weights after every update, by update and rank.

    groups: the (first, end) weights of each fragment.
    """
    count, ranks = sum(SIZES), range(len(tokens))
    every, overlap = settings["sync_every"], settings.get("overlap_steps", 0)
    less = 1 - (len(tokens) / 8) ** 0.5  # than plain averaging takes, in rounds of 20 updates
    outer_lr = settings["outer_lr"] or 1 - less * min(20, every) ** (1 / 3) / 20 ** (1 / 3)
    momentum = settings["outer_momentum"]
    start = [-1 + 2 * n / (SIZES[0] - 1) for n in range(SIZES[0])] + [0.5] * (count - SIZES[0])
    local = [list(start) for _ in ranks]
    anchor, buffer = list(start), [0.0] * count
    sent: dict[int, tuple] = {}
    sent_at: dict[int, int] = {}
    since = [[0.0] * len(groups) for _ in ranks]
    trace = []

    def land(number: int) -> None:
        first, end = groups[number]
        snapshots, parts = sent.pop(number)
        for w in range(first, end):
            gradient = sum(
                part * (anchor[w] - snap[w]) for part, snap in zip(parts, snapshots, strict=True)
            )
            buffer[w] = momentum * buffer[w] + gradient
            new = anchor[w] - outer_lr * (gradient + momentum * buffer[w])
            for rank in ranks:
                local[rank][w] += new - snapshots[rank][w]
            anchor[w] = new

    for step in range(updates):
        for rank in ranks:
            for w, amount in enumerate(moved(rank, step, count)):
                local[rank][w] += amount
            since[rank] = [n + tokens[rank] for n in since[rank]]
        done, is_last = step + 1, step + 1 == updates
        for number in list(sent):
            if is_last or sent_at[number] + overlap == done:
                land(number)
        for number in range(len(groups)):
            is_due = done % every == (number + 1) * every // len(groups) % every
            if is_last or is_due:
                total = sum(since[rank][number] for rank in ranks)
                parts = [since[rank][number] / total for rank in ranks]
                sent[number] = ([list(weights) for weights in local], parts)
                sent_at[number] = done
                for rank in ranks:
                    since[rank][number] = 0.0
                if is_last or overlap == 0:
                    land(number)
        trace.append([list(weights) for weights in local])
    return trace
