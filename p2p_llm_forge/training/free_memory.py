"""The memory that a process can still take: of its device; or of machine, groups and limits."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import psutil
import torch

MACHINE = Path("/")


@dataclass(frozen=True)
class Files:
    """What Linux calls the files of a group that say what it may take, and has taken."""

    most: str
    used: str
    cache: str  # in memory.stat: of files that nobody has read lately, which the kernel gives up


UNIFIED = Files("memory.max", "memory.current", "inactive_file")
# Of version 1, where the figures of a group are with those below it only under this name.
OLDER = Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")


def free_bytes(device: torch.device) -> float:
    """Memory that this process can still take."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
        return float(free + unused)
    free_here = [float(psutil.virtual_memory().available), *free_in_groups()]
    with contextlib.suppress(ImportError):  # not on Windows
        import resource

        most, _ = resource.getrlimit(resource.RLIMIT_AS)
        if most != resource.RLIM_INFINITY:
            free_here.append(most - psutil.Process().memory_info().vms)
    return max(0.0, min(free_here))


def free_in_groups(machine: Path = MACHINE) -> list[float]:
    """What is left of the limits of control groups: that of this process, and all around it.

    A container sees its own at the root of /sys/fs/cgroup. Slurm and systemd set limits further
    in, and on any of the groups around it. Other systems than Linux have none.
    """
    left = []
    for folder, files in groups_of_process(machine):
        with contextlib.suppress(OSError, ValueError):  # no such group here, or no limit: "max"
            most = int((folder / files.most).read_text())
            used = int((folder / files.used).read_text())
            left.append(float(most - max(0, used - reclaimable(folder, files))))
    return left


def groups_of_process(machine: Path = MACHINE) -> Iterator[tuple[Path, Files]]:
    """The folders of this process's group and of those around it, up to the root."""
    try:
        lines = (machine / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounted = machine / "sys/fs/cgroup"
    for line in lines:  # number:controllers:path, and version 2 is 0::path
        number, controllers, path = line.split(":", 2)
        if number == "0":
            root, files = mounted, UNIFIED
        elif "memory" in controllers.split(","):
            root, files = mounted / "memory", OLDER
        else:
            continue
        # In a container the path can be the machine's, of which only the root is seen.
        inner = PurePosixPath(path.lstrip("/"))
        if ".." not in inner.parts:
            yield from ((root / one, files) for one in (inner, *inner.parents) if one.name)
        yield root, files


def reclaimable(folder: Path, files: Files) -> int:
    """Bytes of page cache that count as used, and that the kernel gives up before it fails."""
    with contextlib.suppress(OSError, ValueError):
        lines = (folder / "memory.stat").read_text().splitlines()
        return int(dict(line.split() for line in lines).get(files.cache, 0))
    return 0
