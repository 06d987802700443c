"""What a checkpoint is: a folder whose manifest, written last, every other file matches.

A checkpoint is a folder `checkpoint-<step>` whose `manifest.json` holds the size and SHA-256 of
every other file. What has no such manifest is no checkpoint of ours, whatever it is called: it is
skipped with a reason, and never removed. Links are not followed.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from p2p_llm_forge.files import read_json, sha256_of
from p2p_llm_forge.model.muon import DTYPES
from p2p_llm_forge.model.stored import is_data
from p2p_llm_forge.shapes import is_count, is_flag, is_number, is_path_inside, require_shape
from p2p_llm_forge.sync.base import require_facts
from p2p_llm_forge.training.finite import bad_tensor_in
from p2p_llm_forge.training.pace import saved_pace
from p2p_llm_forge.training.run_record import CHECKPOINT

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
TRAINER_STATE = "trainer_state.json"
ADAPTERS = "adapter_model"  # how the file of weights begins where only adapters are saved
FIGURES = (
    *("eval_loss", "perplexity", "bits_per_byte", "token_accuracy"),
    *("eval_blocks", "eval_split_blocks", "eval_loss_stderr", "bits_per_byte_stderr"),
)


def is_digest(value: Any) -> bool:
    """Whether a JSON value is a SHA-256 in hexadecimal."""
    return isinstance(value, str) and len(value) == 64 and not set(value) - set("0123456789abcdef")


FILE_SHAPE = {"size": is_count, "sha256": is_digest}
MANIFEST_SHAPE = {"format_version": is_count, "step": is_count, "files": {str: FILE_SHAPE}}


def is_dtype(value: Any) -> bool:
    """Whether a JSON value names what Muon orthogonalises in."""
    return value in [*DTYPES]


STATE_SHAPE = {
    **{"step": is_count, "blocks_read": is_count, "config": dict, "figures": dict},
    **{"tokens": (None, is_count), "train_loss": (None, is_number)},
    "since_log": (
        None,
        {
            "nats": [is_number],
            "updates": is_count,
            "tokens": (None, is_count),
            "is_spoiled": is_flag,
        },
    ),
    "optimizer": (None, {"orthogonalised_in": is_dtype}),
    **{"scaler": (None, [dict]), "discarded_updates": (None, is_count)},
}


def checkpoint_dir(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return output_dir / f"checkpoint-{step}"


def steps_saved(output_dir: Path) -> list[int]:
    """The steps of all folders that are called like checkpoints, newest first, verified or not."""
    try:
        folders = [path for path in output_dir.glob("checkpoint-*") if path.is_dir()]
    except FileNotFoundError:  # it was empty, and another rank has just removed it
        return []
    names = (CHECKPOINT.fullmatch(path.name) for path in folders if not path.is_symlink())
    return sorted((int(name[1]) for name in names if name), reverse=True)


def no_checkpoints(output_dir: Path) -> Iterator[tuple[Path, str]]:
    """What is called checkpoint-..., but is none for a reason that its name or kind shows."""
    for path in sorted(output_dir.glob("checkpoint-*")):
        if path.is_symlink():
            yield path, "it is a link, which is not followed; --resume takes the folder itself"
        elif not path.is_dir():
            yield path, "it is no folder"
        elif not CHECKPOINT.fullmatch(path.name):
            yield path, "no checkpoint of this program is called so"


def read_manifest(folder: Path, step_named: str | None = None) -> dict[str, Any]:
    """The manifest of a checkpoint of ours. Raises OSError, or ValueError for any other one.

    step_named: which step it must be of; by default the one in the name of its folder.
    """
    manifest = read_json(folder / MANIFEST, MANIFEST_SHAPE)
    version, step = manifest["format_version"], manifest["step"]
    if version != FORMAT_VERSION:
        raise ValueError(f"it has format version {version}, this program reads {FORMAT_VERSION}")
    if (step_named or folder.name.removeprefix("checkpoint-")) != str(step):
        raise ValueError(f"it is that of step {step}")
    if bad := [name for name in manifest["files"] if not is_path_inside(name) or name == MANIFEST]:
        raise ValueError(f"it names {ascii(bad[0])[:60]}, which is no file in a checkpoint")
    if TRAINER_STATE not in manifest["files"]:
        raise ValueError(f"it does not name {TRAINER_STATE}")
    return manifest


def require_files(names: Iterable[str], with_code: bool) -> None:
    """Raise ValueError for what no checkpoint holds that comes from another machine: a path out of
    it, a manifest, a pickle; Python's files, unless with_code."""
    for name in names:
        if name == MANIFEST or not is_data(name, with_code):
            raise ValueError(f"{ascii(name)[:60]} is no file in a checkpoint that may travel")


