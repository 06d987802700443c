"""What is in a checkpoint: a copy of the training state in memory, its files, and loading them.

Tensors are stored as safetensors, everything else as JSON; nothing is pickled.
"""

from __future__ import annotations

import os
import re
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.files import fsync, write_json
from p2p_llm_forge.model.lora import saved_parameters, settings_of, write_adapters
from p2p_llm_forge.polling import wait_for
from p2p_llm_forge.sync.base import SyncState
from p2p_llm_forge.training.checkpoint import FORMAT_VERSION, TRAINER_STATE, not_written

OPTIMIZER = "optimizer.safetensors"
SYNC = "sync.safetensors"  # what --sync diloco keeps beside the weights, the same for all ranks
OF_OPTIMIZER = "optimizer."  # keys of a rank's own optimizer state
SEEN_WITHIN_S = 60.0  # a network file system may show a new file that late


@dataclass(frozen=True)
class Snapshot:
    """A copy in memory of everything that a checkpoint holds."""

    model: dict[str, torch.Tensor]
    optimizer: dict[str, torch.Tensor]
    trainer: dict[str, Any]
    sync: SyncState  # of the main process

    @staticmethod
    def take(
        lm: Any, optimizer: torch.optim.Optimizer, trainer: dict[str, Any], sync: SyncState
    ) -> Snapshot:
        """Copy now; the originals may change as soon as this returns. sync is a copy already."""
        copies: dict[int, torch.Tensor] = {}

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            # Tied weights stay one tensor, which save_pretrained writes once.
            return copies.setdefault(tensor.data_ptr(), tensor.detach().to("cpu", copy=True))

        model = {name: copy(tensor) for name, tensor in saved_parameters(lm).items()}
        return Snapshot(model, optimizer_tensors(lm, optimizer), trainer=trainer, sync=sync)

    def write(self, folder: Path, lm: Any, tokenizer_dir: Path) -> None:
        """Write all files of a checkpoint: the model (the class and sizes of `lm`, or its
        adapters alone), the state."""
        if settings_of(lm):
            write_adapters(folder, lm, self.model)
        else:
            lm.save_pretrained(folder, state_dict=self.model)
        shutil.copytree(tokenizer_dir, folder, dirs_exist_ok=True)
        save_file(self.optimizer, folder / OPTIMIZER)
        if self.sync.shared:
            save_file(self.sync.shared, folder / SYNC)
        if self.sync.own:
            save_file(self.sync.own, folder / rank_file(0))
        write_json(folder / TRAINER_STATE, {"format_version": FORMAT_VERSION, **self.trainer})


# --- what only one rank has -----------------------------------------------------------------------


def rank_file(rank: int) -> str:
    """The name of the file that holds what only this rank has."""
    return f"rank-{rank:05d}.safetensors"


def write_rank_file(output_dir: Path, rank: int, own: dict[str, torch.Tensor]) -> str:
    """Write a rank's file beside the checkpoints; returns its name there. Raises ForgeError."""
    path = output_dir / f"tmp-{rank_file(rank)}.{secrets.token_hex(4)}"
    try:
        save_file(own, path)
        fsync(path)
    except (OSError, SafetensorError) as error:
        raise not_written(f"rank {rank} could not write {path}", error) from error
    return path.name


def is_name_of_rank_file(name: Any, rank: int) -> bool:
    """Whether `name` is what `write_rank_file` calls a file of this rank, and so no path."""
    known = re.escape(f"tmp-{rank_file(rank)}.")
    return isinstance(name, str) and re.fullmatch(f"{known}[0-9a-f]{{8}}", name) is not None


def collect_rank_file(output_dir: Path, name: str, rank: int, checkpoint: Path) -> None:
    """Move what a rank has written into the checkpoint. Raises ForgeError if it is not seen."""

    def is_seen() -> bool:
        os.listdir(output_dir)  # makes a network file system look again
        return (output_dir / name).exists()

    if not wait_for(is_seen, SEEN_WITHIN_S):
        raise ForgeError(
            f"rank {rank} has written {name} into --output-dir {output_dir}, but it is not seen on"
            " the machine of rank 0",
            "give an --output-dir that all machines share",
        )
    (output_dir / name).rename(checkpoint / rank_file(rank))


def tensors_in(file: Path) -> dict[str, torch.Tensor]:
    """The tensors in a file of a verified checkpoint; none where it holds no such file."""
    return load_file(file) if file.exists() else {}


# --- the optimizer --------------------------------------------------------------------------------


def optimizer_tensors(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> dict[str, torch.Tensor]:
    """The optimizer's state as `<parameter>.<entry>` -> tensor on the CPU."""
    return {
        name: tensor.detach().to("cpu", copy=True).contiguous()
        for name, tensor in moments(model, optimizer)
    }


def moments(
    model: torch.nn.Module, optimizer: torch.optim.Optimizer
) -> Iterator[tuple[str, torch.Tensor]]:
    """The optimizer's state as `<parameter>.<entry>` and tensor, not copied."""
    for name, parameter in model.named_parameters():
        for entry, value in optimizer.state.get(parameter, {}).items():
            tensor = value if isinstance(value, torch.Tensor) else torch.tensor(value)
            yield f"{name}.{entry}", tensor


def load_optimizer(
    checkpoint: Path, model: torch.nn.Module, optimizer: torch.optim.Optimizer, rank: int = 0
) -> None:
    """Put the tensors of a verified checkpoint into the optimizer.

    rank: of the saved run; not 0 only where every rank has trained alone. Raises ForgeError where
    they do not belong to this model.
    """
    file, prefix = (rank_file(rank), OF_OPTIMIZER) if rank else (OPTIMIZER, "")
    saved = tensors_in(checkpoint / file)
    left = {key.removeprefix(prefix): saved[key] for key in saved if key.startswith(prefix)}
    fix = "resume with the model and the --optimizer that it was saved with"
    for name, parameter in model.named_parameters():
        entries = [key for key in left if key.rpartition(".")[0] == name]
        for key in entries:
            value, entry = left.pop(key), key.rpartition(".")[2]
            # Optimizers keep their step counter on the CPU unless it is fused on a GPU.
            is_on_device = value.dim() or parameter.device.type == "cuda"
            device = parameter.device if is_on_device else "cpu"
            optimizer.state[parameter][entry] = value.to(device)
        if not entries and parameter.requires_grad and left:
            found = f"{checkpoint} has no optimizer state for {name}: it is of another model"
            raise ForgeError(f"{found} or optimizer", fix)
    if left:
        found = f"{checkpoint} has optimizer state for unknown {min(left)}: it is of another model"
        raise ForgeError(found, fix)
