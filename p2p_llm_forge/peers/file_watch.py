"""How far a fetch is, as a bar on the terminal, and how it is given up."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator
from typing import Any

from tqdm import tqdm


class Watch:
    """What a fetch reports, to be looked at from any thread. title: of a bar; None: none is shown.

    bytes_total, bytes_done: of all files that were not whole before, with what has come earlier.
    """

    def __init__(self, title: str | None = None) -> None:
        self.bytes_total = self.bytes_done = 0
        self.is_given_up = False
        self._title, self._lock = title, threading.Lock()
        self._bar: Any = None

    def give_up(self) -> None:
        """End the fetch: it raises GivenUp."""
        self.is_given_up = True

    def begin(self, bytes_total: int, bytes_done: int) -> None:
        """So much is to come, of which so much is here."""
        self.bytes_total, self.bytes_done = bytes_total, bytes_done

    def advance(self, count: int) -> None:
        """More has come; less than none has to come again."""
        with self._lock:
            self.bytes_done += count
            if self._bar is not None:
                self._bar.update(count)

    @contextlib.contextmanager
    def shown(self) -> Iterator[None]:
        """Show the bar, with MB/s and the time that is left, while entered."""
        if self._title is None or not self.bytes_total:
            yield
            return
        self._bar = tqdm(
            total=self.bytes_total,
            initial=self.bytes_done,
            desc=self._title,
            unit="B",
            unit_scale=True,
            disable=None,
        )
        with self._bar:
            yield
        with self._lock:
            self._bar = None