def is_of_later_version(folder: Path) -> bool:
    """Whether a later version of this program may have written a checkpoint."""
    try:
        manifest = read_json(folder / MANIFEST, {"format_version": is_count})
    except (OSError, ValueError):
        return False
    return bool(manifest["format_version"] > FORMAT_VERSION)


def own_files(folder: Path, step_named: str | None = None) -> frozenset[str] | None:
    """The files that the manifest of a checkpoint of ours names (see `read_manifest`), or None."""
    if folder.is_symlink():
        return None
    try:
        return frozenset(read_manifest(folder, step_named)["files"])
    except (OSError, ValueError):
        return None


def is_whole(folder: Path) -> bool:
    """Whether every file of a checkpoint is there in its size: quickly, without reading them."""
    try:
        files = read_manifest(folder)["files"].items()
        return all((folder / name).stat().st_size == facts["size"] for name, facts in files)
    except (OSError, ValueError):
        return False


def read_state(checkpoint: Path) -> dict[str, Any]:
    """The trainer's state in a checkpoint. Raises OSError, or ValueError for what is none."""
    state = read_json(checkpoint / TRAINER_STATE, STATE_SHAPE)
    require_facts(state.get("sync"))
    saved_pace(state)
    require_shape(state["figures"], {str: (None, int, float)})
    if unknown := set(state["figures"]) - set(FIGURES):
        raise ValueError(f"it holds a figure {ascii(min(unknown))[:60]}")
    return state


def damage(path: Path) -> str | None:
    """Why one cannot resume from the checkpoint at `path`; None where one can.

    Every file must be what the manifest says, and what it holds must be finite.
    """
    try:
        files = read_manifest(path)["files"]
    except FileNotFoundError:
        if not path.is_dir():
            return "there is no such folder"
        return f"it has no {MANIFEST}, so its writing was not finished, or it is another program's"
    except (OSError, ValueError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    wrong = next(differences(path, files), None)
    return wrong[1] if wrong else unusable(path, files)


def differences(path: Path, files: dict[str, Any]) -> Iterator[tuple[str, str]]:
    """The files of a checkpoint that are not what its manifest promises, each with how they differ.

    files: as in the manifest. Reads them all.
    """
    for name, promised in files.items():
        try:
            if wrong := _difference(path / name, promised):
                yield name, f"{ascii(name)[1:-1]} {wrong}"
        except (OSError, ValueError) as error:
            yield name, f"{ascii(name)[1:-1]} cannot be read ({error})"


def _difference(file: Path, promised: dict[str, Any]) -> str | None:
    if not file.is_file():
        return "is missing"
    if file.stat().st_size != promised["size"]:
        return f"has {file.stat().st_size} bytes instead of {promised['size']}"
    if sha256_of(file) != promised["sha256"]:
        return "has changed since it was written (SHA-256 differs)"
    return None


def unusable(path: Path, files: Iterable[str]) -> str | None:
    """Why what the files of a checkpoint hold is of no use, as they were written."""
    try:
        if (step := read_state(path)["step"]) != int(path.name.rpartition("-")[2]):
            return f"its {TRAINER_STATE} is that of step {step}"
    except (OSError, ValueError) as error:
        return f"its {TRAINER_STATE} cannot be read ({error})"
    tensors = [name for name in sorted(files) if name.endswith(".safetensors")]
    if not any(os.sep not in name and name.startswith(("model", ADAPTERS)) for name in tensors):
        return "it holds no weights"
    for name in tensors:
        try:
            if wrong := bad_tensor_in(path / name):
                return f"{name} holds {wrong}"
        except (OSError, ValueError) as error:
            return f"{name} cannot be read ({error})"
    return None
