"""`--micro-batch-size auto`: the largest micro-batch that fits into the memory of every rank."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.limits import free_memory
from p2p_llm_forge.memory import return_memory
from p2p_llm_forge.model.build import recompute_activations
from p2p_llm_forge.model.loss import CHUNK_VALUES, CHUNK_VALUES_ON_GPU, NextTokenLoss
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.peers.rank_failure import is_out_of_memory
from p2p_llm_forge.shapes import is_count
from p2p_llm_forge.training.checkpoint import read_state
from p2p_llm_forge.training.compilation import one_micro_batch
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.plan import even_size

# What a forward and backward takes besides the activations that it keeps: a chunk of logits with
# its gradient, and as much again of its own work as it keeps of a layer.
BYTES_PER_LOGIT, OWN_WORK = 3 * 4, 1.25
USABLE_SHARE = 0.8  # of what is free: others need some, and allocators keep some
BYTES_PER_GRADIENT, BYTES_OF_MOMENTS = 4, 8  # of a parameter, in float32; of AdamW, the most
SHORTEST = 16  # tokens of a block


@dataclass(frozen=True)
class Memory:
    """What this rank has, and what a micro-batch takes of it, in bytes.

    seen: the blocks that fit, where memory did not suffice for one more.
    """

    free: float
    fixed: float  # whatever the micro-batch
    per_block: float
    seen: int | None = None

    def blocks_that_fit(self) -> int:
        """The largest micro-batch; 0: not even one block."""
        if self.seen is not None:
            return self.seen
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
    cluster.together(return_memory)  # a rank cannot take what another has freed and keeps
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


def measured_memory(
    job: Job, model: NextTokenLoss, length: int | None = None, moments: int = BYTES_OF_MOMENTS
) -> Memory:
    """What one block takes, by what forwards of one block and of two keep for their backward.

    Two are tried only where they can fit: out of memory, most processes are killed. Others are
    refused some, which is an answer, too. length: of a block, if not that of the data; moments:
    bytes of a parameter that its optimizer is yet to take. Needs no other rank.
    """
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    length = length or job.data.manifest.sequence_length
    device, later = job.cluster.device, moments * trained
    processes = job.cluster.launch.local_world_size if device.type == "cpu" else 1
    one = kept_by(job, model, (1, length), later)
    free = free_bytes(device) / processes
    if one is None:
        return Memory(free, fixed=0.0, per_block=math.inf, seen=0)
    most = CHUNK_VALUES_ON_GPU if device.type == "cuda" else CHUNK_VALUES
    logits = max(job.plan.shares) * length * job.data.manifest.vocab_size
    fixed = later + BYTES_PER_GRADIENT * trained + BYTES_PER_LOGIT * min(most, logits)
    alone = Memory(free, fixed, OWN_WORK * one)
    if fixed + 2 * alone.per_block > free:
        return alone
    two = kept_by(job, model, (2, length), later)
    if two is None:
        return replace(alone, seen=1)
    per_block = OWN_WORK * max(two - one, one / 2)
    return Memory(free, fixed + max(0.0, one - (two - one)), per_block)


def kept_by(job: Job, model: NextTokenLoss, shape: tuple[int, int], later: int) -> int | None:
    """Bytes that a forward of blocks of this shape keeps for its backward.

    None where memory is too small for both, and for `later` bytes beside them.
    """
    blocks, length = shape
    device = job.cluster.device

    def act() -> None:
        beside = torch.empty(later, dtype=torch.uint8, device=device)
        one_micro_batch(job, model, blocks, length)
        del beside

    try:
        return bytes_kept(act)
    except Exception as error:
        if not is_out_of_memory(error):
            raise
    give_back(model)
    return None


def give_back(model: torch.nn.Module) -> None:
    """Free what a forward or backward has left that memory was too small for."""
    model.zero_grad()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


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
    shorter, fixes = length_that_fits(job, model, own), []
    if not job.config.gradient_checkpointing:
        recompute_activations(model.lm)
        if measured_memory(job, model).blocks_that_fit() >= 1:
            fixes.append("add --gradient-checkpointing")
    if shorter:
        fixes.append(f"prepare the data with --sequence-length {shorter}")
    fixes.append("take a smaller model, or a machine with more memory")
    usable, needed = USABLE_SHARE * own.free / 1e9, (own.fixed + own.per_block) / 1e9
    needs = f"about {needed:.2f} GB, {usable:.2f} GB can be used"
    if own.seen is not None:
        needs = f"more than the {own.free / 1e9:.2f} GB that are free"
    raise ForgeError(
        f"--micro-batch-size auto: not even one block of {length} tokens fits: it needs {needs}",
        ", or ".join(fixes),
    )


def length_that_fits(job: Job, model: NextTokenLoss, own: Memory) -> int:
    """Tokens of a block that fits where one of the data does not; 0: none is known."""
    length = job.data.manifest.sequence_length
    if own.seen is None:
        length = int(length * (USABLE_SHARE * own.free - own.fixed) / own.per_block)
        return length // 8 * 8 if length >= SHORTEST else 0
    while length >= 2 * SHORTEST:  # by trial: what a block takes is not known
        length = length // 16 * 8
        if measured_memory(job, model, length).blocks_that_fit() >= 1:
            return length
    return 0


def recorded_size(checkpoint: Path) -> int:
    """The micro-batch that a checkpoint's run had come to; 0 where it does not say."""
    size = read_state(checkpoint).get("micro_batch_size")
    return int(size) if size is not None and is_count(size) else 0


def free_bytes(device: torch.device) -> float:
    """Memory that this process can still take, of its GPU or of its machine."""
    if device.type != "cuda":
        return free_memory()
    free, _ = torch.cuda.mem_get_info(device)
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return float(free + unused)
