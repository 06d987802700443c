"""Next-token loss without the full logits tensor."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from p2p_llm_forge.model.document_mask import document_mask_for
from p2p_llm_forge.model.fit import in_evaluation

# Logits of one chunk: about 16 million values, 64 MB in float32.
CHUNK_VALUES = 2**24


class _ChunkedNats(torch.autograd.Function):
    """Cross entropy of a linear layer's outputs, a chunk of tokens at a time.

    The gradient is made together with the loss, so the logits of a chunk are computed once and
    never kept. (The idea of Liger Kernel, arXiv 2410.10989.)
    """

    @staticmethod
    def forward(
        ctx: Any,
        hidden: torch.Tensor,
        weight: torch.Tensor,
        bias: torch.Tensor | None,
        targets: torch.Tensor,
        dtype: torch.dtype,
    ) -> torch.Tensor:
        learns, size = any(ctx.needs_input_grad), chunk_tokens(len(weight))
        matrix = weight.to(dtype)
        exact = torch.promote_types(weight.dtype, torch.float32)
        nats = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        grad_weight = torch.zeros_like(weight if learns else nats, dtype=exact)
        grad_bias = None if bias is None else torch.zeros_like(bias, dtype=exact)
        wholes = (hidden, targets.unsqueeze(1), grad_hidden)
        for chunk, wanted, grad_chunk in zip(*(whole.split(size) for whole in wholes), strict=True):
            part = chunk.to(dtype)
            logits = (part @ matrix.T).to(exact)
            if bias is not None:
                logits += bias
            log_total = logits.logsumexp(1, keepdim=True)
            nats += (log_total - logits.gather(1, wanted)).sum()
            if not learns:
                continue
            # d nats / d logits = softmax - one_hot, written over the logits.
            grad = logits.sub_(log_total).exp_()
            grad.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=grad.dtype))
            if grad_bias is not None:
                grad_bias += grad.sum(0)
            grad = grad.to(dtype)
            grad_chunk.copy_(grad @ matrix)
            grad_weight += grad.T @ part
        ctx.save_for_backward(grad_hidden, grad_weight, grad_bias)
        ctx.weight_dtype = weight.dtype
        return nats

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        of_hidden = grad_hidden * scale.to(grad_hidden.dtype)
        of_bias = None if grad_bias is None else grad_bias * scale
        return of_hidden, (grad_weight * scale).to(ctx.weight_dtype), of_bias, None, None


def chunk_tokens(vocab_size: int) -> int:
    """Tokens whose logits are held at a time."""
    return max(128, CHUNK_VALUES // vocab_size)


def chunked_nats(
    hidden: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None, targets: torch.Tensor
) -> torch.Tensor:
    """Sum over tokens of -log p(target), scalar in at least float32, differentiable.

    hidden: (tokens, width), any float dtype; weight: (vocabulary, width); bias: (vocabulary,) or
    None; targets: (tokens,) int64. Matrix products run in the autocast dtype where autocast is on,
    everything else in float32 (float64 where the weights are).
    """
    kind = hidden.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else weight.dtype
    with torch.autocast(kind, enabled=False):
        return _ChunkedNats.apply(hidden, weight, bias, targets, dtype)


class NextTokenLoss(nn.Module):
    """A causal LM together with its loss: blocks in, nats out.

    DDP and Accelerate see one module whose output is a scalar, so the logits are neither gathered
    nor copied to float32. Models whose head is more than a linear layer (soft-capped or scaled
    logits) are found by trial and keep their own forward.

    document_end: the token that ends a document, to keep attention inside documents; None: a block
    is read as one text. Raises ForgeError for a model that cannot.
    """

    def __init__(self, lm: Any, document_end: int | None = None) -> None:
        super().__init__()
        self.lm = lm
        self.chunked = head_is_linear(lm)
        self.document_mask = None if document_end is None else document_mask_for(lm, document_end)

    def forward(
        self, inputs: torch.Tensor, targets: torch.Tensor, count_correct: bool = False
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(nats, correct): the summed loss, at least float32, and the number of tokens whose most
        probable prediction is right, int64 (0 unless counted). inputs, targets: (blocks, tokens)
        int64."""
        mask = self.document_mask(inputs) if self.document_mask else {}
        correct, flat = torch.zeros((), dtype=torch.int64, device=inputs.device), targets.flatten()
        if not self.chunked:
            logits = self.lm(input_ids=inputs, use_cache=False, **mask).logits.flatten(0, 1)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            if count_correct:
                correct += (logits.argmax(-1) == flat).sum()
            return nn.functional.cross_entropy(logits, flat, reduction="sum"), correct
        hidden = self.lm.base_model(input_ids=inputs, use_cache=False, **mask)[0].flatten(0, 1)
        head = self.lm.get_output_embeddings()
        if count_correct:
            size = chunk_tokens(len(head.weight))
            for part, wanted in zip(hidden.split(size), flat.split(size), strict=True):
                correct += (head(part).argmax(-1) == wanted).sum()
        return chunked_nats(hidden, head.weight, head.bias, flat), correct


def head_is_linear(lm: Any) -> bool:
    """Whether the model's logits are just its output embedding applied to its last hidden state.

    Tried, since only the model knows, and with large values in place of hidden states and logits:
    those of a new model are so small that a soft cap or one more norm changes nothing.
    """
    head, base = lm.get_output_embeddings(), lm.base_model
    if base is lm or not isinstance(head, nn.Linear) or type(head).forward is not nn.Linear.forward:
        return False
    # Two tokens: every model takes that many, however short its context.
    tokens = torch.tensor([[1, 0]], device=head.weight.device)
    own, sent, received, shown = [], [], [], []

    def replace_hidden(_: Any, __: Any, output: Any) -> Any:
        own.append(output[0])
        sent.append(loud(output[0]))
        if isinstance(output, tuple):
            return (sent[-1], *output[1:])
        output[next(iter(output))] = sent[-1]
        return output

    def replace_logits(_: Any, inputs: Any, output: torch.Tensor) -> torch.Tensor:
        received.append(inputs[0])
        shown.append(loud(output))
        return shown[-1]

    with in_evaluation(lm):
        alone = base(input_ids=tokens, use_cache=False)[0]
        hooks = [base.register_forward_hook(replace_hidden)]
        hooks += [head.register_forward_hook(replace_logits)]
        try:
            logits = lm(input_ids=tokens, use_cache=False).logits
        finally:
            for hook in hooks:
                hook.remove()
    pairs = ((own, [alone]), (sent, received), (shown, [logits]))
    return all(
        len(ours) == len(theirs) == 1 and is_close(ours[0], theirs[0]) for ours, theirs in pairs
    )


def loud(like: torch.Tensor) -> torch.Tensor:
    """Values of thousands in the shape of `like`, the same at every call."""
    draw = torch.Generator().manual_seed(0)
    return (1e4 * torch.randn(like.shape, generator=draw)).to(like)


def is_close(one: torch.Tensor, other: torch.Tensor) -> bool:
    """Whether two tensors are the same but for rounding in float32."""
    return one.shape == other.shape and torch.allclose(
        one.float(), other.float(), rtol=1e-4, atol=1e-5
    )
