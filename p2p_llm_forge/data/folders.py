"""The files of a folder or a glob that may be text: what is not asked for is left out.

Left out are hidden folders (.git, .ipynb_checkpoints), and folders in which a dataset lies or
grows: this program's own, finished or not, and those of `save_to_disk`. A link to a folder is
followed, but no folder is read twice, so links that go round in circles end.
"""

from __future__ import annotations

import functools
import glob
import os
from collections.abc import Callable, Iterator
from pathlib import Path

from p2p_llm_forge.data.blocks import STATE
from p2p_llm_forge.data.dataset import DATASET_DICT, MANIFEST, UNFINISHED, own_files
from p2p_llm_forge.data.unfinished import is_unfinished_folder


def files_below(folder: Path, output_dir: Path | None) -> tuple[list[Path], list[Path]]:
    """The files below a folder, in order, and the folders that are left out.

    output_dir: where a dataset is to be written; left out even where there is none yet.
    """
    left_out: list[Path] = []
    files = [
        here / name
        for here, names in _walk(folder, _asked_once(output_dir), left_out)
        for name in names
        if (here / name).is_file()
    ]
    return sorted(files), sorted(left_out)


def _walk(
    top: Path, holds_dataset: Callable[[Path], bool], left_out: list[Path]
) -> Iterator[tuple[Path, list[str]]]:
    """A folder and those below it that are asked for, each once, with the names of their files."""
    seen = set()
    for parent, inside, names in os.walk(top, followlinks=True):
        here = Path(parent)
        status = here.stat()
        is_new = (status.st_dev, status.st_ino) not in seen
        seen.add((status.st_dev, status.st_ino))
        if here != top and is_new and (here.name.startswith(".") or holds_dataset(here)):
            left_out.append(here)
            is_new = False
        inside[:] = sorted(inside) if is_new else []
        if is_new:
            yield here, names


def files_matching(pattern: str, output_dir: Path | None) -> tuple[list[Path], list[Path]]:
    """The files that a glob matches, in order, and the folders that are left out.

    Folders that the pattern names up to its first sign are asked for by name.
    """
    holds_dataset = _asked_once(output_dir)
    left_out: list[Path] = []
    files = {path for path in _matching(pattern, holds_dataset, left_out) if path.is_file()}
    named = len(_named_folder(pattern).parts)
    found = []
    for file in sorted(files):
        inside = file.parents[: len(file.parents) - named]
        if datasets := [parent for parent in inside if holds_dataset(parent)]:
            left_out.append(datasets[-1])
        else:
            found.append(file)
    return found, sorted(set(left_out))


def _matching(
    pattern: str, holds_dataset: Callable[[Path], bool], left_out: list[Path]
) -> Iterator[Path]:
    """What a glob matches. `**` goes through every folder once: glob follows links in circles."""
    parts = Path(pattern).parts
    if "**" not in parts:
        yield from map(Path, glob.glob(pattern))
        return
    place = parts.index("**")
    rest = parts[place + 1 :] or ("*",)
    for top in sorted(glob.glob(str(Path(*parts[:place])))):
        for here, _ in _walk(Path(top), holds_dataset, left_out):
            inside = str(Path(glob.escape(str(here)), *rest))
            yield from _matching(inside, holds_dataset, left_out)


def _named_folder(pattern: str) -> Path:
    parts = []
    for part in Path(pattern).parts:
        if glob.has_magic(part):
            break
        parts.append(part)
    return Path(*parts)


def _asked_once(output_dir: Path | None) -> Callable[[Path], bool]:
    """Whether a folder is one in which a dataset lies or grows; looks at each folder once."""
    output = os.path.realpath(output_dir) if output_dir else None

    @functools.cache
    def holds_dataset(folder: Path) -> bool:
        return os.path.realpath(folder) == output or is_dataset(folder)

    return holds_dataset


def is_dataset(folder: Path) -> bool:
    """Whether a dataset lies or grows there: ours, or one that `save_to_disk` wrote."""
    if (folder / DATASET_DICT).exists() or (folder / STATE).exists():
        return True
    if (folder / MANIFEST).exists() and own_files(folder) is not None:
        return True
    return is_unfinished_folder(folder / UNFINISHED)


def in_words(left_out: list[Path]) -> str:
    """The folders that are left out, some of many."""
    names = ", ".join(map(str, left_out[:3]))
    more = f" and {len(left_out) - 3} more" if len(left_out) > 3 else ""
    return f"{names}{more} (folders of datasets, or hidden)"
