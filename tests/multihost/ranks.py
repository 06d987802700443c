"""Ranks of an exchange of files on hosts with disks of their own, each a program of files.py."""

from __future__ import annotations

import hashlib
import json
import os
from pathlib import Path

from tests import ROOT
from tests.multihost.hosts import PYTHON
from tests.waiting import wait_until

PROGRAM = ROOT / "tests" / "multihost" / "files.py"
STRANGER = ROOT / "tests" / "multihost" / "file_stranger.py"
SECRET = "of this cluster, and of no other"
MB = 10**6


class Ranks:
    """Some hosts, of which the last fetches and all others serve copies of the same files."""

    def __init__(self, machines, disk: Path, tmp_path: Path, secret: str = SECRET) -> None:
        *self.sources, self.fetcher = machines
        self.disk, self.tmp_path, self.secret = disk, tmp_path, secret
        self.manifest, self.places, self.runs = {}, [], 0

    def make(self, **sizes: int) -> None:
        """Files of random content on the disk of each source."""
        for name, size in sizes.items():
            content = os.urandom(size)
            self.manifest[name] = (size, hashlib.sha256(content).hexdigest())
            for host in self.sources:
                path = host.disk.inside(self.disk / "from" / name)
                path.parent.mkdir(exist_ok=True)
                path.write_bytes(content)

    def serve(self) -> None:
        """Let all sources serve theirs."""
        logs = [self.tmp_path / f"source-{rank}.log" for rank in range(len(self.sources))]
        for rank, (host, log) in enumerate(zip(self.sources, logs, strict=True)):
            words = ["serve", rank, host.address, self.disk / "from", self.secret]
            host.start(PYTHON, PROGRAM, *words, log=log)
        wait_until(lambda: all(log.read_text().endswith("}\n") for log in logs))
        self.places = [json.loads(log.read_text()) for log in logs]

    def fetch(self, asked=None, host=None) -> Path:
        """Start to fetch from some sources, by default all; where it is said what came."""
        self.runs += 1
        log, host = self.tmp_path / f"fetch-{self.runs}.log", host or self.fetcher
        ranks = range(len(self.places)) if asked is None else asked
        places = [place if rank in ranks else None for rank, place in enumerate(self.places)]
        words = [json.dumps(places), json.dumps(self.manifest), self.disk / "into", self.secret]
        host.start(PYTHON, PROGRAM, "fetch", 7, *words, log=log)
        return log

    def came(self, host=None) -> int:
        """The bytes of files and pieces that are on a host, about."""
        into = (host or self.fetcher).disk.inside(self.disk / "into")
        records = [path.read_bytes().partition(b"\n")[2] for path in into.glob("*.pieces")]
        whole = [size for name, (size, _) in self.manifest.items() if (into / name).exists()]
        return sum(whole) + sum(record.count(1) for record in records) * (4 << 20)

    def are_whole(self, host=None) -> bool:
        """Whether the files, and nothing else, are where they were to come."""
        into = (host or self.fetcher).disk.inside(self.disk / "into")
        found = {
            path.name: (path.stat().st_size, hashlib.sha256(path.read_bytes()).hexdigest())
            for path in into.iterdir()
        }
        return found == self.manifest
