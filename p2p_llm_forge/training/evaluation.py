"""Evaluate a model on held-out blocks: every token predicted once, weighted alike, by all ranks."""

from __future__ import annotations

import math
import tempfile
from collections.abc import Sequence
from typing import Any

import torch

from p2p_llm_forge.data.held_out import HeldOut
from p2p_llm_forge.model.compiling import uncompiled
from p2p_llm_forge.model.fit import in_evaluation
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.training.feeding import read
from p2p_llm_forge.training.progress import Progress

# Of the blocks that are trained on between two evaluations, so many are evaluated on: a token takes
# less than half as long without its backward, so an evaluation takes about 6 % of the time. Where
# that is too few for a figure, up to FEW of them, but no more than half of them; and always those
# that a usual update would read, which takes no time.
OF_TRAINED, FEW, TOKENS_OF_AN_UPDATE = 8, 128, 4096


def blocks_beside(trained: int, there: int, sequence_length: int) -> int:
    """How many blocks to evaluate on; 0: all that are there.

    trained: blocks that are trained on between two evaluations.
    """
    of_update = TOKENS_OF_AN_UPDATE // sequence_length
    count = max(trained // OF_TRAINED, min(trained // 2, FEW), of_update)
    return count if count < there else 0


def evaluate_blocks(
    model: NextTokenLoss, held_out: HeldOut, micro_batch_size: int, cluster: Cluster
) -> dict[str, Any]:
    """Figures of the model: eval_loss, perplexity, bits_per_byte, token_accuracy; None for one that
    is not finite; eval_blocks, and of how many: eval_split_blocks. Of a sample, the standard errors
    of loss and bits per byte as estimates of what the whole split would give.

    model: not wrapped by DDP, since ranks run different numbers of forwards. The micro-batches are
    the same whatever the world size, and the ranks take them in turn. All ranks must call. Nothing
    is compiled for it: its shapes would each take longer than they save.
    """
    sums = torch.zeros(len(SUMS), dtype=torch.float64)
    first, stride = cluster.rank * micro_batch_size, cluster.world_size * micro_batch_size
    total = len(held_out.numbers)
    progress = Progress("evaluating", total, "blocks", is_shown=cluster.is_main)
    with progress, in_evaluation(model), uncompiled(), cluster.accelerator.autocast():
        for start in range(first, total, stride):
            numbers = held_out.numbers[start : start + micro_batch_size]
            sums += sums_of(model, held_out, numbers, cluster.device)
            progress.reached(min(start + stride, total))
    cluster.barrier()  # waits for as long as a slow rank needs, which a sum does not
    by_rank = cluster.gather_numbers(sums.tolist())
    by_name = dict(zip(SUMS, zip(*by_rank, strict=True), strict=True))
    for name in ("tokens", "correct"):
        require_numbers("the tokens that it has counted are", by_name[name], are_whole=True)
    return cluster.main_only(
        lambda: figures_of({name: math.fsum(of) for name, of in by_name.items()}, held_out)
    )


# Over blocks: of what they come to, and of its squares and products.
SUMS = (
    *("nats", "tokens", "correct", "bytes"),
    *("nats_nats", "nats_tokens", "nats_bytes", "tokens_tokens", "bytes_bytes"),
)


def sums_of(
    model: NextTokenLoss, held_out: HeldOut, numbers: Sequence[int], device: torch.device
) -> torch.Tensor:
    """SUMS of blocks of the split, float64. Bytes before `HeldOut.scale`."""
    batch = read(held_out.blocks, numbers)
    nats, correct = model(*batch.each(lambda one: one.to(device)), by_block=True)
    nats, right = nats.double().cpu(), correct.sum().cpu()
    tokens = (batch.targets >= 0).sum(1).double()
    size = torch.from_numpy(held_out.sizes_of(batch.targets.numpy()))
    of_nats = (nats @ nats, nats @ tokens, nats @ size)
    squares = (*of_nats, tokens @ tokens, size @ size)
    sums = (nats.sum(), tokens.sum(), right, size.sum(), *squares)
    return torch.stack([one.double() for one in sums])


def figures_of(sums: dict[str, float], held_out: HeldOut) -> dict[str, Any]:
    """The figures of an evaluation, from the sums over its blocks."""
    # evaluate takes seconds to import: only when, and where, figures are made.
    from p2p_llm_forge.training.language_modeling_metric import LanguageModelingMetric

    count, total = len(held_out.numbers), len(held_out.blocks)
    scale = held_out.scale if held_out.is_sample else 0.0
    size = sums["bytes"] * scale if held_out.is_sample else float(held_out.split_bytes)
    # evaluate (0.4) writes a file for every metric, below HF_HOME if no other place is named.
    with tempfile.TemporaryDirectory() as folder:
        found = LanguageModelingMetric(cache_dir=folder, keep_in_memory=True).compute(
            nats=[sums["nats"]],
            tokens=[int(sums["tokens"])],
            correct=[int(sums["correct"])],
            bytes_of_text=size,
        )
    found |= {"eval_blocks": count, "eval_split_blocks": total}
    if held_out.is_sample:
        of_token, of_byte = standard_errors(sums, count, total)
        found["eval_loss_stderr"] = of_token
        found["bits_per_byte_stderr"] = of_byte / math.log(2) / scale if scale else None
    # JSON has no infinity.
    return {k: v if v is None or math.isfinite(v) else None for k, v in found.items()}


def standard_errors(sums: dict[str, float], count: int, total: int) -> tuple[float, float]:
    """Standard errors of nats per token and per byte of a sample; not a number of a single block.

    They say how far the figures may be from those of all `total` blocks, of which `count` were
    drawn by chance without replacement: so it does not matter that neighbours are alike. Cochran,
    Sampling Techniques (1977), (6.13) for a ratio of two sums; where all blocks have as many tokens
    that is (2.20), for the mean.
    """
    if count < 2 or not math.isfinite(sums["nats_nats"]):
        return math.nan, math.nan

    def of(unit: str) -> float:
        if not sums[unit]:
            return math.nan
        ratio = sums["nats"] / sums[unit]
        of_products = -2 * ratio * sums[f"nats_{unit}"] + ratio * ratio * sums[f"{unit}_{unit}"]
        of_mean = (1 - count / total) / count / (count - 1)
        residuals = max(0.0, of_mean * (sums["nats_nats"] + of_products))
        return math.sqrt(residuals) / (sums[unit] / count)

    return of("tokens"), of("bytes")
