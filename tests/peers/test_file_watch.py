"""How far a fetch is stands on the terminal, with MB/s and the time that is left."""

from __future__ import annotations

import io
import re

from p2p_llm_forge.peers.file_watch import Watch


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


def shown(monkeypatch, title, stream) -> str:
    monkeypatch.setattr("sys.stderr", stream)
    watch = Watch(title)
    watch.begin(40_000_000, 10_000_000)
    with watch.shown():
        for _ in range(8):
            watch.advance(5_000_000)
        watch.advance(-10_000_000)
    assert (watch.bytes_done, watch.bytes_total) == (40_000_000, 40_000_000)
    return stream.getvalue()


def test_a_bar_shows_how_fast_and_how_long(monkeypatch):
    printed = shown(monkeypatch, "data from rank 0", Terminal())
    assert re.search(r"data from rank 0:  25%.* 10\.0M/40\.0M \[00:00<\?", printed), printed
    assert re.search(r"40\.0M/40\.0M \[00:00<00:00, .*B/s\]", printed), printed


def test_a_file_gets_no_bar_and_who_wants_none_neither(monkeypatch):
    assert shown(monkeypatch, "data", io.StringIO()) == ""
    assert shown(monkeypatch, None, Terminal()) == ""
