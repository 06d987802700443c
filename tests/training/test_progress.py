"""Something that takes a while says how far it is and when it is done."""

from __future__ import annotations

import re

from p2p_llm_forge.training.progress import Progress


def lines_of(capsys, seconds, total=100, is_shown=True):
    """What is printed of a work whose steps of 10 end at so many seconds."""
    now = [1000.0]
    with Progress("evaluating", total, "blocks", is_shown, clock=lambda: now[0]) as progress:
        for done, at_s in zip(range(10, total + 1, 10), seconds, strict=True):
            now[0] = 1000.0 + at_s
            progress.reached(done)
    return capsys.readouterr().out.splitlines()


def test_a_long_one_says_every_few_seconds_what_is_left(capsys):
    assert lines_of(capsys, [4 * n for n in range(1, 11)]) == [
        "evaluating 20 of 100 blocks, 32 s left",
        "evaluating 40 of 100 blocks, 24 s left",
        "evaluating 60 of 100 blocks, 16 s left",
        "evaluating 80 of 100 blocks, 8 s left",
    ]


def test_a_short_one_and_other_ranks_say_nothing(capsys):
    assert lines_of(capsys, [0.1 * n for n in range(1, 11)]) == []
    assert lines_of(capsys, [40 * n for n in range(1, 11)], is_shown=False) == []


def test_a_terminal_gets_a_bar_with_the_time_left_that_goes_away(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    assert lines_of(capsys, [4 * n for n in range(1, 11)]) == []
    monkeypatch.undo()
    with Progress("evaluating", 8, "blocks") as progress:
        assert progress._bar.disable
    monkeypatch.setattr("sys.stderr.isatty", lambda: True)
    with Progress("evaluating", 8, "blocks") as progress:
        progress.reached(6)
        progress._bar.refresh()  # it shows itself ten times a second
    shown = capsys.readouterr().err
    assert re.search(r"evaluating:.*6/8 \[\d\d:\d\d<\d\d:\d\d.*blocks/s\]", shown)
