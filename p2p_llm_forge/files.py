"""Files that survive crashes and are shared by machines: durable writes, checksums, one lock."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import json
import os
import platform
import secrets
import shutil
import threading
import time
from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.polling import wait_for
from p2p_llm_forge.shapes import require_shape

HEARTBEAT_S = 1.0
SILENCE_S = 5.0  # a holder elsewhere whose file does not change for so long is gone

# --- writing and reading --------------------------------------------------------------------------


def fsync(path: Path) -> None:
    """Return when the file's (or the folder's) content is on the disk."""
    if os.name == "nt" and path.is_dir():
        return  # Windows opens no folders
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def write_file(path: Path, content: Any, durable: bool = True) -> None:
    """Write a file that holds either its old content or all of the new one, whatever happens.

    content: text (kept as it is, in UTF-8) or anything with a buffer. durable: it is on the disk
    when this returns; else a crash of the machine, but not of the process, may lose it.
    Raises OSError, with the old content in place.
    """
    partial = path.with_name(f"tmp-{path.name}.{os.getpid()}.{threading.get_ident()}")
    try:
        with partial.open("wb") as file:
            file.write(content.encode() if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        partial.replace(path)
    except OSError:
        partial.unlink(missing_ok=True)
        raise
    if durable:
        fsync(path.parent)


def write_json(path: Path, value: Any, durable: bool = True) -> None:
    """Write a value as JSON, for people too, as `write_file` does."""
    text = json.dumps(value, indent=2, sort_keys=True, ensure_ascii=False)
    write_file(path, text + "\n", durable)


def read_json(path: Path, shape: Any = object) -> Any:
    """The value in a JSON file, of this shape. Raises OSError, or ValueError for anything else."""
    value = parse_json(path.read_bytes())
    require_shape(value, shape)
    return value


def parse_json(text: str | bytes) -> Any:
    """The value of a JSON text, which anyone may have written.

    Raises ValueError for what is no JSON, and for what the parser takes and the next step does not:
    NaN and infinite numbers, whole ones of more than 64 bits, half characters (lone surrogates),
    lists in lists without an end.
    """
    try:
        value = json.loads(text, parse_int=_whole_number, parse_constant=_no_number)
        json.dumps(value, ensure_ascii=False, allow_nan=False).encode()
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    return value


def _whole_number(digits: str) -> int:
    if len(digits) > 20:
        raise ValueError(f"the number {digits[:20]}... is too long")
    return int(digits)


def _no_number(word: str) -> float:
    raise ValueError(f"{word} is no number")


def link(source: Path, target: Path) -> None:
    """A second name of a file that nobody writes any more, or a copy. Raises OSError."""
    try:
        os.link(source, target)
    except OSError:  # a file system without links
        shutil.copyfile(source, target)


def files_in(folder: Path) -> Iterator[str]:
    """Every file and link below a folder, as a manifest names it. Links are not followed."""
    for parent, folders, names in os.walk(folder):
        links = [name for name in folders if os.path.islink(os.path.join(parent, name))]
        for name in (*names, *links):
            yield Path(parent, name).relative_to(folder).as_posix()


def erase(folder: Path, names: Iterable[str]) -> None:
    """Remove these files from a folder, and then all folders in it, and itself, that are empty.

    Nothing beyond a link is touched.
    """
    for name in names:
        parents = PurePosixPath(name).parents
        if not any((folder / parent).is_symlink() for parent in parents):
            with contextlib.suppress(FileNotFoundError, IsADirectoryError, PermissionError):
                (folder / name).unlink()
    for parent, _, _ in os.walk(folder, topdown=False):
        with contextlib.suppress(OSError):  # not empty
            os.rmdir(parent)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal, as `sha256sum` prints it."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def fingerprint(value: Any) -> str:
    """The SHA-256 of a JSON value, in hexadecimal: the same for equal values, on any machine."""
    return hashlib.sha256(json.dumps(value, sort_keys=True).encode()).hexdigest()


# --- signs of life --------------------------------------------------------------------------------


class Pulse:
    """Watches a file that another process touches. Clocks of machines are never compared."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._seen: int | None = None
        self._changes = 0
        self._changed_at = -float("inf")

    def is_beating(self, silence_s: float = SILENCE_S) -> bool:
        """Whether the file exists and has changed in the last `silence_s` seconds of watching.

        A file that is looked at for the first time has just changed.
        """
        try:
            with self._path.open("rb") as file:  # a network file system looks again at an open
                touched = os.fstat(file.fileno()).st_mtime_ns
        except OSError:
            self._seen = None
            return False
        if touched != self._seen:
            self._changes += 1
            self._seen, self._changed_at = touched, time.monotonic()
        return time.monotonic() - self._changed_at < silence_s

    def has_changed(self) -> bool:
        """Whether the file has been touched since it was first looked at."""
        return self._changes > 1


