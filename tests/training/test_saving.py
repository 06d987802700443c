"""Saves run one at a time, and end with the hold on the folder."""

from __future__ import annotations

import threading

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training.saving import Writer


def test_the_writer_has_one_save_in_flight_and_is_waited_for():
    running, finished, may_end = [], [], threading.Event()

    def save(name):
        def act():
            running.append(name)
            assert len(running) - len(finished) == 1, "two saves at once"
            may_end.wait(10)
            finished.append(name)

        return act

    writer = Writer(in_background=True)
    writer.start(save("first"))
    assert finished == [], "the caller went on while it was written"
    threading.Timer(0.2, may_end.set).start()
    writer.start(save("second"))
    assert finished[:1] == ["first"], "the second save waited for the first"
    writer.wait()
    assert finished == ["first", "second"]


@pytest.mark.parametrize("in_background", [True, False])
def test_a_failed_save_is_returned_once_and_a_mistake_of_ours_is_raised(in_background):
    def fail(error):
        def act():
            raise error

        return act

    writer = Writer(in_background)
    full = ForgeError("the disk is full", "make room")
    writer.start(fail(full))
    writer.wait()
    assert (writer.failure(), writer.failure()) == (full, None)
    writer.start(fail(KeyError("bug")))
    writer.wait()
    with pytest.raises(KeyError):
        writer.failure()
