"""One fetch: files come in pieces from several ranks at once, are verified, and only then count.

A lane is a connection to a source with a thread of its own; it takes the next piece that nobody
has and that its source can bring. Another thread follows the pieces, hashes each file in order, and
puts it at its place when it is what it should be. A source that is lost, lacks a file or has a
damaged one is not asked for it again; the others go on.
"""

from __future__ import annotations

import contextlib
import shutil
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from p2p_llm_forge.errors import ForgeError, Problem, in_one_line
from p2p_llm_forge.peers.file_requests import (
    Lacks,
    Part,
    ask_for_digest,
    ask_for_list,
    ask_for_part,
)
from p2p_llm_forge.peers.file_stream import FRAME_BYTES, FileStream
from p2p_llm_forge.peers.file_watch import Watch
from p2p_llm_forge.peers.partial_files import FileFacts, PartialFile
from p2p_llm_forge.peers.signed_stream import Gone, Stranger
from p2p_llm_forge.shapes import is_path_inside

LANES = 2  # of each source: while one waits for an answer, the other receives
TRIES = 3  # to connect, without a piece in between, before a source counts as lost
RESTARTS = 2  # of a file that no source has damaged, before this machine counts as the culprit
LATE = 2.0  # of a piece's usual time, after which another source may bring it too
LEAST_LATE_S = 1.0
EACH_FILE_BYTES = 8 << 10  # that a file system may take beyond the content
DAMAGED = "its file is damaged"


class GivenUp(Exception):
    """The fetch was ended by who watched it; what has come stays."""


@dataclass(eq=False)
class Source:
    """A rank that offers files. name: for messages. connect: raises Gone, Stranger."""

    rank: int
    name: str
    key: str
    connect: Callable[[], FileStream]
    files: dict[str, tuple[int, int]] | None = None  # number and size by name, once it has said so
    lost: str = ""  # how, when it is

    def lacks(self, item: _Item) -> str:
        """Why it cannot bring a file; empty if it may."""
        if self.lost:
            return self.lost
        if self.rank in item.refused:
            return item.refused[self.rank]
        if self.files is not None and item.name not in self.files:
            return "it does not have the file"
        if self.files is not None and self.files[item.name][1] != item.file.facts.size:
            return f"{DAMAGED}: {self.files[item.name][1]} bytes instead of {item.file.facts.size}"
        return ""


@dataclass(eq=False)
class _Item:
    """A file that is on its way."""

    name: str
    file: PartialFile
    refused: dict[int, str] = field(default_factory=dict)  # by rank: why it is not asked again
    came_from: set[int] = field(default_factory=set)
    restarts: int = 0  # those that were no source's fault

    @property
    def is_here(self) -> bool:
        return self.file.count == len(self.file.has) and 0 not in self.file.has


@dataclass(eq=False)
class _Piece:
    item: _Item
    number: int
    takers: dict[int, float] = field(default_factory=dict)  # by rank: since when

    @property
    def is_here(self) -> bool:
        return bool(self.item.file.has[self.number])


@dataclass(frozen=True)
class Fetched:
    """What a fetch has brought."""

    bytes_received: int
    seconds: float
    bytes_by_rank: Mapping[int, int]


