"""Every block of README.md and of docs/ runs, in order, on a fresh clone with the sample text.

README.tr.md has the same lines (test_readme.py). What is typed is what runs, but for what stands
in `as_run`: addresses, lengths of trainings, and what would install or never end.
"""

from __future__ import annotations

import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path
from threading import Thread

import pytest

from tests import ROOT
from tests.documents import BLOCK, DOCS, Line, commands, lines_of, text_of, tracked
from tests.multihost.hosts import Host, hosts, why_not
from tests.multihost.ssh import serve_ssh
from tests.ports import free_port
from tests.training.stand_in_hub import TOKEN, Hub
from tests.waiting import wait_until

# The environment of these tests is used; test_packaging.py installs, .ci/run makes the demo.
LEFT_OUT = ("make ", "python3 -m venv", ". .venv/", "pip install ", "hf auth ")
FIRST, SHORT = "--minutes 1", "--max-steps 2"  # the first training by the clock, and all others
SHELL = ("sh", "-c")
WORKS = {"check_cluster.py": (0, 3)}  # 3: with warnings, such as that two hosts share a disk


def as_run(line: str, addresses: list[str], is_first: bool) -> str:
    """What is run where a reader types the line."""
    for number, address in enumerate(addresses, start=1):
        line = line.replace(f"10.0.0.{number}", address)
    if line.startswith("tensorboard "):
        return f"{line} --port {free_port()}"
    trains = any(word in line for word in (" train.py ", "ssh.sh ", "slurm.sbatch "))
    trains = trains and any(word in line for word in ("--dataset-path ", "--config "))
    if not trains or "--dry-run" in line or "--eval-only" in line:
        return line
    line, by_clock = re.subn(r"--minutes [\d.]+", FIRST if is_first else SHORT, line)
    return line if by_clock else f"{line} {SHORT}"


