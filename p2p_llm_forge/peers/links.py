"""How fast the network between the peers is: latency and bandwidth of every pair, measured."""

from __future__ import annotations

import itertools
import math
import os
import statistics
import time
from dataclasses import dataclass

import torch
import torch.distributed as dist

from p2p_llm_forge.peers.cluster import Cluster

ECHOES = 8  # round trips that the latency is the median of, after one that warms up
FIRST_BYTES, LARGEST_BYTES, GROWTH = 16 << 10, 16 << 20, 4
CHUNKS_AHEAD = 2  # the link stays busy while the receiver's answer travels
SHORTEST_CHUNK_S = 0.04
ROUND_TRIPS_OF_A_CHUNK = 4
CHUNKS_MEASURED = 4  # the least that a rate is taken from
STOP = 0
ALL_LINKS_S = 30.0  # what measuring all links may take, about
LINK_S, SHORTEST_LINK_S = 0.5, 0.15  # for one link in one direction


@dataclass(frozen=True)
class Links:
    """The network as the ranks see it: matrices [from][to], NaN on the diagonal.

    `latency_s` is half the time of a small message and its answer, the same in both directions.
    `bytes_per_s` is what one stream carries with all other links idle.
    """

    latency_s: list[list[float]]
    bytes_per_s: list[list[float]]

    def slowest(self) -> tuple[int, int, float]:
        """(from, to, bytes per second) of the link with the smallest bandwidth; needs two ranks."""
        pairs = itertools.permutations(range(len(self.bytes_per_s)), 2)
        rate, source, target = min((self.bytes_per_s[a][b], a, b) for a, b in pairs)
        return source, target, rate


def measure_links(cluster: Cluster) -> Links:
    """Measure every pair of ranks, one link in one direction at a time. All ranks must call.

    Takes about half a second for each, with many ranks less; a link with long round trips more.
    """
    world = cluster.world_size
    budget_s = max(SHORTEST_LINK_S, min(LINK_S, ALL_LINKS_S / max(1, world * (world - 1))))
    latency_s, bytes_per_s = ([[math.nan] * world for _ in range(world)] for _ in range(2))
    if world == 1:
        return Links(latency_s, bytes_per_s)
    chunk = torch.frombuffer(bytearray(os.urandom(LARGEST_BYTES)), dtype=torch.uint8)
    with cluster.wire() as wire:
        for one, other in itertools.combinations(range(world), 2):
            one_way_s = _latency(cluster, wire, one, other)
            latency_s[one][other] = latency_s[other][one] = one_way_s
            for source, target in ((one, other), (other, one)):
                rate = math.nan
                if cluster.rank == source:
                    _stream(wire, target, chunk)
                elif cluster.rank == target:
                    rate = _time_stream(wire, source, chunk, one_way_s, budget_s)
                bytes_per_s[source][target] = cluster.gather_numbers([rate])[target][0]
    return Links(latency_s, bytes_per_s)


def _latency(cluster: Cluster, wire: dist.ProcessGroup, one: int, other: int) -> float:
    """Half a round trip between two ranks in seconds, the same number on every rank."""
    note, seconds = torch.zeros(1, dtype=torch.int64), []
    for _ in range(ECHOES + 1):
        started = time.perf_counter()
        if cluster.rank == one:
            wire.send([note], other, 0).wait()
            wire.recv([note], other, 0).wait()
        elif cluster.rank == other:
            wire.recv([note], one, 0).wait()
            wire.send([note], one, 0).wait()
        seconds.append(time.perf_counter() - started)
    return cluster.gather_numbers([statistics.median(seconds[1:]) / 2])[one][0]


def _stream(wire: dist.ProcessGroup, target: int, chunk: torch.Tensor) -> None:
    """Send chunks of the sizes that the receiver asks for, until it asks for none."""
    size = torch.zeros(1, dtype=torch.int64)
    sent = [wire.send([chunk[:FIRST_BYTES]], target, 0) for _ in range(CHUNKS_AHEAD)]
    while True:
        wire.recv([size], target, 0).wait()
        if size.item() == STOP:
            break
        sent.append(wire.send([chunk[: int(size.item())]], target, 0))
    for work in sent:
        work.wait()


def _time_stream(
    wire: dist.ProcessGroup, source: int, chunk: torch.Tensor, latency_s: float, budget_s: float
) -> float:
    """Ask for chunks until the budget is used; the bytes per second of the stream's second half.

    Its start is discarded: a shaper lets a burst through at the speed of the wire, and TCP begins
    slowly. Chunks grow until one takes several round trips, so that answers cost nothing.
    """
    buffer = torch.empty_like(chunk)
    chunk_s = max(SHORTEST_CHUNK_S, ROUND_TRIPS_OF_A_CHUNK * 2 * latency_s)
    budget_s = max(budget_s, 2 * CHUNKS_MEASURED * chunk_s)
    sizes = [FIRST_BYTES] * CHUNKS_AHEAD
    works = [wire.recv([buffer[:size]], source, 0) for size in sizes]
    arrivals: list[tuple[float, int]] = []  # (when, bytes until then)
    started, total = time.perf_counter(), 0
    for number, work in enumerate(works):  # grows while it is read
        work.wait()
        now = time.perf_counter()
        last_s = now - (arrivals[-1][0] if arrivals else started)
        total += sizes[number]
        arrivals.append((now, total))
        half = [when for when, _ in arrivals if when - started > (now - started) / 2]
        is_enough = now - started > budget_s and len(half) > CHUNKS_MEASURED
        if STOP in sizes:
            continue  # what is still on its way
        wanted = sizes[number] * chunk_s / max(last_s, 1e-6)
        size = STOP if is_enough else int(min(max(wanted, FIRST_BYTES), GROWTH * sizes[-1]))
        size = min(size, LARGEST_BYTES)
        wire.send([torch.tensor([size])], source, 0).wait()
        sizes.append(size)
        if size != STOP:
            works.append(wire.recv([buffer[:size]], source, 0))
    return _slope(started, arrivals)


def _slope(started: float, arrivals: list[tuple[float, int]]) -> float:
    """Bytes per second over the second half of the time. arrivals: (when, bytes until then)."""
    end, total = arrivals[-1]
    when, before = next(entry for entry in arrivals if entry[0] - started > (end - started) / 2)
    return (total - before) / (end - when)
