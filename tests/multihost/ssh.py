"""Hosts that one gets into by ssh."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

from tests.multihost.hosts import Host
from tests.waiting import wait_until

SSHD = shutil.which("sshd") or "/usr/sbin/sshd"


def serve_ssh(machines: list[Host], folder: Path) -> str:
    """Start an ssh server on each host, and return the ssh command that gets into them."""
    for key in ("host", "user"):
        keygen = ("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", str(folder / key))
        subprocess.run(keygen, check=True)
    Path("/run/sshd").mkdir(exist_ok=True)  # sshd wants it, and only the system's service makes it
    settings = (
        *(f"HostKey={folder}/host", f"AuthorizedKeysFile={folder}/user.pub", "StrictModes=no"),
        *("UsePAM=no", "PermitRootLogin=yes", "PidFile=none"),
    )
    options = [word for setting in settings for word in ("-o", setting)]
    for host in machines:
        host.start(SSHD, "-D", "-e", "-f", "/dev/null", *options, log=folder / "sshd.log")
    for host in machines:
        wait_until(lambda host=host: host.run("ss", "-ltnH", "sport = :22"))
    return (
        f"ssh -i {folder}/user -o StrictHostKeyChecking=no -o LogLevel=ERROR"
        f" -o UserKnownHostsFile={folder}/known"
    )
