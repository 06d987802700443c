"""Disks of their own for hosts: one path means another folder on each, and nothing is shared.

python disks.py BACKING SEEN_AS HIDDEN PROGRAM ...   runs a program that finds such a disk
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from tests.multihost.hosts import Host

MS_BIND = 0x1000  # from sys/mount.h of Linux


@dataclass(frozen=True)
class Disk:
    """What a host's processes find at `seen_as` lies, for the test, in `backing`.

    All else in `hidden`, a folder around both, they do not see; what they write there is nobody's.
    """

    backing: Path
    seen_as: Path
    hidden: Path = field(repr=False)

    def enter(self) -> None:
        """See the disk from now on. The process must be in a mount namespace of its own."""
        libc = ctypes.CDLL(None, use_errno=True)
        folder, here = os.open(self.backing, os.O_PATH), os.getcwd()

        def mount(source: str, target: Path, kind: bytes | None, flags: int) -> None:
            failed = libc.mount(source.encode(), bytes(target), kind, flags, None)
            assert not failed, f"{target}: {os.strerror(ctypes.get_errno())}"

        mount("none", self.hidden, b"tmpfs", 0)
        self.seen_as.mkdir(parents=True)
        mount(f"/proc/self/fd/{folder}", self.seen_as, None, MS_BIND)
        os.close(folder)
        if os.path.isdir(here):
            os.chdir(here)

    def words(self) -> list[str]:
        """Before a command line: let its program find the disk."""
        script = [sys.executable, __file__, self.backing, self.seen_as, self.hidden]
        return [str(word) for word in script]

    def inside(self, path: Path) -> Path:
        """Where the test finds what the host calls `path`."""
        return self.backing / path.relative_to(self.seen_as)

    def destroy(self) -> None:
        """All that was on it is gone."""
        for path in self.backing.iterdir():
            shutil.rmtree(path) if path.is_dir() else path.unlink()


@contextlib.contextmanager
def own_disks(
    machines: Sequence[Host], tmp_path: Path, megabytes: dict[int, float] | None = None
) -> Iterator[Path]:
    """Give each host a disk, `host.disk`; yields where all of them see theirs.

    tmp_path: of the test, as pytest makes it: the hosts see nothing of it, nor of those of other
    tests and fixtures. megabytes: by number of the host, the size of a disk that is small.
    """
    seen_as, mounted = tmp_path / "disk", list[Path]()
    try:
        for number, host in enumerate(machines):
            backing = tmp_path / f"disk-{number}"
            backing.mkdir()
            if size := (megabytes or {}).get(number):
                options = f"size={round(size * 1024)}k"
                words = ["mount", "-t", "tmpfs", "-o", options, "none", str(backing)]
                subprocess.run(words, check=True)
                mounted.append(backing)
            host.disk = Disk(backing, seen_as, tmp_path.parent)
        yield seen_as
    finally:
        for host in machines:
            host.switch_off()
        for backing in mounted:
            subprocess.run(["umount", "--lazy", str(backing)], check=True)


if __name__ == "__main__":
    Disk(*map(Path, sys.argv[1:4])).enter()
    os.execvp(sys.argv[4], sys.argv[4:])