@contextlib.contextmanager
def beating(path: Path, on_gone: Callable[[], None] = lambda: None) -> Iterator[None]:
    """Touch the file every second, from a thread, while entered, for a `Pulse` elsewhere.

    on_gone: called once, from the thread, if the file is gone; it is then touched no more.
    """
    stop = threading.Event()

    def beat() -> None:
        while not stop.wait(HEARTBEAT_S):
            try:
                os.utime(path)
            except FileNotFoundError:
                return on_gone()
            except OSError:
                continue  # a network share that stutters

    thread = threading.Thread(target=beat, daemon=True, name=f"heartbeat of {path.name}")
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


# --- the lock -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Holder:
    """Who has the lock, as the name of its file says. table: see `_process_table`."""

    token: str
    pid: int
    started: int  # ticks after the boot
    table: str
    run: str  # digest of the launch that may take over from itself; may be empty
    host: str

    @staticmethod
    def this_process(run_id: str | None) -> Holder:
        """This process, with a token that no other holder has."""
        pid, started = _pid_and_start()
        run, host = _digest(run_id) if run_id else "", platform.node().replace("/", "_")
        return Holder(secrets.token_hex(8), pid, started, _process_table(), run, host)

    @staticmethod
    def of(name: str) -> Holder:
        """What the name of a holder's file says. Raises ValueError for other names."""
        token, pid, started, table, run, host = name.split("~", 5)
        return Holder(token, int(pid), int(started), table, run, host)

    def name(self) -> str:
        """What its file is called."""
        return "~".join(map(str, (vars(self).values())))

    def in_words(self) -> str:
        """Who it is, for messages."""
        return f"process {self.pid} on {self.host}"

    def is_alive(self) -> bool:
        """Whether it is one of the processes in the table of this one, where it must be."""
        try:
            return _start_of(self.pid) == self.started
        except OSError:
            return False


