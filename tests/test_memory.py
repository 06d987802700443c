"""What a process frees is kept for what comes next while it trains, and given back afterwards."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from p2p_llm_forge import memory
from p2p_llm_forge.memory import LARGEST_KEPT, M_MMAP_THRESHOLD, MOST_ONCE, freed_memory_kept
from tests import ROOT
from tests.kept_memory import TIMES
from tests.runs import flags

NAMES = (*memory.VARIABLES, "GLIBC_TUNABLES")
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def can_be_seen() -> bool:
    """Whether this C library keeps such tensors when asked, and a page that is filled is small."""
    is_huge = HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()
    name, version = platform.libc_ver()
    return name == "glibc" and [*map(int, version.split("."))] >= [2, 36] and not is_huge


needs_glibc = pytest.mark.skipif(not can_be_seen(), reason="needs glibc 2.36 and small pages")


def found_by(words: list[str], environ: dict[str, str]) -> list[float]:
    """What `tests.kept_memory` finds in a process of its own, whose heap has no gaps yet."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.kept_memory", *words],
        cwd=ROOT,
        env={name: value for name, value in os.environ.items() if name not in NAMES} | environ,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    lines = map(str.split, done.stdout.splitlines())
    return [float(line[1]) for line in lines if line[:1] == ["found"]]


@needs_glibc
@pytest.mark.parametrize(
    ("environ", "is_kept"),
    [
        ({}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.hugetlb=0"}, True),
        ({"GLIBC_TUNABLES": "glibc.malloc.trim_threshold=1000000"}, False),
        ({"MALLOC_TRIM_THRESHOLD_": "1000000"}, False),
        ({"MALLOC_MMAP_THRESHOLD_": "1000000"}, False),
    ],
)
def test_freed_memory_is_kept_unless_glibc_is_set_otherwise(environ, is_kept):
    filled, held_inside, held_afterwards = found_by([], environ)
    assert (filled < 1 and held_inside > 0.5) if is_kept else filled > TIMES - 1
    assert held_afterwards < 0.5


@needs_glibc
def test_training_and_evaluating_keep_it(prepared, tmp_path):
    found = found_by(flags(prepared, tmp_path / "run", max_steps=1), {"HF_HUB_OFFLINE": "1"})
    assert len(found) == 2 and max(found) < 1


def test_an_older_glibc_is_asked_for_as_much_as_it_takes(monkeypatch):
    asked = []

    def mallopt(name, value):
        asked.append((name, value))
        return int(name != M_MMAP_THRESHOLD or value <= MOST_ONCE)

    monkeypatch.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    memory.keep_freed_memory()
    assert asked[:2] == [(M_MMAP_THRESHOLD, LARGEST_KEPT), (M_MMAP_THRESHOLD, MOST_ONCE)]


def test_nothing_changes_where_the_c_library_has_no_such_setting(monkeypatch):
    for name in NAMES:
        monkeypatch.delenv(name, raising=False)
    asked = []

    def without(name):
        asked.append(name)
        return object()  # without any function, as musl and macOS lack these

    def no_library(name):
        asked.append(name)
        raise TypeError  # as on Windows

    for library in (without, no_library):
        monkeypatch.setattr("ctypes.CDLL", library)
        with freed_memory_kept():
            assert asked, "the C library was not asked"
            asked.clear()
        assert asked
        asked.clear()
