"""What a machine has to offer a run: disk, memory, cores, versions, bfloat16."""

from __future__ import annotations

import math
import platform
import shutil
import time
from importlib.metadata import version
from pathlib import Path

import torch

from p2p_llm_forge import __version__
from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.limits import cores, free_memory
from p2p_llm_forge.peers.findings import Finding, failure, fine, warning
from p2p_llm_forge.peers.launch import Launch, choose_threads

# Products that are timed, and how much faster they must be: below it, conversions take it back.
BF16_SIDE, BF16_REPEATS, BF16_GAIN = 512, 7, 1.2
LITTLE_DISK, LITTLE_MEMORY = 2e9, 1e9  # bytes below which even a small run is in danger
# float32 weights and the two moments of AdamW
CHECKPOINT_BYTES_PER_PARAMETER, MODEL_BYTES_PER_PARAMETER = 12, 4


def accelerators() -> int:
    """How many GPUs (or other accelerators) of this machine torch can use."""
    return torch.accelerator.device_count() if torch.accelerator.is_available() else 0


def bf16_pays(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 are faster on the device: on a CPU they are timed.

    Some multiply them twice as fast as float32, some at a third of its speed, and what a CPU says
    of itself does not tell. Takes milliseconds.
    """
    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    if device.type != "cpu":
        return False
    whole = torch.ones(BF16_SIDE, BF16_SIDE)
    sides = {torch.float32: whole, torch.bfloat16: whole.bfloat16()}
    least_s = dict.fromkeys(sides, math.inf)
    for _ in range(BF16_REPEATS):  # in turns: other programs slow both
        for dtype, side in sides.items():
            began = time.perf_counter()
            side @ side
            least_s[dtype] = min(least_s[dtype], time.perf_counter() - began)
    return least_s[torch.float32] > BF16_GAIN * least_s[torch.bfloat16]


def versions() -> dict[str, str]:
    """The versions that decide what is computed, without importing anything for it."""
    libraries = {name: version(name).split("+")[0] for name in ("transformers", "accelerate")}
    return {"torch": torch.__version__.split("+")[0], **libraries, "forge": __version__}


def judge_machine(config: TrainConfig, launch: Launch) -> list[Finding]:
    """Free disk and memory, threads and versions of this machine."""
    disk, where = _free_disk(config.output_dir), f"at {config.output_dir or 'this folder'}"
    memory = free_memory()
    threads, processes = choose_threads(config, launch), launch.local_world_size
    use = f"{processes} process(es) of {threads} thread(s) on {cores()} core(s)"
    known = {"Python": platform.python_version(), **versions()}
    found = [fine("versions", ", ".join(f"{name} {number}" for name, number in known.items()))]
    if disk > LITTLE_DISK:
        found.append(fine("disk", f"{disk / 1e9:.0f} GB free {where}"))
    else:
        fix = "make room, or choose another --output-dir"
        found.append(warning("disk", f"only {disk / 1e9:.2f} GB are free {where}", fix))
    if memory > LITTLE_MEMORY:
        found.append(fine("memory", f"{memory / 1e9:.1f} GB free"))
    else:
        little = f"only {memory / 1e9:.2f} GB of memory are free"
        fix = "end other programs, or raise the limit of this one (a container's, or ulimit -v)"
        found.append(warning("memory", little, fix))
    if threads * processes <= cores():
        found.append(fine("threads", use))
    else:
        fix = f"set --cpu-threads {max(1, cores() // processes)}"
        if processes > cores():
            fix = f"start {cores()} process(es) on this machine, with --cpu-threads 1"
        elif not config.cpu_threads:
            fix = f"unset OMP_NUM_THREADS, or {fix}"
        found.append(warning("threads", f"{use}: they will wait for each other", fix))
    return found


def judge_checkpoints(config: TrainConfig, parameters: int) -> Finding:
    """Whether the checkpoints of a model of so many parameters fit on this machine's disk."""
    # Those that are kept, the one that is being written, and the final model.
    one = CHECKPOINT_BYTES_PER_PARAMETER * parameters
    model = MODEL_BYTES_PER_PARAMETER * parameters
    needed = one * (config.keep_checkpoints + config.keep_best + 1) + model
    free = _free_disk(config.output_dir)
    found = f"checkpoints need {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB are free"
    if free > needed:
        return fine("disk", found)
    fix = f"make {(needed - free) / 1e9:.2f} GB of room, or choose another --output-dir"
    if (fits := int((free - model - 1) // one) - config.keep_best - 1) > 0:
        fix = f"{fix}, or write --keep-checkpoints {fits}"
    return failure("disk", found, fix) if free < one else warning("disk", found, fix)


def _free_disk(output_dir: str) -> int:
    """Bytes that are free where the folder is, or would be."""
    folder = Path(output_dir or ".").absolute()
    existing = next(parent for parent in (folder, *folder.parents) if parent.is_dir())
    return shutil.disk_usage(existing).free
