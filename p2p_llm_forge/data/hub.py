"""A path that does not exist: what looks like it here, or whether it is a dataset of the Hub.

The Hub is asked only for what looks like one of its names, while nothing here looks like it; once,
and not for long.
"""

from __future__ import annotations

import difflib
import itertools
import os
import re
import threading
from pathlib import Path

from p2p_llm_forge.data.formats import COMPRESSIONS, FORMATS, NO_TEXT, compression_of
from p2p_llm_forge.data.input_file import first_line
from p2p_llm_forge.errors import ForgeError

PREFIX = "hf://datasets/"  # says that a name is one of the Hub, as in Hugging Face's own tools
NAME = re.compile(r"[\w-][\w.-]*(/[\w-][\w.-]*)?", re.ASCII)
LONGEST_WAIT_S = 6.0
MOST_FILES = 10_000  # of a folder that are compared with a name
FIX = f"give a file, a folder or a glob that exists, or {PREFIX}NAME for a dataset of the Hub"


def name_on_hub(path: str, flag: str) -> str | None:
    """The dataset of the Hub that a path names, which is there as far as can be known; else None.

    Raises ForgeError, naming both possibilities, for what is neither here nor there.
    """
    if path.startswith(PREFIX):
        name = path.removeprefix(PREFIX)
        if not NAME.fullmatch(name):
            raise ForgeError(f"{flag} {path} is no name of a dataset", f"write {PREFIX}owner/name")
    elif Path(path).exists() or not looks_like_name(path) or near(path):
        return None
    else:
        name = path
    reason = _why_not(name)
    if reason:
        raise ForgeError(
            f"{flag} {path}: no such file, and no dataset of that name could be read from"
            f" the Hub ({reason})",
            FIX,
        )
    return name


def looks_like_name(path: str) -> bool:
    """Whether a path may be meant as `owner/name` or, without any ending, as a plain `name`."""
    folder, _, name = path.rpartition("/")
    ending = Path(name).suffix.lower()
    if not NAME.fullmatch(path) or (folder and Path(folder).exists()):
        return False
    known = [*FORMATS, *COMPRESSIONS, *NO_TEXT]
    is_of_a_file = bool(difflib.get_close_matches(ending, known, n=1, cutoff=0.8))
    return not ending or (bool(folder) and not is_of_a_file)


def near(path: str) -> list[str]:
    """Paths that exist and differ from this one, which does not, in one name; the likest first."""
    there, *missing = Path(path).parts
    folder = Path("/") if there == "/" else Path()
    missing = missing if there == "/" else [there, *missing]
    while len(missing) > 1 and (folder / missing[0]).is_dir():
        folder /= missing.pop(0)
    if not missing:
        return []
    try:
        with os.scandir(folder) as entries:
            names = [entry.name for entry in itertools.islice(entries, MOST_FILES)]
    except OSError:
        return []
    found = (folder.joinpath(name, *missing[1:]) for name in _alike(missing[0], names))
    return [str(path) for path in found if path.exists()][:3]


def _alike(name: str, names: list[str]) -> list[str]:
    """The names that begin alike up to their endings, then those of about the same letters."""
    by_lower = {other.lower(): other for other in sorted(names)}
    stem = name.lower().split(".")[0]
    same = [other for lower, other in by_lower.items() if stem and lower.split(".")[0] == stem]
    close = difflib.get_close_matches(name.lower(), by_lower, n=5, cutoff=0.75)
    return list(dict.fromkeys([*same, *(by_lower[lower] for lower in close)]))


def not_here(flag: str, path: str) -> ForgeError:
    """What to say of a path that does not exist, and for which the Hub is not asked."""
    alike = near(path)
    found = f"{flag} {path}: no such file or folder"
    if NAME.fullmatch(path) and not compression_of(path):
        found += ", and the Hub was not asked"
    return ForgeError(found, (f"did you mean {' or '.join(alike)}? Else " if alike else "") + FIX)


def _why_not(name: str) -> str | None:
    """Why a dataset cannot be read from the Hub, asked once; None: it can, or nothing is asked."""
    from huggingface_hub import HfApi, constants

    if constants.HF_HUB_OFFLINE:
        return None  # what was downloaded before is seen when it is read
    answers: list[str | None] = []

    def ask() -> None:
        try:
            HfApi().dataset_info(name, timeout=LONGEST_WAIT_S)
            answers.append(None)
        except Exception as error:  # of the network, of HTTP, of the Hub
            answers.append(first_line(error))

    # In a thread, for looking up the Hub's address keeps to no limit.
    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(LONGEST_WAIT_S)
    return answers[0] if answers else f"it did not answer within {LONGEST_WAIT_S:.0f} s"
