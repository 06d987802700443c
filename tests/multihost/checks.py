"""Launches of check_cluster.py on hosts of their own."""

from __future__ import annotations

import re

from p2p_llm_forge.peers.launch_files import write_launch_files
from tests.ports import free_port

WORKS, WILL_NOT_WORK, WORKS_WITH_WARNINGS = 0, 1, 3


class Peers:
    """A launch of check_cluster.py on the first hosts, by files that --write-configs makes."""

    def __init__(self, zygote, machines, tmp_path, count, main=None):
        self.zygote, self.machines = zygote, machines[:count]
        self.logs = [tmp_path / f"host{number}.log" for number in range(count)]
        self.port = free_port()
        addresses = [main or machines[0].address, *(m.address for m in machines[1:count])]
        write_launch_files(tmp_path / "files", addresses, self.port, None, True)
        self.files = [tmp_path / "files" / f"node{number}.yaml" for number in range(count)]
        self.pids = {}

    def start(self, number, *flags, **how):
        self.pids[number] = self.start_another(number, *flags, **how)

    def start_another(self, number, *flags, environ=None, script="check_cluster", **files):
        """Start a process on a host that is not one of the launch; returns its pid.

        files: `hosts_file` and `name_servers` of `zygote.Start`.
        """
        return self.zygote.start(
            list(map(str, flags)),
            self.logs[number],
            environ,
            script=script,
            host=self.machines[number].name,
            **files,
        )

    def meet(self, *flags, each=None, **options):
        """Start on every host with `--meet`; `each` gives flags by number."""
        for number, file in enumerate(self.files):
            own = (each or {}).get(number, ())
            self.start(number, "--config-file", file, "--meet", *flags, *own, **options)

    def end(self):
        """The statuses and what was printed, by number; then another launch can begin."""
        statuses = {n: self.zygote.wait(pid) for n, pid in self.pids.items()}
        printed = {number: self.logs[number].read_text() for number in self.pids}
        for number in self.pids:
            self.logs[number].unlink()
        self.pids = {}
        return statuses, printed


def on_one_line(text):
    """What was printed, with line breaks and indentation as one space."""
    return re.sub(r"\s+", " ", text)
