"""What is removed from a run's folder: files that a manifest or run.json of ours names, no others.

Removing a checkpoint leaves what somebody else has put into its folder where it is.
"""

from __future__ import annotations

import contextlib
import math
import os
import re
import secrets
import shutil
from collections.abc import Iterable
from pathlib import Path

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.files import erase, files_in, fsync
from p2p_llm_forge.training.manifest import (
    MANIFEST,
    checkpoint_dir,
    is_whole,
    own_files,
    read_state,
    steps_saved,
)
from p2p_llm_forge.training.publishing import ONE_UPLOAD
from p2p_llm_forge.training.run_record import CHECKPOINT, RUN, RUNS, RunRecord

# What is written beside the checkpoints before it is renamed, here, in checkpoint.py, snapshot.py
# and files.py; and the digits of chance in their names.
LEFTOVER = re.compile(
    r"tmp-((checkpoint|copied|pruned|replaced|uploaded|merged|fetched)-\d+-[0-9a-f]{8}|rank-\d{5}\.safetensors\.[0-9a-f]{8}"
    r"|(run|\.check)\.lock-[0-9a-f]{16})",
    re.ASCII,
)
IN_USE: set[Path] = set()  # of what is called so: what threads of this process still need
PARTIAL = re.compile(r"tmp-(?P<name>.+)\.\d+\.\d+", re.ASCII)


def is_leftover(name: str, wrote: Iterable[str] = ()) -> bool:
    """Whether writers of ours, of files that are called as in `wrote`, may have left this."""
    partial = PARTIAL.fullmatch(name)
    return bool(LEFTOVER.fullmatch(name)) or bool(partial and partial["name"] in {RUN, *wrote})


# --- one checkpoint -------------------------------------------------------------------------------


def remove(output_dir: Path, steps: Iterable[int]) -> None:
    """Remove checkpoints of ours; what their manifests do not name stays."""
    for step in steps:
        folder = checkpoint_dir(output_dir, step)
        names = own_files(folder)
        if names is None:
            continue
        if set(files_in(folder)) <= {*names, MANIFEST}:
            # Renamed first, so that a half-removed checkpoint is not found as a damaged one.
            folder = folder.rename(_aside(output_dir, "pruned", step))
        erase(folder, [MANIFEST, *sorted(names)])


def replace(final: Path, partial: Path, step: int) -> None:
    """Put a new checkpoint in the place of an older one of ours; what others have put there stays.

    Raises OSError.
    """
    replaced = set(own_files(final) or ())
    aside = final.rename(_aside(final.parent, "replaced", step))
    partial.rename(final)
    # Without a manifest, what is called like a file of the new one was ours.
    replaced |= set(files_in(final)) - {MANIFEST}
    for name in [name for name in files_in(aside) if name not in {*replaced, MANIFEST}]:
        (final / name).parent.mkdir(parents=True, exist_ok=True)
        (aside / name).rename(final / name)
    erase(aside, [*sorted(replaced), MANIFEST])  # what names the others is removed last


def _aside(output_dir: Path, why: str, step: int) -> Path:
    return output_dir / f"tmp-{why}-{step}-{secrets.token_hex(4)}"


# --- a run's folder -------------------------------------------------------------------------------


def prune(output_dir: Path, newest: int, config: TrainConfig) -> None:
    """Remove the checkpoints that are not to be kept, and what unfinished saves have left."""
    prune_checkpoints(output_dir, newest, config)
    remove_leftovers(output_dir)


def prune_checkpoints(output_dir: Path, newest: int, config: TrainConfig) -> None:
    """Remove the checkpoints that are not to be kept (see `superfluous`)."""
    remove(output_dir, superfluous(output_dir, newest, config))


def superfluous(output_dir: Path, newest: int, config: TrainConfig) -> list[int]:
    """The steps of the checkpoints that are not to be kept.

    newest: the step just saved; later ones are of a branch that `--resume FOLDER` has left. Those
    that are not whole are not counted as kept.
    """
    own = [s for s in steps_saved(output_dir) if own_files(checkpoint_dir(output_dir, s))]
    whole = [s for s in own if s <= newest and is_whole(checkpoint_dir(output_dir, s))]
    best = best_steps(output_dir, whole) if config.keep_best else []
    kept = {*whole[: config.keep_checkpoints], *best}
    return [step for step in own if step not in kept]


def best_steps(output_dir: Path, steps: list[int]) -> list[int]:
    """The step of the checkpoint with the lowest evaluation loss; none if none of them has one.

    Losses of other blocks are no lower or higher: where --eval-blocks has changed, one of each.
    """
    found: dict[int | None, list[tuple[float, int]]] = {}
    for step in steps:
        with contextlib.suppress(OSError, ValueError):
            figures = read_state(checkpoint_dir(output_dir, step))["figures"]
            loss = figures.get("eval_loss")
            if loss is not None and math.isfinite(loss):
                found.setdefault(figures.get("eval_blocks"), []).append((loss, step))
    return [min(losses)[1] for losses in found.values()]


def remove_leftovers(output_dir: Path) -> None:
    """Remove what writers have left that were killed. None may be at work but an upload of ours,
    and what this process has named in `IN_USE`."""
    record = RunRecord.read(output_dir)
    wrote = record.wrote if record else ()
    for leftover in output_dir.glob("tmp-*"):
        is_uploaded = leftover.name.startswith("tmp-uploaded-") and ONE_UPLOAD.locked()
        if is_uploaded or leftover in IN_USE or not is_leftover(leftover.name, wrote):
            continue
        if leftover.is_symlink() or not leftover.is_dir():
            leftover.unlink(missing_ok=True)
        elif leftover.name.startswith("tmp-replaced-"):  # somebody's files may be left in it
            erase(leftover, [*(own_files(leftover, leftover.name.split("-")[2]) or ()), MANIFEST])
        else:
            shutil.rmtree(leftover, ignore_errors=True)


def remove_run(output_dir: Path, record: RunRecord) -> None:
    """Remove what run.json and the manifests of checkpoints name. Raises OSError."""
    remove(output_dir, steps_saved(output_dir))
    for name in record.wrote:
        path = output_dir / name
        is_named = "/" not in name and not CHECKPOINT.fullmatch(name)
        # os.path, since Path.is_file fails for names that are too long for the file system.
        if is_named and os.path.isfile(path) and not path.is_symlink():
            path.unlink()
    if events := [name[len(RUNS) + 1 :] for name in record.wrote if "/" in name]:
        erase(output_dir / RUNS, events)
    fsync(output_dir)
