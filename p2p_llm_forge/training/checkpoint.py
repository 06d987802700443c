"""Save, verify, find and prune checkpoints: complete or absent, never in between.

A checkpoint is a folder `checkpoint-<step>` whose `manifest.json` was written last and holds the
size and SHA-256 of every other file. Without a manifest that matches, it does not exist, and a run
falls back to the one before (`newest_good`). What is in the files is the business of snapshot.py.
"""

from __future__ import annotations

import contextlib
import re
import secrets
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import fsync, read_json, sha256_of, write_json

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
# Names of what is written beside the checkpoints, here, in snapshot.py and in files.py.
LEFTOVER = re.compile(
    r"tmp-((checkpoint|pruned)-\d+-[0-9a-f]+|rank-\d+\.safetensors\.[0-9a-f]+"
    r"|.+\.\d+\.\d+|run\.lock-[0-9a-f]+)"
)


def checkpoint_dir(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return output_dir / f"checkpoint-{step}"


def steps_saved(output_dir: Path) -> list[int]:
    """The steps of all folders that look like checkpoints, newest first, verified or not."""
    names = (re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("*"))
    return sorted((int(name[1]) for name in names if name), reverse=True)


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a verified checkpoint."""
    return read_json(checkpoint / TRAINER_STATE)


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
        print(line, file=sys.stderr, flush=True)
    return found


def newest_good(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a line for each newer one that was skipped."""
    skipped: list[str] = []
    for step in steps_saved(output_dir):
        path = checkpoint_dir(output_dir, step)
        wrong = damage(path)
        if wrong is None:
            return path, skipped
        skipped.append(f"skipped {path}: {wrong}")
    return None, skipped


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`; None if every file is what the manifest says.

    Raises ForgeError for a format of a later version.
    """
    try:
        manifest = read_json(path / MANIFEST)
        version, step = int(manifest["format_version"]), int(manifest["step"])
        files = dict(manifest["files"])
    except FileNotFoundError:
        if not path.is_dir():
            return "there is no such folder"
        return f"it has no {MANIFEST}, so its writing was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if version > FORMAT_VERSION:
        raise ForgeError(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}",
            "use the newer program that wrote it",
        )
    if path.name != f"checkpoint-{step}":
        return f"its {MANIFEST} is that of step {step}"
    for name, promised in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != promised["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {promised['size']}"
        if sha256_of(file) != promised["sha256"]:
            return f"{name} has changed since it was written (SHA-256 differs)"
    return None


# --- saving and pruning ---------------------------------------------------------------------------


def commit(
    output_dir: Path,
    step: int,
    write: Callable[[Path], None],
    config: TrainConfig,
    confirm: Callable[[], None] = lambda: None,
) -> Path:
    """Make a checkpoint of what `write` puts into the folder it is given, then prune old ones.

    It becomes visible by one rename after everything in it is on disk. confirm: raises if this
    process may not write any more. Raises ForgeError when the disk does not take it.
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
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        write_json(partial / MANIFEST, manifest)
        confirm()
        if final.exists():
            shutil.rmtree(final)  # a damaged one: a good one would have been resumed from
        partial.rename(final)
        fsync(output_dir)
    except (OSError, SafetensorError) as error:
        raise not_written(f"checkpoint {final} could not be written", error) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)  # nothing is there after the rename
    confirm()
    prune(output_dir, step, config)
    return final


def not_written(found: str, error: Exception) -> ForgeError:
    """What a disk that does not take a file of a checkpoint comes to."""
    reason = getattr(error, "strerror", None) or error
    return ForgeError(
        f"{found}: {reason}; older checkpoints are untouched", "make room on the disk"
    )


def prune(output_dir: Path, newest: int, config: TrainConfig) -> None:
    """Remove the checkpoints that are not to be kept, and what unfinished saves have left.

    newest: the step just saved; later ones are of a branch that `--resume FOLDER` has left.
    """
    remove(output_dir, [step for step in steps_saved(output_dir) if step > newest])
    steps = steps_saved(output_dir)
    best = best_step(output_dir) if config.keep_best else None
    kept = {*steps[: config.keep_checkpoints], best}
    remove(output_dir, [step for step in steps if step not in kept])
    remove_leftovers(output_dir)


def remove(output_dir: Path, steps: list[int]) -> None:
    for step in steps:
        # Renamed first, so that a half-removed checkpoint is not found as a damaged one.
        doomed = output_dir / f"tmp-pruned-{step}-{secrets.token_hex(4)}"
        checkpoint_dir(output_dir, step).rename(doomed)
        shutil.rmtree(doomed, ignore_errors=True)


def remove_leftovers(output_dir: Path) -> None:
    """Remove what writers have left that were killed. None may be at work."""
    for leftover in output_dir.glob("tmp-*"):
        if LEFTOVER.fullmatch(leftover.name) and leftover.is_dir():
            shutil.rmtree(leftover, ignore_errors=True)
        elif LEFTOVER.fullmatch(leftover.name):
            leftover.unlink(missing_ok=True)


def best_step(output_dir: Path) -> int | None:
    """The step of the saved checkpoint with the lowest evaluation loss; None if none has one."""
    losses = []
    for step in steps_saved(output_dir):
        with contextlib.suppress(OSError, ValueError):
            figures = read_state(checkpoint_dir(output_dir, step))["figures"]
            losses.append((figures.get("eval_loss"), step))
    return min((known for known in losses if known[0] is not None), default=(None, None))[1]