class Fetch:
    """Files that are fetched into a folder; see the head of this module, and `run`.

    stand_back: where given, the fetch is behind the training's own traffic, and this waits for it.
    """

    def __init__(
        self,
        files: Mapping[str, FileFacts],
        sources: Sequence[Source],
        into: Path,
        watch: Watch,
        stand_back: Callable[[], object] | None = None,
    ) -> None:
        self._sources, self._into, self._watch = list(sources), into, watch
        self._stand_back, self._changed = stand_back, threading.Condition()
        self._is_over = False
        self._error: BaseException | None = None
        self._streams: set[FileStream] = set()
        self._received = dict.fromkeys((source.rank for source in sources), 0)
        self._usual_s = 0.0  # that a piece takes
        self._items = [
            _Item(name, PartialFile(into / name, facts)) for name, facts in _checked(files).items()
        ]
        self._left: list[_Item] = []  # not at their place yet
        self._wanted: list[_Piece] = []  # in the order in which they are asked for

    def run(self) -> Fetched:
        """Fetch all, and return when all files are at their places, durably.

        Raises ForgeError, GivenUp; what has come stays for the next try.
        """
        started = time.monotonic()
        try:
            self._begin()
            if self._left and self._error is None:
                with self._watch.shown():
                    self._start()
                    self._wait()
        except OSError as error:
            raise self._of_disk(error) from error
        finally:
            for item in self._items:
                item.file.close()
        if self._error is not None:
            raise self._error
        received = sum(self._received.values())
        return Fetched(received, time.monotonic() - started, dict(self._received))

    # --- beginning and end ------------------------------------------------------------------------

    def _begin(self) -> None:
        """See what is here, and whether there is room for the rest."""
        for item in self._items:
            if item.file.is_whole():
                item.file.tidy()
            else:
                item.file.look()
                self._left.append(item)
        self._need_room()
        total = sum(item.file.facts.size for item in self._left)
        missing = sum(item.file.bytes_missing() for item in self._left)
        for item in reversed(self._left):
            item.file.open()
            self._want(item)
        self._watch.begin(total, total - missing)
        with self._changed:
            self._check_hopes()

    def _need_room(self) -> None:
        missing = sum(item.file.bytes_missing() + EACH_FILE_BYTES for item in self._left)
        there = next(one for one in (self._into, *self._into.absolute().parents) if one.is_dir())
        free = shutil.disk_usage(there).free
        if self._left and missing > free:
            raise ForgeError(
                f"{self._into} has no room for the files to fetch: {missing:,} bytes are missing,"
                f" {free:,} are free there",
                f"make room there, {missing - free:,} bytes more, or give another folder",
            )

    def _start(self) -> None:
        lanes = LANES if len(self._wanted) >= LANES else 1
        acts: list[Callable[[], None]] = [self._finish_files]
        for source in self._sources:
            acts += [partial(self._lane, source)] * lanes
        for act in acts:
            threading.Thread(target=act, daemon=True, name="fetching files").start()

    def _want(self, item: _Item) -> None:
        """Ask for what is missing of a file, before all else."""
        numbers = range(item.file.count)
        self._wanted[:0] = [_Piece(item, n) for n in numbers if not item.file.has[n]]

    def _wait(self) -> None:
        """Until all is done, or nothing can be done."""
        try:
            with self._changed:
                while self._left and self._error is None:
                    if self._watch.is_given_up:
                        self._error = GivenUp()
                    self._changed.wait(0.2)
        finally:
            with self._changed:
                self._is_over = True
                self._changed.notify_all()
                streams = list(self._streams)
            for stream in streams:
                stream.close()

    def _fail(self, error: BaseException) -> None:
        with self._changed:
            self._error = self._error or error
            self._changed.notify_all()

    def _of_disk(self, error: OSError) -> ForgeError:
        reason = error.strerror or str(error)
        found = f"{self._into} cannot be written: {reason}; what has come stays there"
        fix = "make room, or make it writable"
        if isinstance(error, IsADirectoryError | NotADirectoryError | FileExistsError):
            path = Path(error.filename)
            there = next(one for one in (path, *path.absolute().parents) if one.exists())
            fix = f"move {there} away"
        return ForgeError(found, f"{fix}, and start this again")

    def _check_hopes(self) -> None:
        """Fail if a file can come from nobody any more. Holds the lock."""
        for item in self._left:
            if item.is_here:
                continue
            reasons = [(source.name, source.lacks(item)) for source in self._sources]
            if all(reason for _, reason in reasons):
                problems = [
                    Problem(f"{item.name} cannot be fetched from {name}: {reason}", FIX)
                    for name, reason in reasons
                ]
                nobody = Problem(f"{item.name} cannot be fetched: no machine offers it", FIX)
                self._error = self._error or ForgeError.of(problems or [nobody])
                self._changed.notify_all()
                return

    # --- lanes ------------------------------------------------------------------------------------

    def _lane(self, source: Source) -> None:
        """Bring pieces from a source until all is over, or it is lost."""
        failures = 0
        while not self._is_over and not source.lost:
            try:
                with self._connected(source) as stream:
                    while piece := self._next(source):
                        self._bring(source, stream, piece)
                        failures = 0
                return
            except _Over:
                return
            except (Gone, Lacks, Stranger) as error:
                failures += 1
                reason = in_one_line(error, 200)
                if failures == TRIES or not isinstance(error, Gone):
                    with self._changed:
                        source.lost = source.lost or reason
                        self._check_hopes()
                        self._changed.notify_all()
                elif not self._is_over:
                    with self._changed:
                        self._changed.wait(0.25 * 2**failures)
            except BaseException as error:
                failed = self._of_disk(error) if isinstance(error, OSError) else error
                return self._fail(failed)

    @contextlib.contextmanager
    def _connected(self, source: Source) -> Iterator[FileStream]:
        stream = source.connect()
        with self._changed:
            self._streams.add(stream)
        try:
            if self._is_over:
                raise _Over
            files = source.files or ask_for_list(stream, source.key)
            with self._changed:
                source.files = files
                self._check_hopes()
                self._changed.notify_all()
            yield stream
        finally:
            with self._changed:
                self._streams.discard(stream)
            stream.close()

    def _next(self, source: Source) -> _Piece | None:
        """The next piece that a source can bring, as soon as there is one; None at the end."""
        with self._changed:
            while not self._is_over and not source.lost:
                can_bring = (one for one in self._wanted if not source.lacks(one.item))
                free = next((one for one in can_bring if not one.takers), None)
                if piece := free or self._late(source):
                    piece.takers[source.rank] = time.monotonic()
                    return piece
                self._changed.wait(0.2 if self._wanted else None)
        return None

    def _late(self, source: Source) -> _Piece | None:
        """A piece that takes others so long that this source may bring it too."""
        limit_s = max(LEAST_LATE_S, LATE * self._usual_s)
        for piece in self._wanted:
            if source.rank not in piece.takers and not source.lacks(piece.item):
                since = max(piece.takers.values(), default=0.0)
                if time.monotonic() - since > limit_s:
                    return piece
        return None

    def _bring(self, source: Source, stream: FileStream, piece: _Piece) -> None:
        item, began, attempt = piece.item, time.monotonic(), piece.item.file.attempt
        offset, size = item.file.span(piece.number)
        assert source.files is not None
        number = source.files[item.name][0]
        part = Part(source.key, number, offset, size, self._stand_back is not None)
        written, is_mine = 0, False

        def write(at: int, content: memoryview) -> None:
            nonlocal written
            if self._stand_back is not None:
                self._stand_back()
            if self._is_over or self._watch.is_given_up:
                raise _Over
            self._received[source.rank] += len(content)
            item.came_from.add(source.rank)  # also what it leaves in a piece of another source
            if item.file.write(at, content, attempt):
                written += len(content)
                self._watch.advance(len(content))

        try:
            ask_for_part(stream, part, write, memoryview(bytearray(FRAME_BYTES)))
        except Lacks as error:
            with self._changed:
                item.refused[source.rank] = str(error)
                self._check_hopes()
        else:
            with self._changed:
                is_mine = written == size and item.file.attempt == attempt and not piece.is_here
                if is_mine:
                    item.file.note(piece.number)
                    self._wanted.remove(piece)
                    self._usual_s = time.monotonic() - began
        finally:
            with self._changed:
                piece.takers.pop(source.rank, None)
                self._changed.notify_all()
            if not is_mine:
                self._watch.advance(-written)

    # --- verifying --------------------------------------------------------------------------------

    def _finish_files(self) -> None:
        """Hash each file as its pieces come, and put it at its place."""
        try:
            for item in list(self._left):
                while item.file.digest(partial(self._until_here, item)) != item.file.facts.sha256:
                    self._judge(item)
                item.file.publish()
                with self._changed:
                    self._left.remove(item)
                    self._changed.notify_all()
        except _Over:
            pass
        except BaseException as error:
            self._fail(self._of_disk(error) if isinstance(error, OSError) else error)

    def _until_here(self, item: _Item, number: int) -> None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_over or item.file.has[number])
            if self._is_over:
                raise _Over

    def _judge(self, item: _Item) -> None:
        """What has come is not the file: find out whose is damaged, and have it come again."""
        came_from = [source for source in self._sources if source.rank in item.came_from]
        verdicts = {source.rank: self._verdict(source, item) for source in came_from}
        blamed = {rank: verdict for rank, verdict in verdicts.items() if verdict}
        with self._changed:
            item.refused.update(blamed)
            item.restarts += not blamed
            if item.restarts > RESTARTS:
                raise ForgeError(
                    f"{item.name} arrives whole and is not what was sent when it is read again from"
                    f" {self._into}",
                    "check the disk and the memory of this machine",
                )
            item.came_from.clear()
            item.file.forget()
            self._want(item)
            self._watch.advance(-item.file.facts.size)
            self._check_hopes()
            self._changed.notify_all()

    def _verdict(self, source: Source, item: _Item) -> str:
        """What is wrong with the file that lies at a source; empty if it is what it should be."""
        try:
            with self._connected(source) as stream:
                number = (source.files or {})[item.name][0]
                digest = ask_for_digest(stream, source.key, number)
            return "" if digest == item.file.facts.sha256 else DAMAGED
        except (Gone, Stranger, Lacks, KeyError) as error:
            return in_one_line(error, 200)


class _Over(Exception):
    """The fetch has ended while a file was looked at."""


FIX = "put a whole copy of it on a machine of this run, and start this again: what has come is kept"


def _checked(files: Mapping[str, FileFacts]) -> Mapping[str, FileFacts]:
    """The files, which a manifest of another machine may have named. Raises ForgeError."""
    for name, facts in files.items():
        if not is_path_inside(name) or not facts.is_valid():
            raise ForgeError(
                f"a list of files to fetch names {in_one_line(name)}, which cannot be a file of it",
                "take the same version of this program on all machines (git pull)",
            )
    return files
