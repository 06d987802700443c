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
from contextlib import ExitStack
from dataclasses import dataclass, field
from itertools import groupby
from pathlib import Path

import pytest

from tests import ROOT
from tests.documents import BLOCK, DOCS, Line, commands, lines_of, text_of, tracked
from tests.multihost.hosts import Host, hosts, why_not
from tests.multihost.ssh import serve_ssh
from tests.ports import free_port
from tests.waiting import wait_until

# The environment of these tests is used; test_packaging.py installs, .ci/run makes the demo.
LEFT_OUT = ("make ", "python3 -m venv", ". .venv/", "pip install")
FIRST, SHORT = "--minutes 1", "--max-steps 2"  # the first training by the clock, and all others
WORKS = {"check_cluster.py": (0, 3)}  # 3: with warnings, such as that two hosts share a disk


def as_run(line: str, addresses: list[str], is_first: bool) -> str:
    """What is run where a reader types the line."""
    for number, address in enumerate(addresses, start=1):
        line = line.replace(f"10.0.0.{number}", address)
    if line.startswith("tensorboard "):
        return f"{line} --port {free_port()}"
    is_training = any(word in line for word in (" train.py ", "ssh.sh ", "slurm.sbatch "))
    if not is_training or "--dry-run" in line or "--eval-only" in line:
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
                self.run([sys.executable, "-c", block], block)
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
        status, printed = self.run(["sh", "-c", line], line, check=False)
        # On a busy machine a minute may be too short: then what the message says must do.
        while FIRST.split()[0] in line and (more := re.search(r"fix: give it (\S+ \S+)", printed)):
            line = re.sub(r"--minutes \S+", more[1], line)
            status, printed = self.run(["sh", "-c", line], line, check=False)
        assert status in statuses(text), f"{line}\n{printed[-6000:]}"

    def type_together(self, lines: list[tuple[int, str]]) -> None:
        """Type a line on each of some machines, and wait until all have ended."""
        if not self.machines:
            self.left_out += [text for _, text in lines]
            return
        started = [(text, *self.start(self.machines[number], text)) for number, text in lines]
        try:
            wait_until(lambda: all(process.poll() is not None for _, process, _ in started))
        finally:
            for _, process, _ in started:
                end(process)
        for text, process, log in started:
            assert process.returncode in statuses(text), f"{text}\n{log.read_text()[-6000:]}"

    def start(self, host: Host, text: str) -> tuple[subprocess.Popen, Path]:
        """Start what a line says on a machine; its output goes to the file."""
        log = self.clone.parent / f"{len(list(self.clone.parent.glob('*.log')))}.log"
        words = ["ip", "netns", "exec", host.name, "sh", "-c", self.as_run(text)]
        with log.open("w") as output:
            process = subprocess.Popen(
                words, cwd=self.clone, env=self.environ, stdout=output, stderr=output,
                stdin=subprocess.DEVNULL, start_new_session=True,
            )  # fmt: skip
        return process, log

    def as_run(self, text: str) -> str:
        line = as_run(text, [host.address for host in self.machines], not self.trained)
        self.trained += " train.py " in text
        return line

    def run(self, words: list[str], what: str, check: bool = True) -> tuple[int, str]:
        """Status and output of a program in the clone."""
        done = subprocess.run(
            words, cwd=self.clone, env=self.environ, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL,
        )  # fmt: skip
        assert done.returncode == 0 or not check, f"{what}\n{done.stdout[-6000:]}"
        return done.returncode, done.stdout

    def serve(self, line: str) -> None:
        """Start what serves a page until it is stopped, and see that it answers."""
        with (self.clone.parent / "served.log").open("w") as log:
            process = subprocess.Popen(
                ["sh", "-c", line], cwd=self.clone, env=self.environ, stdout=log, stderr=log,
                start_new_session=True,
            )  # fmt: skip
        port = int(line.rpartition(" ")[2])
        try:
            wait_until(lambda: process.poll() is not None or answers(port))
            assert process.poll() is None, (self.clone.parent / "served.log").read_text()
        finally:
            end(process)


def end(process: subprocess.Popen) -> None:
    """End a program, and all that it has started, if it still runs."""
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
def reader(tmp_path) -> Iterator[Reader]:
    """In a fresh clone, with two machines where they can be made."""
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
        machines = [] if why_not() else stack.enter_context(hosts(2))
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
        lines = [line for line in commands("README.md") if line.endswith(made) or made in line]
        if made in text_of(page) and not (reader.clone / made).exists():
            reader.type_alone(lines[0])
