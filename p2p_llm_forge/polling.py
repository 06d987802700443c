"""Wait for what nobody reports: look again and again, at first often and then less so."""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from typing import TypeVar

Seen = TypeVar("Seen")
Result = TypeVar("Result")


def pauses(shortest_s: float = 0.001, longest_s: float = 0.2) -> Iterator[None]:
    """Sleep between one step of the iteration and the next, twice as long each time."""
    pause_s = shortest_s
    while True:
        yield
        time.sleep(pause_s)
        pause_s = min(2 * pause_s, longest_s)


def wait_for(look: Callable[[], Seen], timeout_s: float = math.inf) -> Seen:
    """The first true value that `look` returns, or, after `timeout_s` seconds, its last one."""
    deadline = time.monotonic() + timeout_s
    for _ in pauses():
        seen = look()
        if seen or time.monotonic() >= deadline:
            return seen
    raise AssertionError("pauses() never ends")


def in_thread(act: Callable[[], Result]) -> Future[Result]:
    """Run `act` in a thread that may be abandoned: nothing waits for it but who asks the future."""
    answer: Future[Result] = Future()

    def run() -> None:
        try:
            answer.set_result(act())
        except BaseException as error:
            answer.set_exception(error)

    threading.Thread(target=run, daemon=True, name="abandonable").start()
    return answer
