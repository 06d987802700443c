"""The newest model of a run, wherever in its folder it lies."""

from __future__ import annotations

import contextlib
from pathlib import Path

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training.checkpoint import newest_good
from p2p_llm_forge.training.manifest import MANIFEST, damage, steps_saved
from p2p_llm_forge.training.results import MODEL_CONFIGS, TrainResult
from p2p_llm_forge.training.run_record import CHECKPOINT, RunRecord
from p2p_llm_forge.training.snapshot import OPTIMIZER


def newest_model(folder: Path) -> Path:
    """The folder of the newest model in the folder of a run; any other folder is that of a model.

    A run that has not ended, or that has gone on after its end, has its newest model in a
    checkpoint. Raises ForgeError where no model is whole.
    """
    if folder.name.startswith("tmp-checkpoint-"):
        raise _not_whole(folder, "its writing was not finished")
    is_checkpoint = any((folder / name).exists() for name in (MANIFEST, OPTIMIZER))
    if is_checkpoint and CHECKPOINT.fullmatch(folder.name):
        if wrong := damage(folder):
            raise _not_whole(folder, wrong)
        return folder
    steps, result = steps_saved(folder), TrainResult.load(folder)
    has_config = any((folder / name).exists() for name in MODEL_CONFIGS)
    is_published = has_config and (result is None or result.is_published)
    ended_at = result.updates_taken if result else 0
    if is_published and (not steps or steps[0] <= ended_at):
        return folder
    newest, skipped = newest_good(folder)
    if newest is None and is_published:
        return folder
    if newest is None and steps:
        raise ForgeError(
            f"{folder} holds no model that is whole: {'; '.join(skipped)}",
            "train again, into another --output-dir",
        )
    if newest is None:
        raise ForgeError(
            f"{folder} holds no model: neither {MODEL_CONFIGS[0]} nor a checkpoint",
            "give the --output-dir of a run that has saved something, a folder that save_pretrained"
            " has written, or a name of the Hub",
        )
    return newest


def was_trained_to_chat(folder: Path) -> bool | None:
    """Whether the run that made a model learnt from conversations; None where that is not known.

    folder: of a run, or of one of its checkpoints.
    """
    is_checkpoint = CHECKPOINT.fullmatch(folder.name)
    with contextlib.suppress(ForgeError):
        if record := RunRecord.read(folder.parent if is_checkpoint else folder):
            return bool(record.identity.get("conversations"))
    return None


def _not_whole(folder: Path, wrong: str) -> ForgeError:
    """What a checkpoint that was asked for itself comes to, and which model to take instead."""
    try:
        fix = f"take {newest_model(folder.parent)}"
    except ForgeError:
        fix = "train again, until the next checkpoint is saved"
    return ForgeError(f"{folder} is not whole: {wrong}", fix)
