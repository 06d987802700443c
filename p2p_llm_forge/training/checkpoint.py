"""Save, verify, find, load and prune checkpoints: complete or absent, never in between.

A checkpoint is a folder `checkpoint-<step>` whose `manifest.json` was written last and holds the
size and SHA-256 of every other file. Without a manifest that matches, it does not exist. Tensors
are stored as safetensors, everything else as JSON; nothing is pickled.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import re
import shutil
import sys
import threading
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from p2p_llm_forge.errors import ForgeError

FORMAT_VERSION = 1
MANIFEST = "manifest.json"
OPTIMIZER = "optimizer.safetensors"
TRAINER_STATE = "trainer_state.json"
SYNC = "sync.safetensors"  # what --sync diloco keeps beside the weights, the same for all ranks
RUN = "run.json"
OF_OPTIMIZER = "optimizer."  # keys of a rank's own optimizer state
SEEN_WITHIN_S = 60.0  # a network file system may show a new file that late

# What a finished run puts beside its checkpoints.
PUBLISHED = (
    *("all_results.json", "README.md", "config.json", "generation_config.json"),
    *("model.safetensors", "tokenizer.json", "tokenizer_config.json"),
)

# Of a run's identity: what --resume-changed may change. Another model or tokenizer would give the
# saved numbers another meaning.
MAY_CHANGE = ("dataset", "seed", "batch_size")


def checkpoint_dir(output_dir: Path, step: int) -> Path:
    """Where the checkpoint after `step` updates lies."""
    return output_dir / f"checkpoint-{step}"


def steps_saved(output_dir: Path) -> list[int]:
    """The steps of all folders that look like checkpoints, newest first, verified or not."""
    names = (
        re.fullmatch(r"checkpoint-(\d+)", path.name) for path in output_dir.glob("checkpoint-*")
    )
    return sorted((int(name[1]) for name in names if name), reverse=True)


def commit(
    output_dir: Path, step: int, write: Callable[[Path], None], keep: int, keep_best: bool = False
) -> Path:
    """Make a checkpoint of what `write` puts into the folder it is given, then prune old ones.

    The folder becomes visible by one rename after everything in it is on disk; the `keep` newest
    are kept (and the best), and none is removed before the new one is durable. Raises ForgeError
    when the disk does not take it, with the older checkpoints untouched.
    """
    final, partial = checkpoint_dir(output_dir, step), output_dir / f"tmp-checkpoint-{step}"
    try:
        shutil.rmtree(partial, ignore_errors=True)
        partial.mkdir(parents=True)
        write(partial)
        files = {}
        for path in sorted(p for p in partial.rglob("*") if p.is_file()):
            _fsync(path)
            files[path.relative_to(partial).as_posix()] = {
                "size": path.stat().st_size,
                "sha256": sha256_of(path),
            }
        manifest = {"format_version": FORMAT_VERSION, "step": step, "files": files}
        write_json(partial / MANIFEST, manifest)
        _fsync(partial)
        if final.exists():
            shutil.rmtree(final)  # a damaged one: a good one would have been resumed from
        partial.rename(final)
        _fsync(output_dir)
    except (OSError, SafetensorError) as error:
        shutil.rmtree(partial, ignore_errors=True)
        reason = getattr(error, "strerror", None) or str(error)
        raise ForgeError(
            f"checkpoint {final} could not be written: {reason}. Older checkpoints are untouched: "
            "make room on the disk"
        ) from error
    prune(output_dir, step, keep, keep_best)
    return final


def prune(output_dir: Path, newest: int, keep: int, keep_best: bool = False) -> None:
    """Remove all but the `keep` newest checkpoints (and the best), and unfinished saves.

    newest: the step just saved; later ones are of a branch that `--resume FOLDER` has left.
    """
    _remove(output_dir, [step for step in steps_saved(output_dir) if step > newest])
    steps = steps_saved(output_dir)
    kept = set(steps[:keep])
    if keep_best and (best := best_step(output_dir)) is not None:
        kept.add(best)
    _remove(output_dir, [step for step in steps if step not in kept])
    for leftover in output_dir.glob("tmp-*"):
        if re.fullmatch(r"tmp-(checkpoint|pruned)-\d+", leftover.name):
            shutil.rmtree(leftover, ignore_errors=True)
        elif re.fullmatch(r"tmp-\d+-rank-\d+\.safetensors", leftover.name):
            leftover.unlink(missing_ok=True)


def _remove(output_dir: Path, steps: list[int]) -> None:
    for step in steps:
        # Renamed first, so that a half-removed checkpoint is not met as a damaged one.
        doomed = checkpoint_dir(output_dir, step).rename(output_dir / f"tmp-pruned-{step}")
        shutil.rmtree(doomed, ignore_errors=True)


def best_step(output_dir: Path) -> int | None:
    """The step of the saved checkpoint with the lowest evaluation loss; None if none has one."""
    losses = {}
    for step in steps_saved(output_dir):
        with contextlib.suppress(OSError, ValueError):
            figures = read_state(checkpoint_dir(output_dir, step))["figures"]
            losses[step] = figures.get("eval_loss")
    known = {step: loss for step, loss in losses.items() if loss is not None}
    return min(known, key=lambda step: (known[step], step)) if known else None


class Writer:
    """Runs one save at a time, in a thread of its own unless told otherwise."""

    def __init__(self, in_background: bool) -> None:
        self._in_background = in_background
        self._thread: threading.Thread | None = None
        self._failure: ForgeError | BaseException | None = None

    def start(self, save: Callable[[], object]) -> None:
        """Run `save` once the one before it is done; its failure is told by `failure`."""
        self.wait()
        self._thread = threading.Thread(target=self._run, args=(save,), name="checkpoint writer")
        self._thread.start()
        if not self._in_background:
            self.wait()

    def wait(self) -> None:
        """Return when nothing is being written."""
        if self._thread:
            self._thread.join()
            self._thread = None

    def failure(self) -> str | None:
        """What went wrong in the saves finished since the last call, for the user; usually None.

        Anything but a full or broken disk is a mistake of ours and is raised.
        """
        failed, self._failure = self._failure, None
        if failed is not None and not isinstance(failed, ForgeError):
            raise failed
        return str(failed) if failed else None

    def _run(self, save: Callable[[], object]) -> None:
        try:
            save()
        except BaseException as error:  # handed to the thread that asks, which raises it
            self._failure = error


@dataclass(frozen=True)
class Snapshot:
    """A copy in memory of everything that a checkpoint holds."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    state: dict[str, Any]
    shared: dict[str, torch.Tensor]  # of the strategy by which ranks agree
    own: dict[str, torch.Tensor]  # of the main process

    @staticmethod
    def take(
        lm: Any,
        optimizer: torch.optim.Optimizer,
        state: dict[str, Any],
        shared: dict[str, torch.Tensor],
        own: dict[str, torch.Tensor],
    ) -> Snapshot:
        """Copy now; the originals may change as soon as this returns. shared, own: not copied."""
        copies: dict[int, torch.Tensor] = {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # Tied weights stay one tensor, which save_pretrained writes once.
            return copies.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", copy=True))

        model = {name: copy(tensor) for name, tensor in lm.state_dict().items()}
        return Snapshot(model, optimizer_tensors(lm, optimizer), state, shared, own)

    def write(self, folder: Path, lm: Any, tokenizer_dir: Path) -> None:
        """Write all files of a checkpoint: the model (the class and sizes of `lm`), the state."""
        lm.save_pretrained(folder, state_dict=self.model)
        shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
        save_file(self.optimizer, folder / OPTIMIZER)
        if self.shared:
            save_file(self.shared, folder / SYNC)
        if self.own:
            save_file(self.own, folder / rank_file(0))
        write_json(folder / TRAINER_STATE, {"format_version": FORMAT_VERSION, **self.state})


def rank_file(rank: int) -> str:
    """The name of the file that holds what only this rank has."""
    return f"rank-{rank:05d}.safetensors"


def _handed_over(output_dir: Path, step: int, rank: int) -> Path:
    return output_dir / f"tmp-{step}-{rank_file(rank)}"


def hand_over(output_dir: Path, step: int, rank: int, own: dict[str, torch.Tensor]) -> str:
    """Write a rank's file of a checkpoint for the main process. Returns what went wrong, or ""."""
    path = _handed_over(output_dir, step, rank)
    try:
        save_file(own, path)
        _fsync(path)
    except (OSError, SafetensorError) as error:
        return (
            f"rank {rank} could not write {path}: {getattr(error, 'strerror', None) or error}."
            " Older checkpoints are untouched: make room on the disk"
        )
    return ""


def take_over(folder: Path, output_dir: Path, step: int, rank: int) -> None:
    """Put what a rank has handed over into the checkpoint. Raises ForgeError if it is not seen."""
    path, deadline = _handed_over(output_dir, step, rank), time.monotonic() + SEEN_WITHIN_S
    while not path.exists():
        if time.monotonic() > deadline:
            raise ForgeError(
                f"rank {rank} has written {path.name}, which is not seen here: --output-dir"
                f" {output_dir} must be one folder that all machines share"
            )
        os.listdir(output_dir)  # makes a network file system look again
        time.sleep(0.1)
    path.rename(folder / rank_file(rank))


def damage(path: Path) -> str | None:
    """What is wrong with the checkpoint at `path`; None if every file is what the manifest says."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        version, step = int(manifest["format_version"]), int(manifest["step"])
        files = dict(manifest["files"])
    except FileNotFoundError:
        return f"it has no {MANIFEST}, so its writing was not finished"
    except (OSError, ValueError, KeyError, TypeError) as error:
        return f"its {MANIFEST} cannot be read ({error})"
    if version > FORMAT_VERSION:
        raise ForgeError(
            f"{path} has format version {version}, this program reads up to {FORMAT_VERSION}: "
            "use the newer program that wrote it"
        )
    if path.name != f"checkpoint-{step}":
        return f"its {MANIFEST} is that of step {step}"
    for name, told in files.items():
        file = path / name
        if not file.is_file():
            return f"{name} is missing"
        if file.stat().st_size != told["size"]:
            return f"{name} has {file.stat().st_size} bytes instead of {told['size']}"
        if sha256_of(file) != told["sha256"]:
            return f"{name} has changed since it was written (SHA-256 differs)"
    return None


def newest_good(output_dir: Path) -> tuple[Path | None, list[str]]:
    """The newest undamaged checkpoint, and a line for each newer one that was passed over."""
    passed_over: list[str] = []
    for step in steps_saved(output_dir):
        path = checkpoint_dir(output_dir, step)
        wrong = damage(path)
        if wrong is None:
            return path, passed_over
        passed_over.append(f"passed over {path}: {wrong}")
    return None, passed_over


def read_state(folder: Path) -> dict[str, Any]:
    """The trainer's state that `write_state` left in a verified checkpoint."""
    return json.loads((folder / TRAINER_STATE).read_text(encoding="utf-8"))


def optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<parameter>.<entry>` -> tensor on the CPU."""
    tensors = {}
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            tensors[f"{name}.{entry}"] = tensor.detach().to("cpu", copy=True).contiguous()
    return tensors


def read_own(folder: Path, rank: int) -> dict[str, torch.Tensor]:
    """What a rank of the saved run kept as its own, in a verified checkpoint; it may be nothing."""
    path = folder / rank_file(rank)
    return load_file(path) if path.exists() else {}


def read_shared(folder: Path) -> dict[str, torch.Tensor]:
    """What the strategy kept for all ranks, in a verified checkpoint; it may be nothing."""
    return load_file(folder / SYNC) if (folder / SYNC).exists() else {}


def load_optimizer(
    folder: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0
) -> None:
    """Put the tensors of a verified checkpoint into the optimizer. Raises ForgeError where they do
    not belong to this model and optimizer.

    rank: of the saved run; not 0 only where every rank has trained alone.
    """
    if rank == 0:
        tensors = load_file(folder / OPTIMIZER)
    else:
        tensors = {
            key.removeprefix(OF_OPTIMIZER): tensor
            for key, tensor in read_own(folder, rank).items()
            if key.startswith(OF_OPTIMIZER)
        }
    for name, parameter in model.named_parameters():
        entries = [key for key in tensors if key.rpartition(".")[0] == name]
        for key in entries:
            value, entry = tensors.pop(key), key.rpartition(".")[2]
            # Optimizers keep their step counter on the CPU unless it is fused on a GPU.
            place = parameter.device if value.dim() or parameter.device.type == "cuda" else "cpu"
            optimizer.state[parameter][entry] = value.to(place)
        if not entries and parameter.requires_grad and len(tensors):
            raise ForgeError(
                f"{folder} has no optimizer state for {name}: it is of another model or optimizer"
            )
    if tensors:
        raise ForgeError(
            f"{folder} has optimizer state for unknown {sorted(tensors)[0]}: it is of another model"
        )


def publish(checkpoint: Path, output_dir: Path) -> None:
    """Copy the model of a checkpoint into the run's folder itself, where users of the Hub look."""
    for source in sorted(checkpoint.iterdir()):
        if (
            source.is_file()
            and source.name not in (*(MANIFEST, OPTIMIZER, TRAINER_STATE, SYNC),)
            and not source.name.startswith("rank-")
        ):
            partial = output_dir / f"tmp-{source.name}"
            shutil.copyfile(source, partial)
            _fsync(partial)
            partial.rename(output_dir / source.name)


def identity_differences(recorded: dict[str, Any], asked: dict[str, Any]) -> dict[str, str]:
    """Each setting in which the run on disk is not the run that was asked for, with both values."""
    return {
        key: f"{key}: the run has {recorded.get(key)}, asked was {asked.get(key)}"
        for key in sorted({*recorded, *asked})
        if recorded.get(key) != asked.get(key)
    }


def find(output_dir: Path, resume: str | None) -> Path | None:
    """The checkpoint that `--resume` means; None to start. Damaged ones are passed over by name.

    Raises ForgeError for a damaged one that was asked for by its folder.
    """
    if resume not in (None, "auto") and (wrong := damage(Path(resume))):
        raise ForgeError(f"--resume {resume}: {wrong}. --resume auto takes the newest good one")
    if resume != "auto":
        return Path(resume) if resume else None
    found, passed_over = newest_good(output_dir)
    for line in passed_over:
        print(line, file=sys.stderr, flush=True)
    return found


def claim(output_dir: Path, identity: dict[str, Any], overwrite: bool = False) -> None:
    """Record in run.json that the folder is this run's; `overwrite` first removes the one in it.

    identity: what makes a run this run and no other. Called when all else is known to work.
    Raises ForgeError when the folder cannot be written.
    """
    try:
        output_dir.mkdir(parents=True, exist_ok=True)
        if overwrite:
            _remove_run(output_dir)
        write_json(output_dir / RUN, {"format_version": FORMAT_VERSION, "identity": identity})
    except OSError as error:
        raise ForgeError(
            f"--output-dir {output_dir} cannot be written: {error.strerror or error}"
        ) from error


def recorded_identity(output_dir: Path) -> dict[str, Any] | None:
    """What run.json says of the run in the folder; None if there is none."""
    try:
        text = (output_dir / RUN).read_text(encoding="utf-8")
        return json.loads(text)["identity"]
    except (FileNotFoundError, NotADirectoryError):
        return None
    except (ValueError, KeyError, TypeError) as error:
        raise ForgeError(
            f"{output_dir / RUN} cannot be read ({error}): start the run anew with --overwrite"
        ) from error


def refuse_another_run(
    output_dir: Path, identity: dict[str, Any], resume: bool, resume_changed: bool
) -> None:
    """Raise ForgeError if `output_dir` holds another run, or this one without `resume`."""
    recorded = recorded_identity(output_dir)
    if recorded is None:
        present = [name for name in PUBLISHED if (output_dir / name).exists()]
        if present:
            raise ForgeError(
                f"{output_dir} holds {present[0]}, but no run of this program: choose another "
                "--output-dir, or replace what is there with --overwrite"
            )
        return
    differences = identity_differences(recorded, identity)
    fixed = [line for key, line in differences.items() if key not in MAY_CHANGE]
    if differences and (fixed or not (resume and resume_changed)):
        mend = "Choose another --output-dir, or throw that run away with --overwrite"
        if not fixed:
            mend += ", or go on with these changes by --resume auto --resume-changed"
        told = "\n  ".join(fixed if resume_changed else differences.values())
        raise ForgeError(f"{output_dir} holds another run:\n  {told}\n  {mend}")
    if not resume:
        raise ForgeError(
            f"{output_dir} holds this run already: go on with --resume auto, or start it anew "
            "with --overwrite"
        )


def _remove_run(output_dir: Path) -> None:
    _remove(output_dir, steps_saved(output_dir))
    for name in (RUN, "metrics.jsonl", *PUBLISHED):
        (output_dir / name).unlink(missing_ok=True)
    shutil.rmtree(output_dir / "runs", ignore_errors=True)


def write_json(path: Path, value: Any) -> None:
    """Write JSON so that `path` holds either its old content or all of the new one, durably."""
    partial = path.with_name(f"tmp-{path.name}")
    partial.write_text(json.dumps(value, indent=2, sort_keys=True) + "\n", encoding="utf-8")
    _fsync(partial)
    partial.rename(path)
    _fsync(path.parent)


def sha256_of(path: Path) -> str:
    """The SHA-256 of a file's content, in hexadecimal."""
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
