"""What peers bring each other at a start: what travels, from whom, how long it takes, if it may."""

from __future__ import annotations

import contextlib
import math
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.fetching import UNASKED
from p2p_llm_forge.errors import ForgeError, Problems
from p2p_llm_forge.files import Lock, erase
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.file_exchange import FileExchange
from p2p_llm_forge.peers.findings import as_sent_by
from p2p_llm_forge.peers.keepers import keep
from p2p_llm_forge.peers.links import SHORTEST_LINK_S, Links, measure_links
from p2p_llm_forge.peers.preflight import hosts_of
from p2p_llm_forge.shapes import is_count, require_shape
from p2p_llm_forge.training.numbers import duration

Result = TypeVar("Result")

SPARE = 2**20  # bytes that a disk needs beside the files
UNMEASURED = 2**20  # bytes that are there before a link is measured


@dataclass(frozen=True)
class Trip:
    """Files of one kind that a rank fetches from those that have them. bytes: yet to come.

    what: data, model or checkpoint; where: the folder they come into.
    """

    what: str
    to: int
    sources: tuple[int, ...]
    bytes: int
    where: str


@dataclass(frozen=True)
class Errand:
    """A set of files that ranks lack, as one of the ranks sees it.

    flag: what the folder was given by, for messages. key, offered: under which sources offer them,
    and on a source its folder and their names. lock: on a rank that lacks them, of the folder.
    begin: there, when the lock is held: the bytes that have yet to come; None: they are there after
    all. fetch: then gets them from sources (rank -> key), verified; publish: puts them in place.
    """

    what: str
    flag: str
    folder: Path
    key: str
    sources: tuple[int, ...]
    offered: tuple[Path, Iterable[str]] | None
    lock: Path | None
    begin: Callable[[], int | None]
    fetch: Callable[[FileExchange, Mapping[int, str]], None]
    publish: Callable[[], None]


def run_errand(config: TrainConfig, cluster: Cluster, errand: Errand) -> None:
    """Bring the files to all ranks that lack them; of those that see one folder, one fetches.

    All ranks must call. Raises ForgeError on all; what has come by then stays for the next try.
    """
    exchange = cluster.open_files()
    if errand.offered:
        exchange.offer(errand.key, *errand.offered)
    sources = dict.fromkeys(errand.sources, errand.key)
    try:
        what = f"{errand.flag} {errand.folder}"
        with keep(cluster, errand.lock, what) as (_, lock), no_empty_folders(errand, lock):
            is_asked = errand.lock is not None and lock is not None
            missing = cluster.together(lambda: begun(errand) if is_asked else None)
            announce(config, cluster, all_trips(cluster, errand, missing))

            def bring() -> None:
                if missing is not None and lock is not None:
                    errand.fetch(exchange, sources)
                    lock.confirm()
                    written(errand, errand.publish)

            cluster.together(bring)
    finally:
        exchange.withdraw(errand.key)
    if errand.lock is not None:
        with contextlib.suppress(OSError):  # not empty
            errand.lock.parent.rmdir()


def all_trips(cluster: Cluster, errand: Errand, missing: int | None) -> list[Trip]:
    """The trips of all ranks, of which each knows what it is missing. All must call."""
    trips = []
    facts = cluster.gather_facts({"missing": missing, "folder": str(errand.folder)})
    for rank, fact in enumerate(facts):
        with as_sent_by(f"rank {rank}"):
            require_shape(fact, {"missing": (None, is_count), "folder": str})
        if fact["missing"] is not None:
            trip = Trip(errand.what, rank, errand.sources, fact["missing"], fact["folder"])
            trips.append(trip)
    return trips


def begun(errand: Errand) -> int | None:
    """What has yet to come. Raises ForgeError where there is no room for it, before any comes."""
    missing = written(errand, errand.begin)
    if missing is None or errand.lock is None:
        return None
    require_room(errand.lock.parent, missing, f"{errand.folder} has no room for the {errand.what}")
    return missing


def require_room(
    there: Path, missing: int, found: str, otherwise: str = "give another folder"
) -> None:
    """Raise ForgeError unless the disk of a folder has room for what has yet to come."""
    free = shutil.disk_usage(there).free
    if missing and missing + SPARE > free:
        raise ForgeError(
            f"{found}: {missing:,} bytes are yet to come, {free:,} are free there",
            f"make room there, {missing + SPARE - free:,} bytes more, or {otherwise}",
        )


@contextlib.contextmanager
def no_empty_folders(errand: Errand, lock: Lock | None) -> Iterator[None]:
    """Leave none behind where the lock lies, whatever happens inside."""
    try:
        yield
    finally:
        if errand.lock is not None and lock is not None and not lock.is_lost:
            erase(errand.lock.parent, ())


