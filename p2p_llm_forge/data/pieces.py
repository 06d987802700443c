"""The folder in which a dataset grows: who works on it, and the pieces that are tokenized.

    output-dir/unfinished/lock          who works here
    output-dir/unfinished/rank-1        that rank lives; .failed: why it gave up
    output-dir/unfinished/pieces/       tokens of every piece that is done, and a record of each
    output-dir/unfinished/dataset/      the finished files, just before they are published

A piece is named after all that decides its tokens: the file as it stood, the tokenizer, the rules.
So whatever lies here from a run that was killed is either just what is needed or not looked at, and
several machines that share the folder need no other way to speak to each other.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from weakref import WeakValueDictionary

from p2p_llm_forge.data.dataset import TRAIN, UNFINISHED, VALIDATION, SplitCounts
from p2p_llm_forge.data.parts import Part, ReadOptions
from p2p_llm_forge.errors import ForgeError

if TYPE_CHECKING:
    import numpy as np

HEARTBEAT_S = 2.0
STALE_S = 30.0  # without a heartbeat for so long, a worker on another machine counts as gone
PIECES_OF_A_PART = 1 << 32  # more than any part has: pieces are numbered part by part


@dataclass(frozen=True)
class Ranks:
    """Which of the processes of one launch this is."""

    rank: int = 0
    world_size: int = 1

    @property
    def is_main(self) -> bool:
        return self.rank == 0


def ranks_of_launch() -> Ranks:
    """What accelerate or torchrun says in the environment; alone where they say nothing."""
    return Ranks(int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1")))


# --- who works here -------------------------------------------------------------------------------


@contextlib.contextmanager
def claim(output_dir: Path, ranks: Ranks) -> Iterator[Path]:
    """The folder for a dataset that grows, locked against other runs while this one lives.

    Raises ForgeError when another run holds it. A run that was killed holds nothing.
    """
    folder = output_dir / UNFINISHED
    mark = folder / ("lock" if ranks.is_main else f"rank-{ranks.rank}")
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if ranks.is_main:
            _take_lock(mark, output_dir)
        else:
            mark.touch()
    except OSError as error:
        raise ForgeError(
            f"--output-dir {output_dir} is not writable ({error.strerror}): give another folder"
        ) from error
    stop = threading.Event()
    beating = threading.Thread(target=_beat, args=(mark, stop), daemon=True)
    beating.start()
    try:
        yield folder
    finally:
        stop.set()
        beating.join()
        mark.unlink(missing_ok=True)


def remove_leftovers(output_dir: Path) -> None:
    """Remove the folder of a run that was killed just after it had published its dataset."""
    folder = output_dir / UNFINISHED
    if folder.exists() and not holder_of(folder / "lock"):
        shutil.rmtree(folder, ignore_errors=True)


def _take_lock(lock: Path, output_dir: Path) -> None:
    holder = json.dumps({"host": socket.gethostname(), **_this_process()})
    for _ in range(3):
        try:
            descriptor = os.open(lock, os.O_CREAT | os.O_EXCL | os.O_WRONLY)
        except FileExistsError:
            told = holder_of(lock)
            if told:
                raise ForgeError(
                    f"--output-dir {output_dir} is being prepared by {told}: wait for it, or give "
                    "another folder"
                ) from None
            # Only one of several can rename what a dead run left.
            aside = lock.with_name(f"lock-of-the-dead-{os.getpid()}")
            with contextlib.suppress(FileNotFoundError):
                lock.rename(aside)
                aside.unlink()
            continue
        with os.fdopen(descriptor, "w") as file:
            file.write(holder)
        return
    raise ForgeError(f"--output-dir {output_dir} was taken by another run just now: wait for it")


def _this_process() -> dict[str, Any]:
    import psutil

    return {"pid": os.getpid(), "started": psutil.Process().create_time()}


def holder_of(lock: Path) -> str:
    """Who lives and holds the lock, in words; empty when nobody does."""
    import psutil

    try:
        silent_s = time.time() - lock.stat().st_mtime
        holder = json.loads(lock.read_text() or "{}")
    except FileNotFoundError:
        return ""
    except ValueError:
        holder = {}
    if not holder:  # made a moment ago, or killed while it was written
        return "another run" if silent_s < HEARTBEAT_S else ""
    if holder["host"] == socket.gethostname():
        try:
            lives = abs(psutil.Process(holder["pid"]).create_time() - holder["started"]) < 1
            lives = lives and psutil.Process(holder["pid"]).status() != psutil.STATUS_ZOMBIE
        except psutil.NoSuchProcess:
            lives = False
    else:
        lives = silent_s < STALE_S
    return f"process {holder['pid']} on {holder['host']}" if lives else ""


def _beat(mark: Path, stop: threading.Event) -> None:
    while not stop.wait(HEARTBEAT_S):
        with contextlib.suppress(OSError):
            os.utime(mark)


def is_alive(mark: Path) -> bool:
    """Whether the process behind a mark has given a sign of life lately."""
    try:
        return time.time() - mark.stat().st_mtime < STALE_S
    except OSError:
        return False


def tell_failure(folder: Path, ranks: Ranks, message: str) -> None:
    """Leave word for the main process, the only one that prints."""
    with contextlib.suppress(OSError):
        write_whole(folder / f"rank-{ranks.rank}.failed", message.encode())


def require_no_failure(folder: Path) -> None:
    """Raise the ForgeError that ended another rank."""
    for path in sorted(folder.glob("rank-*.failed")):
        message = path.read_text()
        path.unlink()
        raise ForgeError(message)


# --- pieces that are done -------------------------------------------------------------------------


@dataclass(frozen=True)
class Record:
    """What is known of a piece that is done. checksum: of its file of tokens (XXH3)."""

    splits: dict[str, SplitCounts]
    digest: str
    checksum: str
    skipped: int
    is_last: bool


class Pieces:
    """The tokens of pieces, on disk. rules: all that decides the tokens besides the text."""

    def __init__(self, folder: Path, rules: dict[str, Any], dtype: str) -> None:
        self._folder = folder
        self._rules = rules
        self._dtype = dtype
        self._records: dict[str, Record] = {}
        # Tokens that were written just now and are still in somebody's hands.
        self._fresh: WeakValueDictionary[str, np.ndarray] = WeakValueDictionary()
        self._part_keys: dict[int, tuple[Part, str]] = {}
        folder.mkdir(parents=True, exist_ok=True)

    def record(self, number: int, part: Part, piece: int) -> Record | None:
        """The record of a piece, if it is done and its tokens are as they were written."""
        name = self._name(number, part, piece)
        if name not in self._records:
            try:
                content = json.loads((self._folder / f"{name}.json").read_bytes())
                splits = {key: SplitCounts(**counts) for key, counts in content["splits"].items()}
                record = Record(**content | {"splits": splits})
            except (OSError, ValueError):
                return None
            tokens = self._tokens(name)
            if tokens is None or self._checksum(tokens) != record.checksum:
                return None
            self._records[name] = record
        return self._records[name]

    def records(self, number: int, part: Part) -> list[Record]:
        """The records of a part's pieces from its first to its last; empty unless all are done."""
        found: list[Record] = []
        while record := self.record(number, part, len(found)):
            found.append(record)
            if record.is_last:
                return found
        return []

    def write(
        self,
        number: int,
        part: Part,
        piece: int,
        tokens: np.ndarray,
        splits: dict[str, SplitCounts],
        facts: dict[str, Any],
    ) -> Record:
        """Keep the tokens of a piece: those to train on, then those held out, as `splits` counts.

        facts: digest, skipped, is_last. Raises OSError.
        """
        name = self._name(number, part, piece)
        record = Record(splits=splits, checksum=self._checksum(tokens), **facts)
        # No fsync: a crash of the machine can damage these, which the checksum tells.
        write_whole(self._folder / f"{name}.tokens", tokens.data)
        write_whole(self._folder / f"{name}.json", json.dumps(asdict(record)).encode())
        self._fresh[name] = tokens
        self._records[name] = record
        return record

    def tokens(self, number: int, part: Part, piece: int) -> dict[str, np.ndarray]:
        """The tokens of a piece that is done, by split."""
        name = self._name(number, part, piece)
        record, tokens = self._records[name], self._fresh.get(name)
        if tokens is None:
            tokens = self._tokens(name)
            if tokens is None or self._checksum(tokens) != record.checksum:
                raise ForgeError(
                    f"{self._folder / name}.tokens was damaged on the disk: run the same command "
                    "again, and it is made anew"
                )
        train = record.splits[TRAIN].tokens
        return {TRAIN: tokens[:train], VALIDATION: tokens[train:]}

    def _tokens(self, name: str) -> np.ndarray | None:
        import numpy as np

        try:
            return np.fromfile(self._folder / f"{name}.tokens", self._dtype)
        except OSError:
            return None

    @staticmethod
    def _checksum(tokens: Any) -> str:
        import xxhash

        return xxhash.xxh3_128_hexdigest(tokens.data)

    def _name(self, number: int, part: Part, piece: int) -> str:
        known = self._part_keys.get(number)
        if known is None or known[0] is not part:
            content = json.dumps([number, asdict(part), self._rules], sort_keys=True)
            key = hashlib.blake2b(content.encode(), digest_size=10).hexdigest()
            known = self._part_keys[number] = (part, key)
        return f"{known[1]}-{piece:06d}"


def rules_of_pieces(reading: ReadOptions, **others: Any) -> dict[str, Any]:
    """All that decides a piece's tokens besides its part."""
    return {**asdict(reading), **others}


def write_whole(path: Path, content: Any) -> None:
    """Write a file that is either whole or not there, whatever kills the process."""
    passing = path.with_name(f"{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with passing.open("wb") as file:
            file.write(content)
        os.replace(passing, path)
    except OSError:
        passing.unlink(missing_ok=True)
        raise
