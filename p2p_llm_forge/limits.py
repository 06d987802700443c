"""What this process may take of its machine: memory and cores, within all limits on it."""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil

from p2p_llm_forge.memory import return_memory

MACHINE = Path("/")


@dataclass(frozen=True)
class MemoryFiles:
    """What Linux calls the files of a group that say what it may take, and has taken."""

    most: str
    used: str
    cache: str  # in memory.stat: of files that nobody has read lately, which the kernel gives up


UNIFIED = MemoryFiles("memory.max", "memory.current", "inactive_file")
# Of version 1, where the figures of a group are with those below it only under this name.
OLDER = MemoryFiles("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_memory() -> float:
    """Bytes that this process can still take: of its machine, its control groups, its ulimit.

    What lies free in its own heap counts, too: it is given back first. (Of a ulimit only what lies
    at the heap's end comes back.)
    """
    return_memory()
    free_here = [float(psutil.virtual_memory().available), *free_in_groups()]
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            free_here.append(most - psutil.Process().memory_info().vms)
    return max(0.0, min(free_here))


def cores() -> int:
    """The cores that this process may use: those it may run on, or fewer by its share of time.

    A container with --cpus 2 runs on all cores of its machine, for two seconds a second: more
    threads wait for each other. A part of a core counts as one.
    """
    here = os.cpu_count() or 1
    if hasattr(os, "sched_getaffinity"):
        here = len(os.sched_getaffinity(0))
    return max(1, min([here, *map(math.ceil, shares_of_groups())]))


def free_in_groups(machine: Path = MACHINE) -> list[float]:
    """What is left of the limits of control groups: that of this process, and all around it.

    A container sees its own at the root of /sys/fs/cgroup. Slurm and systemd set limits further
    in, and on any of the groups around it. Other systems than Linux have none.
    """
    left = []
    for folder, is_older in groups_of_process("memory", machine):
        files = OLDER if is_older else UNIFIED
        with contextlib.suppress(OSError, ValueError):  # no such group here, or no limit: "max"
            most = int((folder / files.most).read_text())
            used = int((folder / files.used).read_text())
            left.append(float(most - max(0, used - reclaimable(folder, files))))
    return left


def shares_of_groups(machine: Path = MACHINE) -> list[float]:
    """Seconds of a core that each group around this process may take in a second."""
    shares = []
    for folder, is_older in groups_of_process("cpu", machine):
        with contextlib.suppress(OSError, ValueError):
            if is_older:
                names = ("cpu.cfs_quota_us", "cpu.cfs_period_us")
                quota, period = (int((folder / name).read_text()) for name in names)
            else:
                quota, period = map(int, (folder / "cpu.max").read_text().split())
            if quota > 0 and period > 0:  # of version 1, -1 is no limit
                shares.append(quota / period)
    return shares


def groups_of_process(controller: str, machine: Path = MACHINE) -> Iterator[tuple[Path, bool]]:
    """The folders of this process's group and of those around it; and whether of version 1."""
    try:
        lines = (machine / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = machine / "sys/fs/cgroup"
    for line in lines:  # number:controllers:path, and version 2 is 0::path
        number, controllers, path = line.split(":", 2)
        if number != "0" and controller not in controllers.split(","):
            continue
        root = mounted
        if number != "0":  # named by all its controllers, often with a link for each
            names = (controller, controllers)
            root = next((mounted / one for one in names if (mounted / one).is_dir()), mounted)
        # In a container the path can be the machine's, of which only the root is seen.
        inner = PurePosixPath(path.lstrip("/"))
        if ".." not in inner.parts:
            yield from ((root / one, number != "0") for one in (inner, *inner.parents) if one.name)
        yield root, number != "0"


def reclaimable(folder: Path, files: MemoryFiles) -> int:
    """Bytes of page cache that count as used, and that the kernel gives up before it fails."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines).get(files.cache, 0))
    return 0
