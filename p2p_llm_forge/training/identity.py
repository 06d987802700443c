"""Which run a folder belongs to: run.json holds what makes a run this run and no other."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import read_json, write_json
from p2p_llm_forge.training.checkpoint import (
    FORMAT_VERSION,
    remove,
    remove_leftovers,
    steps_saved,
)

RUN = "run.json"

# What a finished run puts beside its checkpoints.
PUBLISHED = (
    *("all_results.json", "README.md", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
)

# What --resume-changed may change. Another model or tokenizer would give the saved numbers another
# meaning.
MAY_CHANGE = ("dataset", "seed", "batch_size")


def recorded_identity(output_dir: Path) -> dict[str, Any] | None:
    """What `Job.identity` was for the run in the folder; None without one. Raises ForgeError."""
    try:
        return read_json(output_dir / RUN)["identity"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ForgeError(
            f"{output_dir / RUN} cannot be read ({error})",
            "start the run from scratch with --overwrite",
        ) from error


def refuse_another_run(
    output_dir: Path, identity: dict[str, Any], resume: bool, resume_changed: bool
) -> None:
    """Raise ForgeError if `output_dir` holds another run, or this one without `resume`."""
    recorded = recorded_identity(output_dir)
    if recorded is None:
        if present := next((name for name in PUBLISHED if (output_dir / name).exists()), None):
            raise ForgeError(
                f"{output_dir} holds {present}, but no run of this program",
                "choose another --output-dir, or replace what is there with --overwrite",
            )
        return
    changed = sorted(k for k in {*recorded, *identity} if recorded.get(k) != identity.get(k))
    fixed = [key for key in changed if key not in MAY_CHANGE]
    if changed and (fixed or not (resume and resume_changed)):
        fix = "choose another --output-dir, or throw that run away with --overwrite"
        if not fixed:
            fix += ", or continue with these changes by --resume auto --resume-changed"
        differences = "".join(
            f"\n    {key}: the run has {recorded.get(key)}, asked was {identity.get(key)}"
            for key in (fixed if resume_changed else changed)
        )
        raise ForgeError(f"{output_dir} holds another run:{differences}", fix)
    if not resume:
        raise ForgeError(
            f"{output_dir} holds this run already",
            "continue it with --resume auto, or start it from scratch with --overwrite",
        )


def claim(output_dir: Path, identity: dict[str, Any], overwrite: bool = False) -> None:
    """Record in run.json that the folder is this run's; `overwrite` first removes the one in it.

    To be called when all else is known to work. Raises ForgeError for a folder not writable.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        remove_leftovers(output_dir)
        if overwrite:
            remove(output_dir, steps_saved(output_dir))
            for name in (RUN, "metrics.jsonl", *PUBLISHED):
                (output_dir / name).unlink(missing_ok=True)
            shutil.rmtree(output_dir / "runs", ignore_errors=True)
        write_json(output_dir / RUN, {"format_version": FORMAT_VERSION, "identity": identity})
    except OSError as error:
        raise ForgeError(
            f"--output-dir {output_dir} cannot be written: {error.strerror or error}",
            "give another folder, or make this one writable",
        ) from error


def settings_changed(before: dict[str, Any], now: dict[str, Any]) -> list[str]:
    """A line for each setting of what is computed that is another one than at the checkpoint."""
    computed = (
        *("learning_rate", "lr_scheduler", "warmup_steps", "epochs", "max_steps", "seed"),
        *("batch_size", "weight_decay", "max_grad_norm", "mixed_precision"),
        *("sync", "compress", "sync_every", "outer_lr", "outer_momentum"),
        *("outer_warmup_rounds", "fragments", "overlap_steps", "ddp_warmup_steps"),
    )
    changed = [key for key in computed if before.get(key) != now[key]]
    return [f"{key}: {before.get(key)} -> {now[key]}" for key in changed]
