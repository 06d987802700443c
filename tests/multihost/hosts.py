"""Hosts for tests: network namespaces joined by a bridge, made and removed by the test."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import psutil

from tests import ROOT
from tests.multihost.disks import Disk
from tests.waiting import wait_until

PYTHON = sys.executable
SEGMENT_BYTES = 1448  # of payload, with Ethernet's 1500 bytes and time stamps


@functools.cache
def why_not() -> str | None:
    """Why hosts cannot be made here; None if they can."""
    if shutil.which("ip") is None:
        return "needs `ip` (package iproute2)"
    probe = f"forge-probe-{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", probe], capture_output=True)
    if made.returncode:
        return "needs the right to make network namespaces (root)"
    subprocess.run(["ip", "netns", "del", probe], check=True)
    return None


def ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True)


class Host:
    """A machine of its own, as far as its network goes."""

    def __init__(self, name: str, address: str) -> None:
        self.name, self.address = name, address
        self.disk: Disk | None = None  # from `own_disks`; else it sees the files of this machine
        self._processes: list[subprocess.Popen] = []

    def start(self, *words: object, log: Path, environ: dict[str, str] | None = None) -> None:
        """Start a program of this environment on the host, its output appended to `log`."""
        of_disk = self.disk.words() if self.disk else []
        with log.open("ab") as output:
            self._processes.append(
                subprocess.Popen(
                    ["ip", "netns", "exec", self.name, *of_disk, *map(str, words)],
                    cwd=ROOT,
                    env={**os.environ, "PYTHONPATH": str(ROOT), **(environ or {})},
                    stdout=output,
                    stderr=subprocess.STDOUT,
                    stdin=subprocess.DEVNULL,
                )
            )

    def unplug(self) -> None:
        """Pull the cable: nothing arrives any more, and nobody knows why."""
        ip("netns", "exec", self.name, "ip", "link", "set", "eth0", "down")

    def plug_in(self) -> None:
        """Put the cable back."""
        ip("netns", "exec", self.name, "ip", "link", "set", "eth0", "up")

    def shape(self, mbit: float) -> None:
        """Let the host send so many Mbit/s and no more; shape the others too, for both ways.

        What may leave at once is 0.6 ms worth (or ten packets), so that a megabyte gains under 8 %;
        what would wait over 50 ms is dropped, as by a router.
        """
        burst = max(10 * 1514, round(mbit * 1e6 / 8 * 0.6e-3))
        ip(
            *("netns", "exec", self.name, "tc", "qdisc", "replace", "dev", "eth0", "root"),
            *("tbf", "rate", f"{round(mbit * 1e6)}bit", "burst", str(burst), "latency", "50ms"),
        )

    def bytes_sent(self) -> int:
        """All that the host's interface has sent, headers too."""
        return self._counters()[8]

    def bytes_resent(self) -> int:
        """What TCP has sent once more, about: a busy host is late to say what has come."""
        names, numbers = (
            line.split() for line in self._reads("/proc/net/snmp") if line.startswith("Tcp:")
        )
        return int(numbers[names.index("RetransSegs")]) * SEGMENT_BYTES

    def bytes_received(self) -> int:
        """All that the host's interface has received, headers too."""
        return self._counters()[0]

    def _counters(self) -> list[int]:
        (line,) = [
            line for line in self._reads("/proc/net/dev") if line.strip().startswith("eth0:")
        ]
        return [int(number) for number in line.split(":")[1].split()]

    def _reads(self, file: str) -> list[str]:
        words = ["ip", "netns", "exec", self.name, "cat", file]
        return subprocess.run(words, check=True, capture_output=True, text=True).stdout.splitlines()

    def connections(self, port: int) -> int:
        """How many connections others have made to a port of the host."""
        found = self.run("ss", "-tnH", "state", "established", f"sport = :{port}")
        return len(found.splitlines())

    def run(self, *words: str) -> str:
        """What a command of the system, such as `tc` or `nft`, prints on the host."""
        done = subprocess.run(
            ["ip", "netns", "exec", self.name, *words], capture_output=True, text=True
        )
        assert done.returncode == 0, f"{' '.join(words)}: {done.stderr}"
        return done.stdout

    @contextlib.contextmanager
    def slowed(self, rate: str) -> Iterator[None]:
        """Let the host send at no more than a rate, such as 10mbit."""
        shape = ("tbf", "rate", rate, "burst", "32kb", "latency", "200ms")
        self.run("tc", "qdisc", "add", "dev", "eth0", "root", *shape)
        try:
            yield
        finally:
            self.run("tc", "qdisc", "del", "dev", "eth0", "root")

    @contextlib.contextmanager
    def firewall(self, rule: str) -> Iterator[None]:
        """Judge what arrives at the host by a rule of nftables."""
        self.run(
            "nft",
            "add table inet test; add chain inet test in { type filter hook input"
            " priority 0; }; add rule inet test in " + rule,
        )
        try:
            yield
        finally:
            self.run("nft", "delete table inet test")

    def pids(self) -> list[int]:
        """What was started and has not ended, each in the order of its start."""
        return [process.pid for process in self._processes if process.poll() is None]

    def is_running(self) -> bool:
        """Whether nothing that was started has ended yet."""
        return all(process.poll() is None for process in self._processes)

    def ask_to_stop(self) -> None:
        """SIGTERM to what was started, as a shutdown of the machine sends it."""
        for process in self._processes:
            process.send_signal(signal.SIGTERM)

    def pause(self) -> None:
        """Stop what was started where it is, as a suspended laptop does."""
        for member in self._members():
            member.suspend()

    def go_on(self) -> None:
        """The end of a pause."""
        for member in self._members():
            member.resume()

    def _members(self) -> list[psutil.Process]:
        families = [psutil.Process(process.pid) for process in self._processes]
        return [one for first in families for one in [first, *first.children(recursive=True)]]

    def switch_off(self) -> None:
        """Kill everything on the host at once, as a power cut does."""
        for process in self._processes:
            with contextlib.suppress(psutil.NoSuchProcess):
                family = psutil.Process(process.pid).children(recursive=True)
                for member in [psutil.Process(process.pid), *family]:
                    with contextlib.suppress(psutil.NoSuchProcess):
                        member.send_signal(signal.SIGKILL)
            process.wait()
        self._processes.clear()

    def wait(self) -> list[int]:
        """The statuses of all programs, once they have ended."""
        wait_until(lambda: all(process.poll() is not None for process in self._processes))
        return [process.returncode for process in self._processes]


