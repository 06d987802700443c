"""The folder in which a dataset grows: who works there, what is kept, and room for it.

output-dir/unfinished/lock            which launch works here
output-dir/unfinished/rank-0          is touched every second while that rank of it lives
output-dir/unfinished/rank-1.failed   why that rank gave up
output-dir/unfinished/tokenizer-…     trained on the text
output-dir/unfinished/pieces/         tokens of every piece that is done, and a record of each
output-dir/unfinished/dataset-…/      the finished files, just before they are published
output-dir/unfinished/fetched-…/      of one that comes from another machine: see fetched.py

No clock is compared with another machine's: a rank is gone when its file has not changed for
GONE_AFTER_S of watching.
"""

from __future__ import annotations

import contextlib
import errno
import os
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

from p2p_llm_forge.data.dataset import (
    COMING,
    MANIFEST,
    REPLACED,
    UNFINISHED,
    clear_half_published,
    files_of_others,
    own_files,
)
from p2p_llm_forge.data.parts import Part
from p2p_llm_forge.data.splits import TRAIN, VALIDATION
from p2p_llm_forge.errors import ForgeError, Problem
from p2p_llm_forge.files import Lock, Pulse, beating, only_writer, read_json, write_json

LOCK, PIECES = "lock", "pieces"
TRAINED_TOKENIZER = "tokenizer-"  # and a digest of what it was trained on
WORK = (PIECES, TRAINED_TOKENIZER)  # what a preparation goes on from
# What a preparation writes there; partial files are called tmp-... until they are renamed.
OF_PIECES = re.compile(r"(tmp-)?[0-9a-f-]+\.(tokens|documents|text|json)(\.\d+\.\d+)?", re.ASCII)
OWN = re.compile(
    rf"{LOCK}|tmp-{LOCK}-[0-9a-f]{{16}}|{PIECES}|{TRAINED_TOKENIZER}[0-9a-f]{{20}}"
    rf"|(tmp-)?rank-\d+(\.failed)?(\.\d+\.\d+)?|(dataset|fetched)-\w+|tmp-tokenizer|{REPLACED}"
    rf"|{TRAIN}|{VALIDATION}",
    re.ASCII,
)
FULL = (errno.ENOSPC, errno.EDQUOT)
COMES_WITHIN_S = 30.0  # after the main rank has begun
GONE_AFTER_S = 30.0


@contextlib.contextmanager
def claimed(output_dir: Path) -> Iterator[Lock]:
    """Hold the unfinished folder of `output_dir`, which stays only if the work inside fails.

    It stays then for the sake of the pieces that are done, or of what has come from another
    machine; nothing done leaves no trace. Raises ForgeError when another run holds it, or when
    something that no preparation has written is in the way there or of the dataset. A run that was
    killed holds nothing.
    """
    folder = output_dir / UNFINISHED
    try:
        with only_writer(folder / LOCK, f"--output-dir {output_dir}") as lock:
            refuse_files_of_others(output_dir)
            clear_half_published(output_dir)
            _clear(folder, (*WORK, COMING))
            try:
                yield lock
            except BaseException:
                lock.confirm()  # or what lies here is another run's
                has_pieces = any((folder / PIECES).glob("*.json"))
                _clear(folder, (*WORK, COMING) if has_pieces else (COMING,))
                raise
            _clear(folder, ())
    finally:
        for path in (folder, output_dir):
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def refuse_files_of_others(output_dir: Path) -> None:
    """Raise ForgeError if something that no preparation has written is in the way of a dataset."""
    if (output_dir / MANIFEST).exists() and own_files(output_dir) is None:
        raise ForgeError(
            f"{output_dir / MANIFEST} is not of a dataset of this program, so nothing is replaced",
            "give another folder",
        )
    unfinished = (path for path in (output_dir / UNFINISHED).iterdir() if not _is_ours(path))
    others = files_of_others(output_dir)
    others += sorted(f"{UNFINISHED}/{path.name}" for path in unfinished)
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        raise ForgeError(
            f"--output-dir {output_dir} holds {', '.join(others[:3])}{more}, which no preparation"
            " has written",
            "move that elsewhere, or give another folder",
        )


