"""`--micro-batch-size auto`: the largest micro-batch that fits into the memory of every rank."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import recompute_activations
from p2p_llm_forge.model.loss import CHUNK_VALUES, CHUNK_VALUES_ON_GPU, NextTokenLoss
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.shapes import is_count
from p2p_llm_forge.training.checkpoint import read_state
from p2p_llm_forge.training.compilation import one_micro_batch
from p2p_llm_forge.training.free_memory import free_bytes
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.plan import even_size

# What a forward and backward takes besides the activations that it keeps: a chunk of logits with
# its gradient, and as much again of its own work as it keeps of a layer.
BYTES_PER_LOGIT, OWN_WORK = 3 * 4, 1.25
USABLE_SHARE = 0.8  # of what is free: others need some, and allocators keep some
# Of a parameter: its gradient and the two moments of AdamW, in float32.
BYTES_PER_PARAMETER = 12


@dataclass(frozen=True)
class Memory:
    """What this rank has, and what a micro-batch takes of it, in bytes."""

    free: float
    fixed: float  # whatever the micro-batch
    per_block: float

    def blocks_that_fit(self) -> int:
        """The largest micro-batch; 0: not even one block."""
        return max(0, int((USABLE_SHARE * self.free - self.fixed) / max(self.per_block, 1)))


def settle_micro_batch(job: Job, model: NextTokenLoss, checkpoint: Path | None) -> int:
    """The blocks in a forward: what was planned, or for `auto` the most that fit on every rank.

    All ranks must call, also those to which a number was given: they keep it. A run goes on with
    what it had come to, if that fits. Raises ForgeError, saying what would fit, where one block
    does not.
    """
    plan, cluster, is_auto = job.plan, job.cluster, job.config.micro_batch_size == "auto"
    if not any(asks for (asks,) in cluster.gather_numbers([is_auto])):
        return plan.micro_batch_size
    own = cluster.together(lambda: measured_memory(job, model) if is_auto else None)
    fits = min(own.blocks_that_fit(), plan.shares[cluster.rank]) if own else max(plan.shares)
    by_rank = [int(number) for (number,) in cluster.gather_numbers([fits])]
    require_numbers("the blocks that fit are", by_rank, are_whole=True)
    if min(by_rank) < 1:
        cluster.together(lambda: refuse_one_block(job, model, own) if own else None)
    most = max(1, min(by_rank))
    begun = cluster.main_only(lambda: recorded_size(checkpoint)) if checkpoint else 0
    if own is None:
        return plan.micro_batch_size
    return begun if 0 < begun <= most else even_size(max(plan.shares), most)


def measured_memory(job: Job, model: NextTokenLoss) -> Memory:
    """What one block keeps for backward, by a forward of one block and one of two."""
    one, two = (bytes_kept(lambda n=n: one_micro_batch(job, model, n)) for n in (1, 2))  # type: ignore[misc]
    per_block = OWN_WORK * max(two - one, one / 2)
    parameters = sum(p.numel() for p in model.parameters() if p.requires_grad)
    is_on_gpu = job.cluster.device.type == "cuda"
    chunk = BYTES_PER_LOGIT * (CHUNK_VALUES_ON_GPU if is_on_gpu else CHUNK_VALUES)
    fixed = BYTES_PER_PARAMETER * parameters + chunk + max(0.0, one - (two - one))
    processes = job.cluster.launch.local_world_size if job.cluster.device.type == "cpu" else 1
    return Memory(free_bytes(job.cluster.device) / processes, fixed, per_block)


def bytes_kept(act: Callable[[], object]) -> int:
    """Bytes of the tensors that a forward in `act` keeps for its backward, each storage once."""
    kept: dict[int, int] = {}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if not isinstance(tensor, torch.nn.Parameter):
            storage = tensor.untyped_storage()
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        act()
    return sum(kept.values())


def refuse_one_block(job: Job, model: NextTokenLoss, own: Memory) -> None:
    """Raise ForgeError, with what would fit, if one block does not fit on this rank."""
    if own.blocks_that_fit() >= 1:
        return
    length = job.data.manifest.sequence_length
    needed, free = own.fixed + own.per_block, USABLE_SHARE * own.free
    fixes = []
    if not job.config.gradient_checkpointing:
        recompute_activations(model.lm)
        if measured_memory(job, model).blocks_that_fit() >= 1:
            fixes.append("add --gradient-checkpointing")
    shorter = int(length * (free - own.fixed) / own.per_block)
    if shorter >= 16:
        fixes.append(f"prepare the data with --sequence-length {shorter // 8 * 8}")
    fixes.append("take a smaller model, or a machine with more memory")
    raise ForgeError(
        f"--micro-batch-size auto: not even one block of {length} tokens fits: it needs about"
        f" {needed / 1e9:.2f} GB, {free / 1e9:.2f} GB can be used",
        ", or ".join(fixes),
    )


def recorded_size(checkpoint: Path) -> int:
    """The micro-batch that a checkpoint's run had come to; 0 where it does not say."""
    size = read_state(checkpoint).get("micro_batch_size")
    return int(size) if size is not None and is_count(size) else 0
