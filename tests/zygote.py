"""Runs of train.py that start in milliseconds: a process that has imported everything forks them.

Each run is a real process with a fresh interpreter state but for the imports; it is killed,
signalled and waited for like any other. The zygote itself never starts a thread or a model.
"""

from __future__ import annotations

import ctypes
import importlib
import json
import os
import platform
import select
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from p2p_llm_forge.errors import run_script

# From sched.h and sys/mount.h of Linux.
CLONE_NEWNS, CLONE_NEWUTS, CLONE_NEWNET = 0x20000, 0x4000000, 0x40000000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x40000
ROOT = Path(__file__).resolve().parents[1]


class Zygote:
    """Starts runs of train.py or check_cluster.py and tells how they ended."""

    def __init__(self) -> None:
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.zygote"],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        self._told = b""
        self._ended: dict[int, int] = {}
        self._running: set[int] = set()

    def start(
        self,
        argv: list[str],
        log: Path,
        environ: dict[str, str] | None = None,
        script: str = "train",
        host: str | None = None,
        hosts_file: Path | None = None,
        terminal: str | None = None,
    ) -> int:
        """Start `train.py argv`, its output appended to `log`; returns the process id.

        script: another module with a `main`; host: the network namespace to start it in, which
        becomes its host name too; hosts_file: what it finds as /etc/hosts; terminal: what it reads
        from.
        """
        order = {"argv": argv, "log": str(log), "environ": environ or {}, "script": script}
        order |= {"host": host, "hosts_file": str(hosts_file) if hosts_file else None}
        order["terminal"] = terminal
        self._process.stdin.write(json.dumps(order).encode() + b"\n")
        self._process.stdin.flush()
        while True:
            told = self._read()
            if "started" in told:
                self._running.add(told["started"])
                return told["started"]

    def wait(self, pid: int, timeout_s: float = 60.0) -> int:
        """The status of a run that has ended: its exit status, or minus the signal's number."""
        deadline = time.monotonic() + timeout_s
        while pid not in self._ended:
            left = deadline - time.monotonic()
            assert left > 0, f"process {pid} has not ended within {timeout_s} s"
            self._read(left)
        return self._ended[pid]

    def has_ended(self, pid: int) -> bool:
        """Whether the run has ended by now."""
        while self._read(0):
            pass
        return pid in self._ended

    def close(self) -> None:
        """End what still runs, and the zygote."""
        for pid in self._running - set(self._ended):
            os.kill(pid, 9)
            self.wait(pid)
        self._process.stdin.close()
        self._process.wait(timeout=30)

    def _read(self, timeout_s: float = 60.0) -> dict:
        """The next thing that the zygote tells; empty if it tells nothing in that time."""
        # Not through a buffered file: what lies in a buffer is invisible to select.
        output = self._process.stdout.fileno()
        while b"\n" not in self._told:
            if not select.select([output], [], [], timeout_s)[0]:
                return {}
            received = os.read(output, 1 << 16)
            assert received, "the zygote has ended"
            self._told += received
        line, _, self._told = self._told.partition(b"\n")
        told = json.loads(line)
        if "ended" in told:
            self._ended[told["ended"]] = told["status"]
        return told


def main() -> None:
    """Fork a run for every line of standard input; tell starts and ends on standard output."""
    import accelerate.commands.config.config  # noqa: F401
    import accelerate.tracking  # noqa: F401
    import datasets  # noqa: F401
    import torch.nn.parallel  # noqa: F401
    from transformers import AutoModelForCausalLM, AutoTokenizer, GPT2LMHeadModel  # noqa: F401

    import p2p_llm_forge.peers.join
    import p2p_llm_forge.peers.links
    import p2p_llm_forge.peers.machine  # noqa: F401
    import p2p_llm_forge.peers.preflight
    import p2p_llm_forge.sync.diloco
    import p2p_llm_forge.training.checkpoint
    import p2p_llm_forge.training.language_modeling_metric  # noqa: F401
    import prepare_data  # noqa: F401

    children: set[int] = set()
    is_open = True
    while is_open or children:
        if is_open and select.select([sys.stdin], [], [], 0.005)[0]:
            line = sys.stdin.readline()
            is_open = bool(line)
            if line:
                order = json.loads(line)
                pid = os.fork()
                if pid == 0:
                    _become(order)
                children.add(pid)
                print(json.dumps({"started": pid}), flush=True)
        while children:
            pid, status = os.waitpid(-1, os.WNOHANG)
            if pid == 0:
                break
            children.discard(pid)
            told = {"ended": pid, "status": os.waitstatus_to_exitcode(status)}
            print(json.dumps(told), flush=True)
        if not is_open:
            time.sleep(0.005)


def _move(host: str, hosts_file: str | None) -> None:
    """Leave for a network namespace, with a host name and a /etc/hosts of its own."""
    libc = ctypes.CDLL(None, use_errno=True)
    network = os.open(f"/var/run/netns/{host}", os.O_RDONLY)
    done = [libc.setns(network, CLONE_NEWNET), libc.unshare(CLONE_NEWNS | CLONE_NEWUTS)]
    os.close(network)
    done.append(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None))
    if hosts_file:
        done.append(libc.mount(hosts_file.encode(), b"/etc/hosts", None, MS_BIND, None))
    assert not any(done), os.strerror(ctypes.get_errno())
    socket.sethostname(host)
    platform._uname_cache = None  # of the zygote's own name


def _script(name: str) -> Callable[[], int | None]:
    """The `main` of a module, or of the wizard `accelerate config`."""
    if name == "wizard":
        name = "accelerate.commands.config.config"
    return importlib.import_module(name).main


def _become(order: dict) -> None:
    if order["host"]:
        _move(order["host"], order["hosts_file"])
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    source_of_input = os.open(order["terminal"] or os.devnull, os.O_RDONLY | os.O_NOCTTY)
    for source, target in ((source_of_input, 0), (log, 1), (log, 2)):
        os.dup2(source, target)
    # The zygote's own may have read ahead. As Python opens it: no newline is translated.
    sys.stdin = open(0, newline="\n", closefd=False)  # noqa: SIM115
    os.environ.update(order["environ"])
    sys.path[:0] = filter(None, order["environ"].get("PYTHONPATH", "").split(":"))
    sys.argv = [f"{order['script']}.py", *order["argv"]]
    try:
        run_script(_script(order["script"]), int(os.environ.get("LOCAL_RANK", "0")))
    except SystemExit as end:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(end.code or 0)
    except BaseException:
        import traceback

        traceback.print_exc()
        os._exit(99)


if __name__ == "__main__":
    main()
