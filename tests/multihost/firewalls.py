"""Firewalls of hosts as their users have them: ufw, nftables and firewalld.

The real programs run, in the network of a host and with folders of their own in place of those of
this machine, of which nothing changes.
"""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

from tests.multihost.hosts import Host
from tests.waiting import wait_until

TOOLS = ("ufw", "nft", "firewall-cmd")  # by which a fix names them
OWN = ("ufw", "default", "firewalld")  # folders of /etc that the tools write into
# As Debian, Arch and Gentoo place it in /etc/nftables.conf, with a policy.
NFTABLES = """
table inet filter {
    chain input {
        type filter hook input priority filter; policy drop;
        ct state established,related accept
        iif lo accept
    }
}
"""


def missing() -> list[str]:
    """The programs that are not installed here."""
    return [name for name in (*TOOLS, "firewalld", "dbus-daemon") if not shutil.which(name)]


class Machine:
    """A host with folders of its own for what its firewall writes."""

    def __init__(self, host: Host, keeper: int, sudo: Path) -> None:
        self.host, self._keeper, self._sudo = host, keeper, sudo

    def run(self, command: str) -> str:
        """What a line prints that a user types into a shell there; it must succeed."""
        words = ["nsenter", f"--target={self._keeper}", "--mount", "--net", "sh", "-ec", command]
        path = f"{self._sudo}:{os.environ['PATH']}"
        done = subprocess.run(
            words, env={**os.environ, "PATH": path}, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        return done.stdout

    def follow(self, fix: str, tool: str) -> None:
        """Run what a fix says for a tool, as it is printed."""
        commands = re.findall(rf"sudo {tool} [^();]*[^();\s]", fix)
        assert len(commands) == 1, f"{tool} in: {fix}"
        self.run(commands[0])


@contextlib.contextmanager
def guarded(host: Host, tool: str, folder: Path) -> Iterator[Machine]:
    """A host whose firewall is on and lets nobody in, until the block ends."""
    sudo = folder / "bin" / "sudo"  # we are root, and on a small machine it is not installed
    sudo.parent.mkdir(parents=True)
    sudo.write_text('#!/bin/sh\nexec "$@"\n')
    sudo.chmod(0o755)
    keeper = subprocess.Popen(
        ["ip", "netns", "exec", host.name, "unshare", "--mount", "sleep", "infinity"],
        stdin=subprocess.DEVNULL,
    )
    try:
        own = os.readlink("/proc/self/ns/mnt")
        wait_until(
            lambda: (
                Path(f"/proc/{keeper.pid}/comm").read_text() == "sleep\n"
                and os.readlink(f"/proc/{keeper.pid}/ns/mnt") != own
            )
        )
        machine = Machine(host, keeper.pid, sudo.parent)
        machine.run("mount --make-rprivate / && mount -t tmpfs none /run")
        for name in OWN:
            shutil.copytree(f"/etc/{name}", folder / name)
            machine.run(f"mount --bind {folder / name} /etc/{name}")
        yield from _switched_on(machine, tool, folder)
    finally:
        keeper.kill()
        keeper.wait()


def _switched_on(machine: Machine, tool: str, folder: Path) -> Iterator[Machine]:
    if tool == "ufw":
        machine.run("ufw --force enable")
    if tool == "nft":
        (folder / "nftables.conf").write_text(NFTABLES)
        machine.run(f"nft -f {folder / 'nftables.conf'}")
    if tool != "firewall-cmd":
        yield machine
        return
    bus = machine.run("mkdir /run/dbus && dbus-daemon --system --fork --print-pid")
    daemon = machine.run("firewalld --nopid & echo $!")
    try:
        wait_until(lambda: machine.run("firewall-cmd --state || true").strip() == "running")
        yield machine
    finally:
        for pid in (daemon, bus):
            with contextlib.suppress(ProcessLookupError):
                os.kill(int(pid), signal.SIGTERM)
