"""What asks a run to stop: signals and the clock, each with a status of its own."""

from __future__ import annotations

import os
import signal
import threading

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training.interruptions import (
    NOTHING,
    OUT_OF_TIME,
    SAVE_NOW,
    Interruptions,
    interruption,
)
from tests.waiting import wait_until


def test_signals_are_noted_while_entered_and_left_as_they_were():
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGUSR1)}
    with Interruptions(None) as interruptions:
        assert interruptions.asked() == NOTHING
        os.kill(os.getpid(), signal.SIGUSR1)
        wait_until(lambda: interruptions.asked() == SAVE_NOW)
        interruptions.saved()
        assert interruptions.asked() == NOTHING
        os.kill(os.getpid(), signal.SIGTERM)
        wait_until(lambda: interruptions.asked() == signal.SIGTERM)
    assert {number: signal.getsignal(number) for number in before} == before


def test_a_signal_does_not_end_a_process_before_its_error_is_reported():
    before = signal.getsignal(signal.SIGTERM)
    interruptions = Interruptions(None)
    with pytest.raises(ForgeError, match="a peer"), interruptions.kept_by_errors():
        try:
            with interruptions:
                raise ForgeError("a peer is lost", "start it")
        finally:  # what closes files and connections
            os.kill(os.getpid(), signal.SIGTERM)
            wait_until(lambda: interruptions.asked() == signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) is before


def test_what_ends_well_leaves_signals_at_once():
    before = signal.getsignal(signal.SIGTERM)
    interruptions = Interruptions(None)
    with interruptions.kept_by_errors():
        with interruptions:
            assert signal.getsignal(signal.SIGTERM) is not before
        assert signal.getsignal(signal.SIGTERM) is before


def test_a_signal_is_worth_more_than_the_clock_and_the_clock_more_than_a_save():
    with Interruptions(1e-9) as interruptions:
        assert interruptions.asked() == OUT_OF_TIME
        os.kill(os.getpid(), signal.SIGINT)
        wait_until(lambda: interruptions.asked() == signal.SIGINT)
    assert SAVE_NOW > NOTHING


def test_off_the_main_thread_signals_stay_as_they_are():
    handlers = []

    def enter():
        with Interruptions(None) as interruptions:
            handlers.append(signal.getsignal(signal.SIGTERM))
            assert interruptions.asked() == NOTHING

    thread = threading.Thread(target=enter)
    thread.start()
    thread.join()
    assert handlers == [signal.getsignal(signal.SIGTERM)]


@pytest.mark.parametrize(
    ("asked", "is_elastic", "found", "status"),
    [
        (signal.SIGTERM, False, "SIGTERM: stopped and saved after step 7", 143),
        (signal.SIGINT, True, "SIGINT: stopped and saved after step 7", 130),
        (OUT_OF_TIME, False, "--max-seconds is over: stopped and saved after step 7", 124),
        (OUT_OF_TIME, True, "--max-seconds is over: stopped and saved after step 7", 0),
    ],
)
def test_the_end_names_its_cause_and_has_its_status(asked, is_elastic, found, status):
    error = interruption(asked, 7, is_elastic)
    assert error.problems[0].found == found and error.status == status
    assert error.problems[0].fix == "continue with --resume auto"