@dataclass
class Reader:
    """Somebody who types what the pages say, in a clone of the project."""

    clone: Path
    machines: list[Host]
    environ: dict[str, str]
    trained: int = 0
    left_out: list[str] = field(default_factory=list)

    def read(self, page: str) -> None:
        """Do what all blocks of a page say."""
        pattern = BLOCK.format("(?P<language>bash|python)")
        for found in re.finditer(pattern, text_of(page), re.DOTALL | re.MULTILINE):
            indent = re.compile(rf"^{found['indent']}", re.MULTILINE)
            block = indent.sub("", found["text"])
            if found["language"] == "python":
                status, printed = self.run(block, shell=(sys.executable, "-c"))
                assert status == 0, f"{block}\n{printed[-6000:]}"
            else:
                self.type(list(lines_of(block)))

    def type(self, lines: list[Line]) -> None:
        """Type the lines of a block: those of several machines at the same time on each."""
        for is_alone, group in groupby(lines, key=lambda line: line.machine is None):
            if is_alone:
                for line in group:
                    self.type_alone(line.text)
            else:
                for together in started_together(group, len(self.machines) or 2):
                    self.type_together(together)

    def type_alone(self, text: str) -> None:
        if text.startswith(LEFT_OUT):
            self.left_out.append(text)
            return
        line = self.as_run(text)
        if line.startswith("tensorboard "):
            self.serve(line)
            return
        if "--push-to-hub " in line:
            self.upload(line)
            return
        status, printed = self.run(line)
        # On a busy machine a minute may be too short: then what the message says must do.
        while FIRST.split()[0] in line and (more := re.search(r"fix: give it (\S+ \S+)", printed)):
            line = re.sub(r"--minutes \S+", more[1], line)
            status, printed = self.run(line)
        assert status in statuses(text), f"{line}\n{printed[-6000:]}"

    def type_together(self, lines: list[tuple[int, str]]) -> None:
        """Type a line on each of some machines, and wait until all have ended."""
        if not self.machines:
            self.left_out += [text for _, text in lines]
            return
        typed = [(self.machines[number], self.as_run(text)) for number, text in lines]
        with ExitStack() as stack:
            runs = [stack.enter_context(self.started(line, host)) for host, line in typed]
            wait_until(lambda: all(process.poll() is not None for process, _ in runs))
        for (_, line), (process, log) in zip(typed, runs, strict=True):
            assert process.returncode in statuses(line), f"{line}\n{log.read_text()[-6000:]}"

    def as_run(self, text: str) -> str:
        line = as_run(text, [host.address for host in self.machines], not self.trained)
        self.trained += " train.py " in text
        return line

    def run(self, line: str, shell: tuple[str, ...] = SHELL) -> tuple[int, str]:
        """Status and output of a line, or of a program, in the clone."""
        with self.started(line, shell=shell) as (process, log):
            wait_until(lambda: process.poll() is not None, log=log)
        return process.returncode, log.read_text()

    def serve(self, line: str) -> None:
        """Start what serves a page until it is stopped, and see that it answers."""
        port = int(line.rpartition(" ")[2])
        with self.started(line) as (process, log):
            wait_until(lambda: process.poll() is not None or answers(port), log=log)
            assert process.poll() is None, log.read_text()

    def upload(self, line: str) -> None:
        """Do what uploads, to a Hub of one's own."""
        folder, before = self.clone.parent / "hub", self.environ
        folder.mkdir()
        hub = Hub(folder)
        Thread(target=hub.serve_forever, daemon=True).start()
        self.environ = before | {"HF_ENDPOINT": hub.address, "HF_TOKEN": TOKEN}
        self.environ |= {"HF_HUB_OFFLINE": "0", "NO_PROXY": "127.0.0.1"}
        status, printed = self.run(line)
        self.environ = before
        hub.shutdown()
        assert status == 0 and list(folder.rglob("README.md")), f"{line}\n{printed}"

    @contextmanager
    def started(self, line: str, host: Host | None = None, shell: tuple[str, ...] = SHELL):
        """A line that runs, and the file that its output goes to; ended with the block."""
        there = ["ip", "netns", "exec", host.name] if host else []
        log = self.clone.parent / f"{len(list(self.clone.parent.glob('*.log')))}.log"
        with log.open("w") as output:
            process = subprocess.Popen(
                [*there, *shell, line], cwd=self.clone, env=self.environ, stdout=output,
                stderr=output, stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        try:
            yield process, log
        finally:
            if process.poll() is None:
                os.killpg(process.pid, signal.SIGKILL)
                process.wait()


def started_together(lines: Iterator[Line], machines: int) -> Iterator[list[tuple[int, str]]]:
    """Machines and what is typed there, as long as each has one line."""
    group: dict[int, str] = {}
    for line in lines:
        numbers = range(machines) if line.machine == -1 else [line.machine or 0]
        if any(number in group for number in numbers):
            yield list(group.items())
            group = {}
        group |= dict.fromkeys(numbers, line.text)
    yield list(group.items())


def statuses(text: str) -> tuple[int, ...]:
    """Those with which a line has done what it is for."""
    return next((good for script, good in WORKS.items() if script in text), (0,))


def answers(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture
def reader(page, tmp_path) -> Iterator[Reader]:
    """In a fresh clone, with two machines where the page needs them and they can be made."""
    clone = tmp_path / "clone"
    for name in tracked():
        (clone / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy2(ROOT / name, clone / name)
    environ = os.environ | {"HF_HUB_OFFLINE": "1", "PET_MASTER_PORT": str(free_port())}
    environ.pop("ACCELERATE_MIXED_PRECISION", None)
    environ["PATH"] = f"{tmp_path / 'slurm'}:{Path(sys.executable).parent}:{environ['PATH']}"
    stand_in_for_slurm(tmp_path / "slurm")
    environ |= {"PYTHON": sys.executable, "PYTHONPATH": str(clone)}
    with ExitStack() as stack:
        needs_machines = "# machine 0" in text_of(page) or "# every machine" in text_of(page)
        can_be = needs_machines and not why_not()
        machines = stack.enter_context(hosts(2)) if can_be else []
        for host, number in zip(machines, (1, 2), strict=False):
            for file in clone.glob("accelerate_configs/*/*.yaml"):
                file.write_text(file.read_text().replace(f"10.0.0.{number}\n", f"{host.address}\n"))
                file.write_text(file.read_text().replace(f"10.0.0.{number} ", f"{host.address} "))
        yield Reader(clone, machines, environ)


def stand_in_for_slurm(folder: Path) -> None:
    """Slurm's commands, on a cluster of one node."""
    folder.mkdir()
    job = "SLURM_JOB_NODELIST=127.0.0.1 SLURM_JOB_NUM_NODES=1 SLURM_JOB_ID=$$"
    for name, text in {
        "sbatch": f'{job} exec bash "$@"',
        "scontrol": "echo 127.0.0.1",
        "srun": 'shift; SLURM_NODEID=0 exec "$@"',
    }.items():
        (folder / name).write_text(f"#!/bin/sh\n{text}\n")
        (folder / name).chmod(0o755)


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", *DOCS])
@pytest.mark.timeout(2700)  # of README.md some twenty programs, one after the other
def test_every_block_of_a_page_runs(page, reader):
    if page != "README.md":
        do_what_the_readme_says(reader, page)
    if "launch/ssh.sh " in text_of(page) and reader.machines:
        reader.environ["SSH"] = serve_ssh(reader.machines, reader.clone.parent)
    reader.read(page)
    if page == "README.md":
        assert (reader.clone / "artifacts" / "mine" / "model.safetensors").exists()
        assert any(line.startswith("make ") for line in reader.left_out)
    if why_not() and any("--master-addr" in line for line in reader.left_out):
        pytest.skip(f"all but the lines for several machines did: {why_not()}")


def do_what_the_readme_says(reader: Reader, page: str) -> None:
    """So far as the page needs it: text, prepared data, and a model of two updates."""
    reader.trained = 1
    for made in ("corpus.txt", "data/prepared/corpus", "artifacts/mine"):
        if made == "corpus.txt" or made in text_of(page):
            reader.type_alone(next(line for line in commands("README.md") if made in line))
