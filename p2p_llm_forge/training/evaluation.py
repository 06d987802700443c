"""Evaluate a model on a whole split: every token predicted once, weighted alike, by all ranks."""

from __future__ import annotations

from typing import Any

import torch

from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.model.fit import TextSpec
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.cluster import Cluster


@torch.no_grad()
def evaluate_split(
    model: NextTokenLoss,
    blocks: Blocks,
    bytes_of_text: int,
    micro_batch_size: int,
    cluster: Cluster,
) -> dict[str, Any]:
    """Figures of the model on all `blocks`: eval_loss, perplexity, bits_per_byte, token_accuracy.

    model: not wrapped by DDP, since ranks run different numbers of forwards. The micro-batches are
    the same whatever the world size, and the ranks take them in turn. All ranks must call.
    """
    model.eval()
    nats, tokens, correct = 0.0, 0, 0
    for start in range(
        cluster.rank * micro_batch_size, len(blocks), cluster.world_size * micro_batch_size
    ):
        numbers = range(start, min(start + micro_batch_size, len(blocks)))
        inputs, targets = (
            torch.from_numpy(a).to(cluster.device) for a in blocks.inputs_and_targets(numbers)
        )
        with cluster.accelerator.autocast():
            batch_nats, batch_correct = model(inputs, targets, count_correct=True)
        nats += batch_nats.item()
        tokens += targets.numel()
        correct += int(batch_correct.item())
    model.train()
    cluster.barrier()  # waits for as long as a slow rank needs, which a sum does not
    sums = cluster.sum_across([nats, float(tokens), float(correct)])
    return cluster.main_only(lambda: _figures(sums[0], int(sums[1]), int(sums[2]), bytes_of_text))


def _figures(nats: float, tokens: int, correct: int, bytes_of_text: int) -> dict[str, Any]:
    # evaluate takes seconds to import: only when, and where, figures are made.
    from p2p_llm_forge.training.language_modeling_metric import LanguageModelingMetric

    metric = LanguageModelingMetric()
    return metric.compute(
        nats=[nats], tokens=[tokens], correct=[correct], bytes_of_text=bytes_of_text
    )


@torch.no_grad()
def sample_text(lm: Any, text: TextSpec, prompt: str, seed: int, new_tokens: int = 60) -> str:
    """The prompt (or the start of a document) and how the model continues it, drawn by `seed`."""
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(text.tokenizer_dir)
    tokens = [text.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    room = text.sequence_length - new_tokens
    tokens = tokens[-max(1, room) :]
    inputs = torch.tensor([tokens], device=lm.device)
    torch.manual_seed(seed)
    was_training = lm.training
    lm.eval()
    # Every length would be compiled again for a few tokens.
    with torch.compiler.set_stance("force_eager"):
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
    lm.train(was_training)
    return str(tokenizer.decode(drawn[0], skip_special_tokens=True))