def written(errand: Errand, act: Callable[[], Result]) -> Result:
    """What `act` returns, which writes into the folder. Raises ForgeError where it cannot."""
    try:
        return act()
    except OSError as error:
        raise ForgeError(
            f"{errand.flag} {errand.folder} cannot be written: {error.strerror or error}",
            "make it writable, or give another folder",
        ) from error


def announce(config: TrainConfig, cluster: Cluster, trips: Sequence[Trip]) -> None:
    """Print what travels and how long it takes by links that are measured for it. All must call.

    trips: the same on all ranks. Raises ForgeError where it is too much to be fetched unasked.
    """
    coming = [trip for trip in trips if trip.bytes]
    if not coming:
        return
    hosts, lines = hosts_of(cluster), journeys(coming)
    links = None
    if any(trip.bytes > UNMEASURED for trip in coming):
        links = measure_links(cluster, lines, SHORTEST_LINK_S)
    if config.fetch != "yes":
        refuse_too_much(coming, hosts, links)
    if cluster.is_main:
        print("\n".join(in_words(coming, hosts, links)), flush=True)


def journeys(trips: Sequence[Trip]) -> set[tuple[int, int]]:
    """The links that are used, (from, to)."""
    return {(source, trip.to) for trip in trips for source in trip.sources}


def seconds_for(trips: Sequence[Trip], links: Links) -> float:
    """How long it takes when all fetch at once.

    A link was measured with all others idle, so it carries no more than its ends can: nobody
    receives faster than by the best of its links, nobody sends faster than by the best of theirs.
    """
    rates = [[max(1.0, rate) for rate in row] for row in links.bytes_per_s]
    seconds = [0.0]
    for trip in trips:
        seconds.append(trip.bytes / max(rates[source][trip.to] for source in trip.sources))
    for sources in {trip.sources for trip in trips}:
        of_these = [trip for trip in trips if trip.sources == sources]
        sent = sum(trip.bytes for trip in of_these)
        able = sum(max(rates[source][trip.to] for trip in of_these) for source in sources)
        seconds.append(sent / able)
    return max(seconds)


def in_words(trips: Sequence[Trip], hosts: Sequence[str], links: Links | None) -> list[str]:
    """A line for each kind of files: `data  2.15 GB from rank 0 (a) to rank 1 (b): about ...`."""
    lines = []
    for what in dict.fromkeys(trip.what for trip in trips):
        of_kind = [trip for trip in trips if trip.what == what]
        size = " + ".join(dict.fromkeys(size_in_words(trip.bytes) for trip in of_kind))
        sources = sorted({source for trip in of_kind for source in trip.sources})
        targets = sorted({trip.to for trip in of_kind})
        each = " each" if len(targets) > 1 else ""
        both = f"from {named(sources, hosts)} to {named(targets, hosts)}"
        lines.append(f"{what:9} {size}{each} {both}{time_in_words(of_kind, links)}")
    return lines


def time_in_words(trips: Sequence[Trip], links: Links | None) -> str:
    """How long it takes and by what; nothing where it is not known."""
    if links is None:
        return ""
    rates = [links.bytes_per_s[source][target] for source, target in journeys(trips)]
    known = [rate for rate in rates if not math.isnan(rate)]
    slow, fast = (f"{rate * 8 / 1e6:.0f}" for rate in (min(known), max(known)))
    between = slow if slow == fast else f"{slow} to {fast}"
    return f": about {duration(seconds_for(trips, links))} at {between} Mbit/s"


def refuse_too_much(trips: Sequence[Trip], hosts: Sequence[str], links: Links | None) -> None:
    """Raise ForgeError for what a machine shall not fetch unasked."""
    problems = Problems()
    for trip in trips:
        sources, target = named(trip.sources, hosts), named([trip.to], hosts)
        time = time_in_words([trip], links).replace(": about ", ", in about ")
        problems.require(
            trip.bytes <= UNASKED,
            f"{target} lacks the {trip.what} in {trip.where}: {size_in_words(trip.bytes)} would"
            f" come from {sources}{time}, and more than {size_in_words(UNASKED)} are not fetched"
            " unasked",
            "add --fetch yes on all machines, or copy the folder there by hand",
        )
    problems.raise_any()


def named(ranks: Sequence[int], hosts: Sequence[str]) -> str:
    """Ranks with their hosts, for a sentence."""
    words = [f"rank {rank} ({hosts[rank]})" for rank in ranks]
    return words[0] if len(words) == 1 else f"{', '.join(words[:-1])} and {words[-1]}"


def size_in_words(size: int) -> str:
    """Bytes for a person: 12 kB, 3.4 MB, 2.15 GB."""
    for unit, name, digits in ((10**9, "GB", 2), (10**6, "MB", 1)):
        if size >= unit:
            return f"{size / unit:.{digits}f} {name}"
    return f"{max(1, round(size / 1000))} kB" if size else "0 kB"
