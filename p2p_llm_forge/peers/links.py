"""How fast the network between the peers is: latency and bandwidth of every pair, measured."""

from __future__ import annotations

import array
import contextlib
import itertools
import math
import os
import secrets
import socket
import statistics
import time
from collections.abc import Collection, Iterator
from dataclasses import dataclass

import torch
import torch.distributed as dist

from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.routes import own_address

ECHOES = 8  # round trips that the latency is the median of, after one that warms up
PIECE_BYTES = 256 << 10
SAMPLE_S, EXACT_S = 0.002, 0.001  # between looks at what has come; the longest that one may take
SAMPLES_NEEDED = 24
CONNECT_S, SILENCE_S = 30.0, 10.0
AGREEMENT = 0.05  # of the middle half of all slopes, at which the measuring ends
ALL_LINKS_S = 30.0  # what measuring all links may take, about
LINK_S, SHORTEST_LINK_S = 0.5, 0.15  # for one link in one direction, on a quiet machine
LONGER = 4  # times as long where the rate is not clear by then


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


def measure_links(
    cluster: Cluster, asked: Collection[tuple[int, int]] | None = None, link_s: float = LINK_S
) -> Links:
    """Measure every pair of ranks, one link in one direction at a time. All ranks must call.

    Takes about a second for each, with many ranks less; a link with long round trips, or between
    busy machines, more. asked: only these links, (from, to); of others nothing is known (NaN).
    link_s: what one of them may take, about.
    """
    world = cluster.world_size
    links = set(itertools.permutations(range(world), 2) if asked is None else asked)
    budget_s = max(SHORTEST_LINK_S, min(link_s, ALL_LINKS_S / max(1, len(links))))
    latency_s, bytes_per_s = ([[math.nan] * world for _ in range(world)] for _ in range(2))
    if world == 1:
        return Links(latency_s, bytes_per_s)
    own = own_address()
    family = socket.AF_INET6 if ":" in own else socket.AF_INET
    with socket.create_server((own, 0), family=family) as server, cluster.wire() as wire:
        facts = {"address": own, "port": server.getsockname()[1], "token": secrets.token_hex(16)}
        ends = cluster.gather_facts(facts)
        for one, other in sorted({(min(link), max(link)) for link in links}):
            one_way_s = _latency(cluster, wire, one, other)
            latency_s[one][other] = latency_s[other][one] = one_way_s
            for source, target in sorted(links & {(one, other), (other, one)}):
                rate = math.nan
                if cluster.rank == source:
                    _stream(str(ends[target]["address"]), ends[target]["port"], ends[source])
                elif cluster.rank == target:
                    rate = _time_stream(server, str(ends[source]["token"]), one_way_s, budget_s)
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


def _stream(address: str, port: int, own: dict[str, object]) -> None:
    """Send as fast as the link takes it, until the receiver has seen enough and closes."""
    data = os.urandom(PIECE_BYTES)
    with socket.create_connection((address, port), timeout=CONNECT_S) as stream:
        stream.settimeout(SILENCE_S)
        with contextlib.suppress(OSError):
            stream.sendall(str(own["token"]).encode())
            while True:
                stream.sendall(data)


def _time_stream(server: socket.socket, token: str, latency_s: float, budget_s: float) -> float:
    """The bytes per second that arrive here, once their rate is clear.

    Counted is what the kernel has received, whether or not this process has had the time to read
    it. The start is discarded: a shaper lets a burst through at the speed of the wire, and TCP
    begins slowly.
    """
    budget_s = max(budget_s, 60 * latency_s)
    buffer, samples, total = bytearray(PIECE_BYTES), [(time.perf_counter(), 0)], 0
    with _accepted(server, token) as stream:
        stream.settimeout(SILENCE_S)
        started = time.perf_counter()
        with contextlib.suppress(TimeoutError):
            while received := stream.recv_into(buffer):
                total += received
                if time.perf_counter() < samples[-1][0] + SAMPLE_S:
                    continue
                if (sample := _sample(stream, total)) is not None:
                    samples.append(sample)
                    if _is_clear(started, samples, budget_s):
                        break
    if slopes := _slopes(_second_half(started, samples)):
        return statistics.median(slopes)
    return total / (time.perf_counter() - started)


@contextlib.contextmanager
def _accepted(server: socket.socket, token: str) -> Iterator[socket.socket]:
    """The connection of the one who knows the token."""
    server.settimeout(CONNECT_S)
    while True:
        stream, _ = server.accept()
        with stream:
            stream.settimeout(CONNECT_S)
            if stream.recv(len(token), socket.MSG_WAITALL).decode(errors="replace") == token:
                yield stream
                return


def _sample(stream: socket.socket, read: int) -> tuple[float, int] | None:
    """(when, bytes received until then); None if this process was stopped in between."""
    now = time.perf_counter()
    received = read + _unread(stream)
    return (now, received) if time.perf_counter() < now + EXACT_S else None


def _unread(stream: socket.socket) -> int:
    """The bytes that the kernel has received and this process has not read."""
    try:
        import fcntl
        import termios
    except ImportError:  # Windows
        return 0
    waiting = array.array("i", [0])
    fcntl.ioctl(stream, termios.FIONREAD, waiting)
    return waiting[0]


def _is_clear(started: float, samples: list[tuple[float, int]], budget_s: float) -> bool:
    """Whether the rate will hardly change any more, or has taken long enough."""
    spent = samples[-1][0] - started
    if spent < budget_s or len(samples) < SAMPLES_NEEDED:
        return False
    slopes = _slopes(_second_half(started, samples))
    if len(slopes) < SAMPLES_NEEDED // 4:
        return spent > LONGER**2 * budget_s  # so busy is this machine
    if spent > LONGER * budget_s:
        return True
    low, middle, high = statistics.quantiles(slopes, n=4)
    return high - low < AGREEMENT * middle


def _second_half(started: float, samples: list[tuple[float, int]]) -> list[tuple[float, int]]:
    """Those in the second half of the time."""
    end = samples[-1][0]
    return [sample for sample in samples if sample[0] - started >= (end - started) / 2]


def _slopes(samples: list[tuple[float, int]]) -> list[float]:
    """Bytes per second over every quarter of the time, from each sample on. Their median does not
    mind moments in which a busy sender sent nothing, nor the burst that comes after."""
    quarter, slopes, later = (samples[-1][0] - samples[0][0]) / 4, [], 0
    for when, before in samples:
        while later < len(samples) and samples[later][0] < when + quarter:
            later += 1
        if later == len(samples) or quarter <= 0:
            break
        slopes.append((samples[later][1] - before) / (samples[later][0] - when))
    return slopes