class Lock:
    """A folder with one file in it, whose name says who holds the lock.

    Each step is one rename, which a file system does once, for one caller. To take the lock, a
    folder with one's file inside is renamed to it, which fails unless there is none or an empty
    one. To take it over, the holder's file is renamed to one's own: every holder's is called
    otherwise, so what is renamed is what was judged, or the rename fails.
    """

    def __init__(self, path: Path, what: str, run_id: str | None) -> None:
        self._path, self._what = path, what
        self._own = Holder.this_process(run_id)
        self.mark = path / self._own.name()
        self.is_lost = False  # as far as is known without a look at the disk
        self._made: list[Path] = []  # folders, the innermost first
        self._friends: frozenset[str] = frozenset()  # tokens

    def confirm(self) -> None:
        """Raise ForgeError if another process has taken the lock over; looks at the disk.

        To be called before whatever must not be written by two.
        """
        with contextlib.suppress(FileNotFoundError), self.mark.open("rb"):
            return
        self.is_lost, holder = True, self._holder()
        if holder is None:
            raise ForgeError(f"the lock {self._path} was removed", "start this again")
        raise ForgeError(
            f"{self._what} was taken over by {holder.in_words()}: this process had shown no sign of"
            " life",
            "let the other one finish, or stop it and start this one again",
        )

    @property
    def token(self) -> str:
        """What this process is known by, as a holder."""
        return self._own.token

    def acquire(self, friends: Collection[str] = ()) -> str:
        """Take the lock, or take it over from a process that is gone. Raises ForgeError.

        friends: tokens of holders that it is left to. Returns the token of who has it.
        """
        self._friends = frozenset(friends)

        def look() -> str | None:
            """Who has it, if that is settled. What is renamed is renamed once, for one caller."""
            if friend := self._friend():
                return friend
            self._path.parent.mkdir(parents=True, exist_ok=True)
            is_own = self._take() or self._take_over()
            return self.token if is_own else self._friend()

        try:
            folders = (self._path.parent, *self._path.parent.parents)
            self._made = [folder for folder in folders if not folder.exists()]
            if holder := wait_for(look, SILENCE_S):
                return holder
            raise ForgeError(
                f"{self._what} is locked by nobody, but {self._path} is in the way",
                "make sure that nothing runs there, and remove it",
            )
        except OSError as error:
            fix = "make it writable"
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                fix = "make room there"
            elif error.errno in (errno.ENOTDIR, errno.EEXIST):
                fix = f"remove the file that is in the way of {self._path}"
            raise ForgeError(
                f"{self._what} cannot be written: {error.strerror or error}",
                f"{fix}, or give another folder",
            ) from error

    @contextlib.contextmanager
    def held(self) -> Iterator[None]:
        """Show signs of life while entered, and leave the lock to others at the end."""

        def lose() -> None:
            self.is_lost = True

        try:
            with beating(self.mark, lose):
                yield
        finally:
            self.release()

    def release(self) -> None:
        """Leave the lock to others, unless one of them has it already."""
        with contextlib.suppress(OSError):
            self.mark.unlink()
            self._path.rmdir()
            for folder in self._made:  # nothing was written there: it is as it was before
                folder.rmdir()

    def _take(self) -> bool:
        aside = self._path.with_name(f"tmp-{self._path.name}-{self._own.token}")
        try:
            aside.mkdir(parents=True, exist_ok=True)
            (aside / self.mark.name).touch()
            with contextlib.suppress(OSError):
                self._path.rmdir()  # some file systems do not rename to an empty folder
            aside.rename(self._path)
            return True
        except OSError as error:
            # A network file system may not show yet what is in the way.
            if error.errno != errno.ENOTEMPTY and not self._path.is_dir():
                raise
            return False
        finally:
            shutil.rmtree(aside, ignore_errors=True)

    def _take_over(self) -> bool:
        holder = self._holder()
        if holder is None or holder.token in self._friends:
            return False  # released by now, not seen yet, or settled
        if not self._is_gone(holder):
            raise ForgeError(
                f"{self._what} is in use by {holder.in_words()}",
                f"wait until it ends, or stop it (its lock is {self._path})",
            )
        try:
            (self._path / holder.name()).rename(self.mark)
        except FileNotFoundError:
            return False  # another starter was faster
        return True

    def _friend(self) -> str | None:
        """The token of who has it, if the lock is left to it."""
        holder = self._holder() if self._friends else None
        return holder.token if holder and holder.token in self._friends else None

    def _holder(self) -> Holder | None:
        for mark in self._path.glob("*~*"):
            with contextlib.suppress(ValueError):
                return Holder.of(mark.name)
        return None

    def _is_gone(self, holder: Holder) -> bool:
        if self._own.run and holder.run == self._own.run:
            return True  # an earlier start of the same launch
        if self._own.table and holder.table == self._own.table:
            return not holder.is_alive()
        pulse = Pulse(self._path / holder.name())
        wait_for(lambda: not pulse.is_beating() or pulse.has_changed())
        return not pulse.has_changed()


@contextlib.contextmanager
def only_writer(path: Path, what: str, run_id: str | None = None) -> Iterator[Lock]:
    """Hold the lock at `path` while entered. Raises ForgeError if another process holds it.

    what: the locked thing, for messages. run_id names one launch: when it starts again after the
    loss of a peer, it takes over its own lock at once. A holder in this process's table is gone
    when it has ended; any other one when it has shown no sign of life for SILENCE_S.
    """
    lock = Lock(path, what, run_id)
    lock.acquire()
    with lock.held():
        yield lock


def _process_table() -> str:
    """Names the table of processes that this one sees: that of a boot, and of a container.

    Two containers may have one host name, and a number means another process in each. Empty where
    it cannot be known (beyond Linux): then only signs of life count.
    """
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text()
        return _digest(f"{boot} {os.readlink('/proc/self/ns/pid')} {os.stat('/proc').st_dev}")
    except OSError:
        return ""


def _pid_and_start() -> tuple[int, int]:
    try:
        # As the table names it: inside a container that sees its host's table, getpid differs.
        pid = int(os.readlink("/proc/self"))
        return pid, _start_of(pid)
    except OSError:
        return os.getpid(), 0


def _start_of(pid: int) -> int:
    """When a process was started, in ticks after the boot. Raises OSError if it is gone."""
    words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    if words[0] in "ZX":  # it has ended, and its parent has not asked how
        raise ProcessLookupError(pid)
    return int(words[19])


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()[:16]
