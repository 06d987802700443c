"""What a user can fix, in two fields: what was found, and how to fix it."""

from __future__ import annotations

import difflib
import io
import os
import re
import sys
import time
import unicodedata
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

LONGEST_TEXT, LONGEST_QUOTE, LONGEST_NAME = 8000, 800, 100  # characters
LONGEST_CHOICE = 200  # characters, of words to choose from
# What a terminal takes as a command: CSI, then a string (title, link, ...), then any other.
ESCAPES = re.compile(
    r"(?:\x1b\[|\x9b)[0-?]*[ -/]*[@-~]|\x1b[\]PX^_][^\x07\x1b]*(?:\x07|\x1b\\)?|\x1b[ -/]*[0-~]"
)
SHOWN = "\n\t\u200c\u200d"  # the last two join letters of some scripts, and emoji


def plain(text: object, longest: int = LONGEST_TEXT) -> str:
    """What may be printed of a text that may come from anywhere: file names, manifests, libraries.

    Without control characters, escape sequences and characters that turn the direction of writing;
    what is no character (a lone surrogate) becomes U+FFFD; the middle of a long text is left out.
    """
    text = str(text)
    if len(text) > longest:
        half = longest // 2
        text = f"{text[:half]} [... {len(text) - 2 * half} characters ...] {text[-half:]}"
    if text.isascii() and text.isprintable():
        return text
    text = ESCAPES.sub("", text)
    kinds = ((one, unicodedata.category(one)) for one in text)
    return "".join(
        "\ufffd" if kind == "Cs" else " " if kind in ("Zl", "Zp") else one
        for one, kind in kinds
        if one in SHOWN or kind not in ("Cc", "Cf")
    )


def quoted(text: object, longest: int = LONGEST_QUOTE) -> str:
    """A text of somebody else on one line, in quotes that it cannot end: never taken for ours."""
    return '"' + in_one_line(text, longest).replace('"', "'") + '"'


def in_one_line(text: object, longest: int = LONGEST_NAME) -> str:
    """A short text of somebody else, such as the name of a machine."""
    return " ".join(plain(text, longest).split())


def counted(count: int, what: str) -> str:
    """So many of something: "1 file", "1,200 files"."""
    return f"{count:,} {what}{'s' if count != 1 else ''}"


@dataclass(frozen=True)
class Problem:
    """Something that a user can fix. where: the rank or file it is about; empty: of all.

    by: the peer that has sent it, such as "rank 1 (berta)", which is then named and quoted; empty:
    it is our own. However it is made, its texts can be printed.
    """

    found: str
    fix: str
    where: str = ""
    by: str = field(default="", compare=False, kw_only=True)

    def __post_init__(self) -> None:
        for name in ("found", "fix", "where", "by"):
            object.__setattr__(self, name, plain(getattr(self, name)))

    def shown(self) -> tuple[str, str]:
        """What was found and the fix, as they are printed."""
        return (quoted(self.found), quoted(self.fix)) if self.by else (self.found, self.fix)

    def __str__(self) -> str:
        (found, fix), where = self.shown(), f"{self.where}: " if self.where else ""
        if self.by and not self.where.startswith(self.by):
            found, where = quoted(where + self.found), f"{self.by} says: "
        return f"{where}{found}\n  fix: {fix}"


class ForgeError(Exception):
    """A user's mistake or a failure of their machine: one problem, or several at once."""

    label = "error"  # what its message begins with
    status = 2  # of the process that it ends
    is_of_this_rank = False  # only this rank knows it, so this rank prints it
    leaves_threads = False  # in calls that do not come back, which the interpreter's end waits for

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
    """A fix: the known words that look most like `word`; with none alike all, of many a few."""
    known = sorted(known)
    alike = difflib.get_close_matches(word, known, n=3, cutoff=0.6)
    if alike:
        return f"did you mean {' or '.join(alike)}?"
    if len(", ".join(known)) <= LONGEST_CHOICE:
        return f"choose from: {', '.join(known)}"
    few = difflib.get_close_matches(word, known, n=5, cutoff=0.0)
    return f"choose one of {len(known)}, such as {', '.join(few)}"


def _status_of(main: Callable[[], int | None]) -> int | None:
    """What `main` returns, or exits with, when all that it has printed is written."""
    try:
        status = main()
    except SystemExit as end:  # of --help
        status = end.code if isinstance(end.code, int) else 0
    if sys.stdout is not None:
        sys.stdout.flush()
    return status


MACHINE_FIX = "make it possible (memory, disk, names, permissions), and run this again"


# A lost peer is said in words, and not by torch's C++ frames above them. torch reads this when it
# is imported.
QUIET = {"TORCH_CPP_LOG_LEVEL": "ERROR"}


def run_script(main: Callable[[], int | None], local_rank: int = 0) -> None:
    """Run a script's `main` and exit with its status; a ForgeError is one message, status 2.

    Ranks usually fail alike, so one on each machine prints; a failure of one rank alone must name
    that rank (`cluster.together` does) before it gets here. local_rank: of this process.
    """
    for name, value in QUIET.items():
        os.environ.setdefault(name, value)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # not in a notebook, nor where it is closed
            stream.reconfigure(errors="backslashreplace")  # a terminal need not know all letters
    status: int | None = 0
    try:
        status = _status_of(main)
    except BrokenPipeError:  # `--help | head`: nobody reads any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        status = 128 + 13  # as of other programs, which SIGPIPE ends
    except ForgeError as error:
        if local_rank == 0 or error.is_of_this_rank:
            print(f"{error.label}: {error}", file=sys.stderr, flush=True)
        else:
            # A launcher ends all ranks as soon as one exits: give the other the time to print.
            time.sleep(3)
        status = error.status
        if error.leaves_threads:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    except (OSError, MemoryError) as error:  # the machine's; what we expect has a better message
        found = f"could not read or write: {error}"
        found = "out of memory" if isinstance(error, MemoryError) else found
        print(f"error: {Problem(found, MACHINE_FIX)}", file=sys.stderr, flush=True)
        status = 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr, flush=True)
        status = 130
    sys.exit(status or 0)
