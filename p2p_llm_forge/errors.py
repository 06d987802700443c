"""Errors that a user can mend, and the way a script reports them."""

from __future__ import annotations

import difflib
import os
import sys
import time
from collections.abc import Callable, Iterable


class ForgeError(Exception):
    """A user's mistake or a failure of their machine, worded for them: asked, found, mend."""

    label = "error"  # what its message begins with
    status = 2  # of the process that it ends
    is_of_this_rank = False  # only this rank knows it, so this rank prints it


class Problems:
    """Collects every problem of a configuration, so that all are told at once."""

    def __init__(self) -> None:
        self.messages: list[str] = []

    def require(self, holds: bool, message: str) -> None:
        """Note `message` unless `holds`."""
        if not holds:
            self.messages.append(message)

    def raise_any(self) -> None:
        """Raise one ForgeError with all messages, if there are any."""
        if len(self.messages) == 1:
            raise ForgeError(self.messages[0])
        if self.messages:
            numbered = "\n".join(f"  {n}. {text}" for n, text in enumerate(self.messages, start=1))
            raise ForgeError(f"{len(self.messages)} problems:\n{numbered}")


def nearest(word: str, known: Iterable[str]) -> str:
    """Say which of the known words look most like `word`; with none alike, list them all."""
    known = sorted(known)
    alike = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(alike)}?" if alike else f"choose from: {', '.join(known)}"


def run_script(main: Callable[[], int | None]) -> None:
    """Run a script's `main` and exit with its status; a ForgeError is one message, status 2.

    Ranks usually fail alike, so one on each machine prints; a failure of one rank alone must name
    that rank (`cluster.together` does) before it gets here.
    """
    try:
        status = main()
    except ForgeError as error:
        if os.environ.get("LOCAL_RANK", "0") == "0" or error.is_of_this_rank:
            print(f"{error.label}: {error}", file=sys.stderr, flush=True)
        else:
            # A launcher ends all ranks as soon as one exits: give the other the time to print.
            time.sleep(3)
        status = error.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status or 0)