def is_unfinished_folder(folder: Path) -> bool:
    """Whether a dataset grows in this folder, or was growing there when its run was killed."""
    try:
        paths = list(folder.iterdir())
    except OSError:
        return False
    marks = (LOCK, PIECES, REPLACED, TRAINED_TOKENIZER, "dataset-", COMING, "rank-")
    return any(path.name.startswith(marks) for path in paths) and all(map(_is_ours, paths))


def _is_ours(path: Path) -> bool:
    """Whether a preparation has written this into its unfinished folder."""
    if path.is_symlink() or not OWN.fullmatch(path.name):
        return False
    if path.name == PIECES:
        return all(OF_PIECES.fullmatch(piece.name) for piece in path.glob("*"))
    if path.name in (TRAIN, VALIDATION):  # of earlier versions
        return all(file.suffix in (".arrow", ".json") for file in path.glob("*"))
    return True


def _clear(folder: Path, kept: tuple[str, ...]) -> None:
    """Remove what lies there but the lock, and what begins with one of `kept`."""
    for path in folder.iterdir():
        if path.name.startswith((LOCK, *kept)) or not _is_ours(path):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


@dataclass(frozen=True)
class Ranks:
    """Which of the processes of one launch this is."""

    rank: int = 0
    world_size: int = 1


class OtherRank(Pulse):
    """Watches another rank by the file that it touches."""

    def __init__(self, folder: Path, rank: int) -> None:
        super().__init__(folder / f"rank-{rank}")

    def lives(self) -> bool:
        """Whether it has shown a sign of life lately."""
        return self.is_beating(GONE_AFTER_S)


@contextlib.contextmanager
def alive(folder: Path, ranks: Ranks) -> Iterator[None]:
    """Show the other ranks that this one lives, while entered. Raises OSError.

    The ForgeError that ends a rank but the main one is posted, for the main one alone prints.
    """
    mark = folder / f"rank-{ranks.rank}"
    mark.touch()
    try:
        with beating(mark):
            yield
    except ForgeError as error:
        if ranks.rank:
            with contextlib.suppress(OSError):
                problems = [asdict(problem) for problem in error.problems]
                write_json(mark.with_suffix(".failed"), problems, durable=False)
        raise
    finally:
        with contextlib.suppress(OSError):
            mark.unlink()


class Helpers:
    """The ranks but the main one, as the main one sees them."""

    def __init__(self, folder: Path, ranks: Ranks) -> None:
        self._folder = folder
        self._others = [OtherRank(folder, rank) for rank in range(1, ranks.world_size)]
        self._started = time.monotonic()

    def are_working(self) -> bool:
        """Whether one lives or may still come. Raises the ForgeError that ended one."""
        for path in sorted(self._folder.glob("rank-*.failed")):
            raise ForgeError.of(Problem(**problem) for problem in read_json(path))
        may_come = time.monotonic() - self._started < COMES_WITHIN_S
        # All are looked at, for a pulse is as old as the last look at it.
        return any([rank.lives() or (may_come and not rank.has_changed()) for rank in self._others])


@contextlib.contextmanager
def room_explained(folder: Path, parts: list[Part]) -> Iterator[None]:
    """Raise a ForgeError that states the room needed when a write inside fails for want of it."""
    try:
        yield
    except Exception as error:
        # tokenizers 0.23 raises a plain Exception for a full disk
        texts = [f"(os error {code})" for code in FULL if type(error) is Exception]
        if getattr(error, "errno", None) not in FULL and not any(t in str(error) for t in texts):
            raise
        # Tokens lie on the disk twice, as pieces and as blocks, and take about half of their text.
        # With --deduplicate, so do the keys of documents.
        in_pieces = sum(path.stat().st_size for path in (folder / PIECES).glob("*.[td]*"))
        needed = max(sum(part.bytes for part in parts) - in_pieces, in_pieces)
        free = shutil.disk_usage(folder).free
        raise ForgeError(
            f"the disk of {folder} is full: {needed / 1e9:.2f} GB are needed to finish, "
            f"{free / 1e9:.2f} GB are free",
            "make room and run the same command: what is tokenized so far is kept",
        ) from error


def require_room(folder: Path, needed: int) -> None:
    """Raise OSError for a full disk unless `needed` bytes and a little more are free."""
    if shutil.disk_usage(folder).free < needed + (1 << 20):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(folder))
