"""The folder in which a dataset grows: locked while a run works there, kept when it fails.

output-dir/unfinished/lock            who works here
output-dir/unfinished/rank-1          that rank lives (see ranks.py)
output-dir/unfinished/tokenizer-…     trained on the text
output-dir/unfinished/pieces/         tokens of every piece that is done, and a record of each
output-dir/unfinished/dataset-…/      the finished files, just before they are published
"""

from __future__ import annotations

import contextlib
import errno
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

from p2p_llm_forge.data.dataset import UNFINISHED
from p2p_llm_forge.data.parts import Part
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import Lock, only_writer

LOCK, PIECES = "lock", "pieces"
TRAINED_TOKENIZER = "tokenizer-"  # and a digest of what it was trained on
FULL = (errno.ENOSPC, errno.EDQUOT)


@contextlib.contextmanager
def claimed(output_dir: Path) -> Iterator[Lock]:
    """Hold the unfinished folder of `output_dir`, which stays only if the work inside fails.

    It stays then for the sake of the pieces that are done; nothing done leaves no trace. Raises
    ForgeError when another run holds it. A run that was killed holds nothing.
    """
    folder = output_dir / UNFINISHED
    try:
        with only_writer(folder / LOCK, f"--output-dir {output_dir}") as lock:
            _clear(folder, keep_work=True)
            try:
                yield lock
            except BaseException:
                lock.confirm()  # or what lies here is another run's
                _clear(folder, keep_work=any((folder / PIECES).glob("*.json")))
                raise
            _clear(folder, keep_work=False)
    finally:
        for path in (folder, output_dir):
            with contextlib.suppress(OSError):  # not empty
                path.rmdir()


def new_dataset_folder(folder: Path) -> Path:
    """A folder for a dataset that no other process writes to, whatever becomes of the lock."""
    path = folder / f"dataset-{secrets.token_hex(4)}"
    path.mkdir()
    return path


def remove_leftovers(output_dir: Path) -> None:
    """Remove the folder of a run that was killed just after it had published its dataset."""
    if (output_dir / UNFINISHED).exists():
        with contextlib.suppress(ForgeError), claimed(output_dir):
            pass  # at its end the folder is removed


def _clear(folder: Path, keep_work: bool) -> None:
    """Remove what lies there but the lock; keep_work: and but pieces and trained tokenizers."""
    for path in folder.iterdir():
        is_work = path.name == PIECES or path.name.startswith(TRAINED_TOKENIZER)
        if path.name.startswith(LOCK) or (keep_work and is_work):
            continue
        if path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


# --- a full disk ----------------------------------------------------------------------------------


@contextlib.contextmanager
def disk_full_explained(folder: Path, parts: list[Part]) -> Iterator[None]:
    """Raise a ForgeError that states the room needed when a write inside fails for want of it."""
    try:
        yield
    except Exception as error:
        if not _is_disk_full(error):
            raise
        # Tokens lie on the disk twice, as pieces and as blocks, and take about half of their text.
        in_pieces = sum(path.stat().st_size for path in (folder / PIECES).glob("*.tokens"))
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


def _is_disk_full(error: Exception) -> bool:
    """Whether a write failed for want of room; tokenizers 0.23 raises a plain Exception for it."""
    texts = [f"(os error {code})" for code in FULL]
    return getattr(error, "errno", None) in FULL or (
        type(error) is Exception and any(text in str(error) for text in texts)
    )
