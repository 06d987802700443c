"""Which run a folder belongs to: run.json holds what makes a run this run and no other."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from p2p_llm_forge.data.dataset import looks_like_prepared
from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.peers.preflight import CHECKED
from p2p_llm_forge.training.manifest import checkpoint_dir, own_files, steps_saved
from p2p_llm_forge.training.pruning import is_leftover, remove_leftovers, remove_run
from p2p_llm_forge.training.run_record import (
    LOSS,
    METRICS,
    PEERS,
    RUNS,
    SAMPLES,
    Resumed,
    RunRecord,
)

LOCK = "run.lock"
PREPARED = "prepared"  # the dataset that is made of a text, by the rules of data/prepare.py
# What lies in new folders and is of no run.
NOBODYS = (".gitkeep", ".gitignore", ".DS_Store", "lost+found")

# What --resume-changed may change. Another model or tokenizer would give the saved numbers another
# meaning.
MAY_CHANGE = ("dataset", "conversations", "seed", "batch_size")

# What older versions wrote down where nothing was asked for.
USUAL = {"epochs": 1.0, "lr_scheduler": "cosine", "warmup_steps": 0}

MOST_SHOWN, LONGEST_VALUE = 10, 300  # differences that a message lists, and their characters


def recorded_identity(output_dir: Path) -> dict[str, Any] | None:
    """What `Job.identity` was for the run in the folder; None without one. Raises ForgeError."""
    record = RunRecord.read(output_dir)
    return of_today(record.identity) if record else None


def of_today(settings: dict[str, Any]) -> dict[str, Any]:
    """The settings of a run in today's words.

    Versions without `--depth` built a GPT-2 where no family was asked for.
    """
    if "depth" in settings:
        return settings
    family = settings.get("model_type") or (None if settings.get("model_name") else "gpt2")
    return {**settings, "model_type": family, "depth": None}


def refuse_files_of_others(output_dir: Path) -> None:
    """Raise ForgeError if `output_dir` holds anything, but no run: it is not ours to write into."""
    if RunRecord.read(output_dir) is not None or not output_dir.is_dir():
        return
    try:
        others = sorted(path.name for path in output_dir.iterdir() if not _is_ours(path))
    except OSError as error:
        raise ForgeError(
            f"--output-dir {output_dir} cannot be read: {error.strerror or error}",
            "give another folder, or make this one readable",
        ) from error
    if others:
        more = f" and {len(others) - 3} more" if len(others) > 3 else ""
        shown = ", ".join(ascii(name)[1:-1] for name in others[:3])
        raise ForgeError(
            f"{output_dir} holds {shown}{more}, but no run of this program, so nothing is written"
            " there",
            "choose another --output-dir, such as a new folder in it",
        )


def _is_ours(path: Path) -> bool:
    """Whether something in a folder without a run comes from this program, or from nobody."""
    if path.name in (LOCK, CHECKED, *NOBODYS) or is_leftover(path.name):
        return True
    if path.name == PREPARED and path.is_dir():
        return looks_like_prepared(path) or not any(path.iterdir())
    return own_files(path) is not None


def refuse_another_run(
    output_dir: Path, identity: dict[str, Any], resume: bool, resume_changed: bool
) -> None:
    """Raise ForgeError if `output_dir` holds another run, or this one without `resume`."""
    recorded = recorded_identity(output_dir)
    if recorded is None:
        refuse_files_of_others(output_dir)
        saved = [s for s in steps_saved(output_dir) if own_files(checkpoint_dir(output_dir, s))]
        if saved and not resume:
            raise ForgeError(
                f"{checkpoint_dir(output_dir, saved[0])} is there already",
                "continue from it with --resume auto, or start from scratch with --overwrite",
            )
        return
    changed = sorted(k for k in {*recorded, *identity} if recorded.get(k) != identity.get(k))
    fixed = [key for key in changed if key not in MAY_CHANGE]
    if changed and (fixed or not (resume and resume_changed)):
        fix = "choose another --output-dir, or throw that run away with --overwrite"
        if not fixed:
            fix += ", or continue with these changes by --resume auto --resume-changed"
        shown = fixed if resume_changed else changed
        differences = "".join(_difference(key, recorded, identity) for key in shown[:MOST_SHOWN])
        if len(shown) > MOST_SHOWN:
            differences += f"\n    and {len(shown) - MOST_SHOWN} more"
        raise ForgeError(f"{output_dir} holds another run:{differences}", fix)
    if not resume:
        raise ForgeError(
            f"{output_dir} holds this run already",
            "continue it with --resume auto, or start it from scratch with --overwrite; from a"
            f" finished one, go on by --model-name {output_dir} with another --output-dir",
        )


def _difference(key: str, recorded: dict[str, Any], identity: dict[str, Any]) -> str:
    """A line of a message. A run.json may hold anything, of any length."""
    before, now = (in_one_line(one.get(key), LONGEST_VALUE) for one in (recorded, identity))
    return f"\n    {in_one_line(key)}: the run has {before}, asked was {now}"


def refuse_file_of_trackers(output_dir: Path, report_to: str) -> None:
    """Raise ForgeError if TensorBoard is to write into runs/, and something else is called so."""
    runs = output_dir / RUNS
    if "tensorboard" in report_to and os.path.lexists(runs) and not runs.is_dir():
        raise ForgeError(
            f"{runs} is no folder, so TensorBoard cannot write there",
            "move it out of --output-dir, or add --report-to none",
        )


def claim(
    output_dir: Path,
    identity: dict[str, Any],
    overwrite: bool = False,
    started: str | None = None,
    resumed: Resumed = (),
) -> None:
    """Record in run.json that the folder is this run's; `overwrite` first removes the one in it.

    started, resumed: which start of the run it is (see starts.py). To be called when all else is
    known to work. Raises ForgeError for a folder not writable.
    """
    metrics = output_dir / METRICS
    if os.path.lexists(metrics) and not metrics.is_file():
        raise ForgeError(
            f"{metrics} is no file of this run, so its figures cannot be put in its place",
            "move it out of --output-dir",
        )
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        record = RunRecord.read(output_dir)
        if overwrite:
            remove_run(output_dir, record or RunRecord({}))
        kept = {n for n in (record.wrote if record else ()) if os.path.lexists(output_dir / n)}
        # What is there and was not written by a run of ours is somebody else's, also from now on.
        names = (METRICS, SAMPLES, LOSS, PEERS)
        free = {name for name in names if not os.path.lexists(output_dir / name)}
        RunRecord(identity, frozenset(kept | free), started, resumed).write(output_dir)
    except OSError as error:
        raise ForgeError(
            f"--output-dir {output_dir} cannot be written: {error.strerror or error}",
            "give another folder, or make this one writable",
        ) from error


def settings_changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting of what is computed that is another one than at the checkpoint."""
    computed = (
        *("learning_rate", "lr_scheduler", "warmup_steps", "epochs", "max_steps", "seed"),
        *("batch_size", "weight_decay", "max_grad_norm", "mixed_precision", "compile"),
        *("eval_blocks", "sync", "compress", "sync_every", "outer_lr", "outer_momentum"),
        *("outer_warmup_rounds", "fragments", "overlap_steps", "ddp_warmup_steps"),
    )
    pairs = [(key, _in_force(before, key), _in_force(now, key)) for key in computed]
    return [f"{key}: {old} -> {new}" for key, old, new in pairs if old != new]


def _in_force(settings: dict[str, Any], key: str) -> Any:
    """A setting in today's words, or what it comes to where it was left open."""
    value = settings.get(key)
    if key == "outer_momentum" and settings.get("sync") != "diloco":
        return None  # of no effect
    if isinstance(value, bool):
        return "on" if value else "off"
    return USUAL.get(key) if value is None else value
