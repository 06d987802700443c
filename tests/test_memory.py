"""What a process frees is kept for what comes next while it trains, and given back afterwards."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch

import train as script
from p2p_llm_forge import memory
from p2p_llm_forge.memory import LARGEST_KEPT, M_MMAP_THRESHOLD, MOST_ONCE, freed_memory_kept
from p2p_llm_forge.training import modes
from tests import ROOT

SIZE = 200 << 20  # bytes
TIMES = 5
HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage/enabled")


def can_be_seen() -> bool:
    """Whether this C library keeps such tensors when asked, and a page that is filled is small."""
    is_huge = HUGE_PAGES.exists() and "[always]" in HUGE_PAGES.read_text()
    version = platform.libc_ver()
    return version[0] == "glibc" and [*map(int, version[1].split("."))] >= [2, 36] and not is_huge


needs_glibc = pytest.mark.skipif(not can_be_seen(), reason="needs glibc 2.36 and small pages")


def times_filled() -> float:
    """How often, at least, the system fills a tensor that is taken and freed TIMES times.

    Kept memory is filled, too, where something small has come to lie in its place meanwhile: so
    the least of some.
    """
    import resource

    found = []
    for _ in range(4):
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
        for _ in range(TIMES):
            torch.ones(SIZE, dtype=torch.uint8)
        found.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
    return min(found) * os.sysconf("SC_PAGE_SIZE") / SIZE


@pytest.fixture
def unset(monkeypatch):
    """An environment that sets nothing of glibc."""
    for name in (*memory.VARIABLES, "GLIBC_TUNABLES"):
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


@needs_glibc
def test_freed_memory_is_kept_inside_and_returned_at_the_end(unset):
    before = psutil.Process().memory_info().rss
    with freed_memory_kept():
        assert times_filled() < 1
        assert psutil.Process().memory_info().rss - before > SIZE / 2
    assert psutil.Process().memory_info().rss - before < SIZE / 2


@needs_glibc
@pytest.mark.parametrize(
    ("name", "value", "is_kept"),
    [
        ("MALLOC_TRIM_THRESHOLD_", "1000000", False),
        ("MALLOC_MMAP_THRESHOLD_", "1000000", False),
        ("GLIBC_TUNABLES", "glibc.malloc.trim_threshold=1000000", False),
        ("GLIBC_TUNABLES", "glibc.malloc.hugetlb=0", True),
    ],
)
def test_whoever_has_set_it_by_glibcs_own_variables_decides(unset, name, value, is_kept):
    words = "from tests.test_memory import *\nwith freed_memory_kept():\n    print(times_filled())"
    environ = os.environ | {name: value}
    done = subprocess.run(
        [sys.executable, "-c", words], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    assert (float(done.stdout) < 1) == is_kept
    assert is_kept or float(done.stdout) > TIMES - 1


def test_an_older_glibc_is_asked_for_as_much_as_it_takes(unset):
    asked = []

    def mallopt(name, value):
        asked.append((name, value))
        return int(name != M_MMAP_THRESHOLD or value <= MOST_ONCE)

    unset.setattr("ctypes.CDLL", lambda name: SimpleNamespace(mallopt=mallopt))
    memory.keep_freed_memory()
    assert asked[:2] == [(M_MMAP_THRESHOLD, LARGEST_KEPT), (M_MMAP_THRESHOLD, MOST_ONCE)]


def test_nothing_changes_where_the_c_library_has_no_such_setting(unset):
    for library in (object(), None):
        unset.setattr("ctypes.CDLL", lambda name, library=library: library)
        with freed_memory_kept():
            pass


@needs_glibc
def test_training_and_evaluating_keep_it(config, unset):
    found = []

    def looked_at(usual):
        def look(*arguments):
            found.append(times_filled())
            return usual(*arguments)

        return look

    unset.setattr(script, "loop", looked_at(script.loop))
    script.train(replace(config, max_steps=1))
    unset.setattr(modes, "evaluate_blocks", looked_at(modes.evaluate_blocks))
    script.train(replace(config, eval_only=True))
    assert len(found) == 2 and max(found) < 1
