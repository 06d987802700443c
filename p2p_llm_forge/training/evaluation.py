"""Evaluate a model on a whole split: every token predicted once, weighted alike, by all ranks."""

from __future__ import annotations

import math
import tempfile
from typing import Any

import torch
from transformers import AutoTokenizer

from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.model.compiling import uncompiled
from p2p_llm_forge.model.fit import TextSpec, in_evaluation
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.plausible import require_numbers


def evaluate_split(
    model: NextTokenLoss,
    blocks: Blocks,
    bytes_of_text: int,
    micro_batch_size: int,
    cluster: Cluster,
) -> dict[str, Any]:
    """Figures of the model on all `blocks`: eval_loss, perplexity, bits_per_byte, token_accuracy;
    None for one that is not finite.

    model: not wrapped by DDP, since ranks run different numbers of forwards. The micro-batches are
    the same whatever the world size, and the ranks take them in turn. All ranks must call. Nothing
    is compiled for it: its shapes would each take longer than they save.
    """
    nats, tokens, correct = 0.0, 0, 0
    first, stride = cluster.rank * micro_batch_size, cluster.world_size * micro_batch_size
    with in_evaluation(model), uncompiled(), cluster.accelerator.autocast():
        for start in range(first, len(blocks), stride):
            numbers = range(start, min(start + micro_batch_size, len(blocks)))
            inputs, targets = (
                torch.from_numpy(a).to(cluster.device) for a in blocks.inputs_and_targets(numbers)
            )
            batch_nats, batch_correct = model(inputs, targets, count_correct=True)
            nats += batch_nats.item()
            tokens += targets.numel()
            correct += int(batch_correct.item())
    cluster.barrier()  # waits for as long as a slow rank needs, which a sum does not
    by_rank = cluster.gather_numbers([nats, float(tokens), float(correct)])
    nats_by_rank, *counted = zip(*by_rank, strict=True)
    for counts in counted:
        require_numbers("the tokens that it has counted are", counts, are_whole=True)

    def figures() -> dict[str, Any]:
        # evaluate takes seconds to import: only when, and where, figures are made.
        from p2p_llm_forge.training.language_modeling_metric import LanguageModelingMetric

        tokens, correct = (int(sum(counts)) for counts in counted)
        # evaluate (0.4) writes a file for every metric, below HF_HOME if no other place is named.
        with tempfile.TemporaryDirectory() as folder:
            found = LanguageModelingMetric(cache_dir=folder, keep_in_memory=True).compute(
                nats=[math.fsum(nats_by_rank)],
                tokens=[tokens],
                correct=[correct],
                bytes_of_text=bytes_of_text,
            )
        # JSON has no infinity.
        return {k: v if v is None or math.isfinite(v) else None for k, v in found.items()}

    return cluster.main_only(figures)


def sample_text(lm: Any, text: TextSpec, prompt: str, seed: int, new_tokens: int = 60) -> str:
    """The prompt (or the start of a document) and how the model continues it, drawn by `seed`."""
    tokenizer = AutoTokenizer.from_pretrained(text.tokenizer_dir)
    tokens = [text.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    tokens = tokens[-max(1, text.sequence_length - new_tokens) :]
    inputs = torch.tensor([tokens], device=lm.device)
    torch.manual_seed(seed)
    # Every length would be compiled again for a few tokens.
    with in_evaluation(lm), uncompiled():
        drawn = lm.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(new_tokens, text.sequence_length - 1),
            do_sample=True,
            top_k=40,
            temperature=0.8,
            use_cache=True,
            eos_token_id=text.eos_token_id,
            pad_token_id=text.eos_token_id,
        )
    return str(tokenizer.decode(drawn[0], skip_special_tokens=True))
