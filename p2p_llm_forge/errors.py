"""What a user can fix, in two fields: what was found, and how to fix it."""

from __future__ import annotations

import difflib
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass


@dataclass(frozen=True)
class Problem:
    """Something that a user can fix. where: the rank or file it is about; empty: of all."""

    found: str
    fix: str
    where: str = ""

    def __str__(self) -> str:
        where = f"{self.where}: " if self.where else ""
        return f"{where}{self.found}\n  fix: {self.fix}"


class ForgeError(Exception):
    """A user's mistake or a failure of their machine: one problem, or several at once."""

    label = "error"  # what its message begins with
    status = 2  # of the process that it ends
    is_of_this_rank = False  # only this rank knows it, so this rank prints it

    def __init__(self, found: str, fix: str, *, where: str = "") -> None:
        self.problems: tuple[Problem, ...] = (Problem(found, fix, where),)
        super().__init__(found, fix)

    @classmethod
    def of(cls, problems: Iterable[Problem]) -> ForgeError:
        """One error for several problems; each keeps its two fields."""
        first, *others = problems
        error = cls(first.found, first.fix, where=first.where)
        error.problems = (first, *others)
        return error

    def __str__(self) -> str:
        if len(self.problems) == 1:
            return str(self.problems[0])
        numbered = []
        for number, problem in enumerate(self.problems, start=1):
            first, *others = str(problem).splitlines()
            numbered += [f"  {number}. {first}", *(f"     {line}" for line in others)]
        return "\n".join([f"{len(self.problems)} problems:", *numbered])


class Problems:
    """Collects every problem, so that all are reported at once."""

    def __init__(self) -> None:
        self.found: list[Problem] = []

    def require(self, holds: bool, found: str, fix: str) -> None:
        """Note a problem unless `holds`."""
        if not holds:
            self.found.append(Problem(found, fix))

    def add(self, error: ForgeError) -> None:
        """Note what an error says."""
        self.found += error.problems

    def raise_any(self) -> None:
        """Raise one ForgeError with all problems, if there are any."""
        if self.found:
            raise ForgeError.of(self.found)


def nearest(word: str, known: Iterable[str]) -> str:
    """A fix: the known words that look most like `word`; with none alike, all of them."""
    known = sorted(known)
    alike = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    return f"did you mean {' or '.join(alike)}?" if alike else f"choose from: {', '.join(known)}"


def run_script(main: Callable[[], int | None], local_rank: int = 0) -> None:
    """Run a script's `main` and exit with its status; a ForgeError is one message, status 2.

    Ranks usually fail alike, so one on each machine prints; a failure of one rank alone must name
    that rank (`cluster.together` does) before it gets here. local_rank: of this process.
    """
    try:
        status = main()
    except ForgeError as error:
        if local_rank == 0 or error.is_of_this_rank:
            print(f"{error.label}: {error}", file=sys.stderr, flush=True)
        else:
            # A launcher ends all ranks as soon as one exits: give the other the time to print.
            time.sleep(3)
        status = error.status
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status or 0)