@contextlib.contextmanager
def hosts(count: int, mbit: float | None = None) -> Iterator[list[Host]]:
    """So many hosts on one switch; everything on them ends, and they vanish, with the block.

    mbit: what each may send in a second; without it as much as the machine can.
    """
    tag, third = f"forge{os.getpid()}", os.getpid() % 250
    switch, made = f"{tag}-switch", []
    try:
        ip("netns", "add", switch)
        ip("-n", switch, "link", "add", "br0", "type", "bridge")
        ip("-n", switch, "link", "set", "br0", "up")
        for number in range(count):
            host = Host(f"{tag}-{number}", f"10.77.{third}.{number + 1}")
            ip("netns", "add", host.name)
            made.append(host)
            port = f"port{number}"
            ip(
                "link",
                "add",
                port,
                "netns",
                switch,
                "type",
                "veth",
                *("peer", "name", "eth0"),
                *("netns", host.name),
            )
            ip("-n", switch, "link", "set", port, "master", "br0", "up")
            ip("-n", host.name, "address", "add", f"{host.address}/24", "dev", "eth0")
            ip("-n", host.name, "link", "set", "eth0", "up")
            ip("-n", host.name, "link", "set", "lo", "up")
            if mbit is not None:
                host.shape(mbit)
        yield made
    finally:
        for host in made:
            host.switch_off()
            ip("netns", "del", host.name)
        subprocess.run(["ip", "netns", "del", switch], capture_output=True)
