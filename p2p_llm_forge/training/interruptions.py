"""What asks a run to stop or to save before its end: signals and the clock."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import threading
import time
from collections.abc import Iterator

from p2p_llm_forge.errors import ForgeError

# What a rank asks for, as a number, so that the ranks can agree on the largest: these, or the
# number of a stop signal (SIGINT is 2, SIGTERM 15).
NOTHING, SAVE_NOW, OUT_OF_TIME = 0, 1, 3
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM)

# torchrun passes a signal on to workers that the terminal has signalled too: not a second wish.
REPEAT_S = 1.0


class Interrupted(ForgeError):
    """The run was asked to stop, has saved, and can be resumed."""

    label = "stopped"


class Interruptions:
    """Watches for SIGINT, SIGTERM (stop), SIGUSR1 (save now) and a time limit while it is entered.

    The first stop signal is noted, a second one ends the process at once. A thread of its own reads
    the signals: Python's handlers would wait as long as the main thread waits for a peer. Off the
    main thread (some notebooks) signals stay as they are.

    Where a launcher dies, its workers may lose the store that it kept before they get its SIGTERM.
    So that it does not end them before they have said what they lost, an error keeps signals noted
    until `kept_by_errors` is left.
    """

    def __init__(self, max_seconds: float | None) -> None:
        self._deadline = time.monotonic() + max_seconds if max_seconds else None
        self._signal = NOTHING
        self._save_now = False
        self._previous: dict[int, object] = {}
        self._is_kept_by_errors = False

    @contextlib.contextmanager
    def kept_by_errors(self) -> Iterator[None]:
        """Around all that has to be closed before an error is reported."""
        self._is_kept_by_errors = True
        try:
            yield
        finally:
            self._leave()

    def __enter__(self) -> Interruptions:
        if threading.current_thread() is threading.main_thread():
            self._reader, self._writer = socket.socketpair()
            self._writer.setblocking(False)
            for number in (*STOP_SIGNALS, signal.SIGUSR1):
                # Only a handler of Python's makes the signal reach the wake-up socket.
                self._previous[number] = signal.signal(number, lambda *_: None)
            self._previous_fd = signal.set_wakeup_fd(self._writer.fileno())
            threading.Thread(target=self._watch, daemon=True, name="interruptions").start()
        return self

    def __exit__(self, kind: type[BaseException] | None, *_: object) -> None:
        if kind is None or not self._is_kept_by_errors:
            self._leave()

    def _leave(self) -> None:
        if self._previous:
            signal.set_wakeup_fd(self._previous_fd)
            for number, handler in self._previous.items():
                signal.signal(number, handler)  # type: ignore[arg-type]
            self._previous = {}
            self._writer.close()  # ends the thread

    def asked(self) -> int:
        """What this rank has been asked for: a signal's number, OUT_OF_TIME, SAVE_NOW, NOTHING."""
        if self._signal:
            return self._signal
        if self._deadline is not None and time.monotonic() > self._deadline:
            return OUT_OF_TIME
        return SAVE_NOW if self._save_now else NOTHING

    def saved(self) -> None:
        """What SIGUSR1 asked for is done."""
        self._save_now = False

    def _watch(self) -> None:
        first_at = 0.0
        while numbers := self._reader.recv(16):
            for number in numbers:
                if number == signal.SIGUSR1:
                    self._save_now = True
                elif number in STOP_SIGNALS and not self._signal:
                    self._signal, first_at = number, time.monotonic()
                elif number in STOP_SIGNALS and time.monotonic() - first_at > REPEAT_S:
                    os._exit(128 + number)
        self._reader.close()


def interruption(asked: int, step: int, is_elastic: bool) -> Interrupted:
    """The end of a run that has saved after `step` because of `asked`, with its exit status.

    A time limit ends with 124 as timeout(1) does, so that a script sees that the run is not
    finished; with 0 under an elastic launcher, which would start it again otherwise.
    """
    if asked == OUT_OF_TIME:
        cause, status = "--max-seconds is over", 0 if is_elastic else 124
    else:
        cause, status = signal.Signals(asked).name, 128 + asked
    error = Interrupted(
        f"{cause}: stopped and saved after step {step}", "continue with --resume auto"
    )
    error.status = status
    return error
