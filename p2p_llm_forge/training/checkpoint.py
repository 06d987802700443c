"""Save and find checkpoints: complete or absent, never in between.

What a checkpoint is, and what is wrong with one, manifest.py knows; which are removed, pruning.py;
what is in the files is the business of snapshot.py.
"""

from __future__ import annotations

import os
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.files import fsync, sha256_of, write_json
from p2p_llm_forge.training.manifest import (
    FILE_SHAPE,
    FORMAT_VERSION,
    MANIFEST,
    TRAINER_STATE,
    checkpoint_dir,
    damage,
    is_of_later_version,
    no_checkpoints,
    own_files,
    read_state,
    steps_saved,
)
from p2p_llm_forge.training.pruning import prune, replace
from p2p_llm_forge.training.run_record import RunRecord, put_on_record

__all__ = ["FORMAT_VERSION", "MANIFEST", "TRAINER_STATE", "checkpoint_dir", "commit", "damage"]
__all__ += [
    "complete",
    "find",
    "in_the_way",
    "is_in_the_way",
    "newest_good",
    "not_written",
    "read_state",
    "steps_saved",
]

LONGEST_LINE = 1000  # about a folder that somebody has named


# --- finding the one to resume from ---------------------------------------------------------------


def find(output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` means; None to start. Damaged ones are skipped by name.

    Raises ForgeError for a damaged one that was asked for by its folder.
    """
    if not resume:
        return None
    if resume != "auto":
        if wrong := damage(Path(resume)):
            raise ForgeError(
                f"--resume {resume}: {wrong}", "--resume auto takes the newest good checkpoint"
            )
        return Path(resume)
    found, skipped = newest_good(output_dir)
    for line in skipped:
        print(in_one_line(line, LONGEST_LINE), file=sys.stderr, flush=True)
    return found


def newest_good(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest good checkpoint, and a line for each newer one, or thing, that was skipped."""
    skipped = [f"skipped {path}: {reason}" for path, reason in no_checkpoints(output_dir)]
    for step in steps_saved(output_dir):
        path = checkpoint_dir(output_dir, step)
        wrong = damage(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"skipped {path}: {wrong}")
    return None, skipped


# --- saving ---------------------------------------------------------------------------------------


def commit(
    output_dir: Path,
    step: int,
    write: Callable[[Path], None],
    config: TrainConfig,
    confirm: Callable[[], None] = lambda: None,
) -> Path:
    """Make a checkpoint as `complete` does, then prune old ones."""
    final = complete(output_dir, step, write, confirm)
    prune(output_dir, step, config)
    return final


def complete(
    output_dir: Path,
    step: int,
    write: Callable[[Path], None],
    confirm: Callable[[], None] = lambda: None,
    promised: dict[str, Any] | None = None,
) -> Path:
    """Make a checkpoint of what `write` puts into the folder it is given.

    It becomes visible by one rename after everything in it is on disk. confirm: raises if this
    process may not write any more. promised: the files by another machine's manifest, where they
    came from one. Raises ForgeError when the disk does not take it or does not keep it, or when
    what is called so is not of this run.
    """
    final = checkpoint_dir(output_dir, step)
    # A name of its own: a process that has lost the folder may still be writing.
    partial = output_dir / f"tmp-checkpoint-{step}-{secrets.token_hex(4)}"
    try:
        partial.mkdir(parents=True)
        write(partial)
        files = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            fsync(path)
            size, name = path.stat().st_size, path.relative_to(partial).as_posix()
            files[name] = {"size": size, "sha256": sha256_of(path)}
        if promised is not None:
            _require_promised(final, files, promised)
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        write_json(partial / MANIFEST, manifest)
        confirm()
        if is_in_the_way(final):
            raise in_the_way(final)
        put_on_record(output_dir, [final.name])
        if os.path.lexists(final):
            replace(final, partial, step)
        else:
            partial.rename(final)
        fsync(output_dir)
    except (OSError, SafetensorError) as error:
        raise not_written(f"checkpoint {final} could not be written", error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there after the rename
    confirm()
    return final


def is_in_the_way(final: Path) -> bool:
    """Whether something that this version has not written is called like this checkpoint."""
    if final.is_symlink() or (final.exists() and not final.is_dir()):
        return True
    if not final.exists() or own_files(final) is not None:
        return False
    record = RunRecord.read(final.parent)
    return record is None or final.name not in record.wrote or is_of_later_version(final)


def in_the_way(final: Path) -> ForgeError:
    """What a checkpoint that has no place comes to."""
    return ForgeError(
        f"{final} is in the way of a checkpoint, and this run has not written it; older"
        " checkpoints are untouched",
        "move it out of --output-dir",
    )


def _require_promised(final: Path, files: dict[str, Any], promised: dict[str, Any]) -> None:
    """Raise ForgeError if files are not what came: nobody shall take them for a checkpoint."""
    for name in sorted({*files, *promised}):
        here, sent = files.get(name, {}), promised.get(name, {})
        if any(here.get(fact) != sent.get(fact) for fact in FILE_SHAPE):
            raise ForgeError(
                f"{in_one_line(name)} of {final} is not what was sent when it is read again; older"
                " checkpoints are untouched",
                "check the disk and the memory of this machine, then start this again",
            )


def not_written(found: str, error: Exception) -> ForgeError:
    """What a disk that does not take a file of a checkpoint comes to."""
    reason = getattr(error, "strerror", None) or error
    return ForgeError(
        f"{found}: {reason}; older checkpoints are untouched", "make room on the disk"
    )
