"""What a process frees is kept for what comes next while it trains, and given back afterwards."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from dataclasses import replace

import psutil
import pytest
import torch

import train as script
from p2p_llm_forge.memory import freed_memory_kept
from p2p_llm_forge.training import modes
from tests import ROOT

needs_glibc = pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="only glibc has this")
SIZE = 100 << 20  # bytes; glibc maps them by themselves, however often they were freed


TIMES = 12


def times_taken_anew() -> float:
    """How often the system fills the pages of a tensor that is taken and freed TIMES times.

    Also what is kept may be: where something small has come to lie in its place meanwhile.
    """
    import resource

    before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    for _ in range(TIMES):
        torch.ones(SIZE, dtype=torch.uint8)
    pages = resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before
    return pages * os.sysconf("SC_PAGE_SIZE") / SIZE


@needs_glibc
def test_freed_memory_is_kept_inside_and_returned_at_the_end():
    assert times_taken_anew() > TIMES - 1
    before = psutil.Process().memory_info().rss
    with freed_memory_kept():
        assert times_taken_anew() < TIMES / 2
        assert psutil.Process().memory_info().rss - before > SIZE / 2
    assert psutil.Process().memory_info().rss - before < SIZE / 2


@needs_glibc
@pytest.mark.parametrize("name", ["MALLOC_TRIM_THRESHOLD_", "MALLOC_MMAP_THRESHOLD_"])
def test_who_has_set_glibc_by_its_own_variables_is_left_alone(name):
    words = (
        "from tests.test_memory import *\n"
        "with freed_memory_kept():\n"
        "    assert times_taken_anew() > TIMES - 1"
    )
    environ = os.environ | {name: str(1 << 20)}
    done = subprocess.run(
        [sys.executable, "-c", words], cwd=ROOT, env=environ, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_nothing_changes_where_the_c_library_has_no_such_setting(monkeypatch):
    for library in (object(), None):
        monkeypatch.setattr("ctypes.CDLL", lambda name, library=library: library)
        with freed_memory_kept():
            pass


@needs_glibc
def test_training_and_evaluating_keep_it(config, monkeypatch):
    found = []

    def looked_at(usual):
        def look(*arguments):
            found.append(times_taken_anew())
            return usual(*arguments)

        return look

    monkeypatch.setattr(script, "loop", looked_at(script.loop))
    script.train(replace(config, max_steps=1))
    monkeypatch.setattr(modes, "evaluate_blocks", looked_at(modes.evaluate_blocks))
    script.train(replace(config, eval_only=True))
    assert len(found) == 2 and max(found) < TIMES / 2
