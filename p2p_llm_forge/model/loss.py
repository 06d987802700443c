"""Next-token loss without the full logits tensor."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import nn

from p2p_llm_forge.model.document_mask import document_mask_for
from p2p_llm_forge.model.fused import fuse
from p2p_llm_forge.model.fused_steps import autocast_dtype
from p2p_llm_forge.model.head import PLAIN, Head, head_of

# Logits of one chunk: about 16 million values, 64 MB in float32. On a GPU more: adding a chunk's
# gradient of the weights to the others' moves as much memory as the logits of some hundred tokens.
CHUNK_VALUES, CHUNK_VALUES_ON_GPU = 2**24, 2**26
# Rows of a matrix that a GPU multiplies in half precision, in multiples: its matrix units want rows
# of logits to begin at a multiple of 16 bytes, and GPT-2's vocabulary, 50,257, is odd.
ROWS = 64


class _ChunkedNats(torch.autograd.Function):
    """Cross entropy of a linear layer's outputs, a chunk of tokens at a time.

    With a cap, the logits are cap * tanh(outputs): the rest of a Head is done outside.

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
        how: tuple[torch.dtype, float | None],
    ) -> torch.Tensor:
        dtype, cap = how
        for_hidden, for_weight, for_bias, *_ = ctx.needs_input_grad
        vocab_size = len(weight)
        size = chunk_tokens(vocab_size, hidden.device)
        extra = -vocab_size % rows_multiple(hidden.device, dtype)
        matrix = (
            nn.functional.pad(weight.to(dtype), (0, 0, 0, extra)) if extra else weight.to(dtype)
        )
        exact = torch.promote_types(weight.dtype, torch.float32)
        nats = torch.zeros((), dtype=exact, device=hidden.device)
        grad_hidden = torch.empty_like(hidden)
        # Of a frozen head none is made: a third of the work, and float32 in the size of the head.
        grad_weight = torch.zeros_like(matrix, dtype=exact) if for_weight else None
        grad_bias = torch.zeros_like(weight[:, 0], dtype=exact) if for_bias else None
        wholes = (hidden, targets.unsqueeze(1), grad_hidden)
        for chunk, wanted, grad_chunk in zip(*(whole.split(size) for whole in wholes), strict=True):
            part = chunk.to(dtype)
            logits, bent = logits_of(part @ matrix.T, bias, cap, exact)
            logits[:, vocab_size:] = -torch.inf
            logs = logits.log_softmax(1, dtype=exact)  # on a GPU one kernel, also of half precision
            del logits
            nats -= logs.gather(1, wanted).sum()
            if not (for_hidden or for_weight or for_bias):
                continue
            # d nats / d logits = softmax - one_hot, written over the logarithms.
            grad = logs.exp_()
            grad.scatter_add_(1, wanted, torch.full_like(wanted, -1, dtype=grad.dtype))
            if bent is not None:  # by 1 - tanh^2; times cap in backward
                grad.addcmul_(grad, bent.square_(), value=-1)
            if grad_bias is not None:
                grad_bias += grad[:, :vocab_size].sum(0)
            grad = grad.to(dtype)
            if for_hidden:
                grad_chunk.copy_(grad @ matrix)
            if grad_weight is not None:
                grad_weight += grad.T @ part
        of_weight = None if grad_weight is None else grad_weight[:vocab_size]
        ctx.save_for_backward(grad_hidden if for_hidden else None, of_weight, grad_bias)
        ctx.weight_dtype, ctx.slope = weight.dtype, cap or 1.0
        return nats

    @staticmethod
    def backward(ctx: Any, scale: torch.Tensor) -> tuple[torch.Tensor | None, ...]:  # type: ignore[override]
        grad_hidden, grad_weight, grad_bias = ctx.saved_tensors
        scale = scale * ctx.slope
        of_hidden = None if grad_hidden is None else grad_hidden * scale.to(grad_hidden.dtype)
        of_weight = None if grad_weight is None else (grad_weight * scale).to(ctx.weight_dtype)
        of_bias = None if grad_bias is None else grad_bias * scale
        return of_hidden, of_weight, of_bias, None, None


def logits_of(
    product: torch.Tensor, bias: torch.Tensor | None, cap: float | None, exact: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """(logits, tanh): of (tokens, rows) products of the head's matrix, which are written over.

    tanh: what the cap was multiplied with; None without one. rows: at least those of the bias.
    """
    if bias is not None:
        product = product.to(exact)
        product[:, : len(bias)] += bias
    if cap is None:
        return product, None
    bent = product.to(exact).tanh_()
    return bent * cap, bent


def chunk_tokens(vocab_size: int, device: torch.device) -> int:
    """Tokens whose logits are held at a time."""
    values = CHUNK_VALUES_ON_GPU if device.type == "cuda" else CHUNK_VALUES
    return max(128, values // vocab_size)


def rows_multiple(device: torch.device, dtype: torch.dtype) -> int:
    """What the head's matrix is filled up to a multiple of, with rows that stand for no token."""
    return ROWS if device.type == "cuda" and dtype.itemsize == 2 else 1


def chunked_nats(
    hidden: torch.Tensor,
    weight: torch.Tensor,
    bias: torch.Tensor | None,
    targets: torch.Tensor,
    head: Head = PLAIN,
) -> torch.Tensor:
    """Sum over tokens of -log p(target), scalar in at least float32, differentiable.

    hidden: (tokens, width), any float dtype; weight: (vocabulary, width); bias: (vocabulary,) or
    None; targets: (tokens,) int64; head: what else is done on the way to the logits. Matrix
    products run in the autocast dtype where autocast is on, everything else in float32 (float64
    where the weights are).
    """
    kind = hidden.device.type
    dtype = autocast_dtype(hidden) or weight.dtype
    with torch.autocast(kind, enabled=False):
        scale = head.scale / (head.cap or 1)
        if head.before * scale != 1:
            hidden = hidden * (head.before * scale)
        if bias is not None and scale != 1:
            bias = bias * scale
        return _ChunkedNats.apply(hidden, weight, bias, targets, (dtype, head.cap))


class NextTokenLoss(nn.Module):
    """A causal LM together with its loss: blocks in, nats out.

    DDP and Accelerate see one module whose output is a scalar, so the logits are neither gathered
    nor copied to float32. Models whose head is more than a linear layer, scales and a soft cap are
    found by trial and keep their own forward.

    document_end: the token that ends a document, to keep attention inside documents; None: a block
    is read as one text. Raises ForgeError for a model that cannot.
    """

    def __init__(self, lm: Any, document_end: int | None = None) -> None:
        super().__init__()
        fuse(lm)
        self.lm = lm
        self.head = head_of(lm)
        self.document_mask = None if document_end is None else document_mask_for(lm, document_end)

    def forward(
        self,
        inputs: torch.Tensor,
        targets: torch.Tensor,
        begins: torch.Tensor | None = None,
        by_block: bool = False,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """(nats, correct): the summed loss, at least float32, and 0, to learn from. by_block: of
        each block (blocks,) its loss, and the number of tokens whose most probable prediction is
        right, int64; without a gradient. inputs, targets: (blocks, tokens) int64. begins: of
        conversations, bool, whether each target is the first of one; there targets below 0 do not
        count, and nothing is computed for them from the head on. None: text, which counts whole."""
        mask = self.document_mask(inputs, begins=begins) if self.document_mask else {}
        flat = targets.flatten()
        # Found before the model runs, so that a GPU is waited for when it has little to do.
        counted = None if begins is None else (flat >= 0).nonzero().squeeze(1)
        wanted = flat if counted is None else flat[counted]
        if self.head is None:
            logits = self.lm(input_ids=inputs, use_cache=False, **mask).logits.flatten(0, 1)
            logits = logits if counted is None else logits[counted]
            if by_block:
                return _of_blocks([logits], wanted, counted, targets.shape)
            logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
            nats = nn.functional.cross_entropy(logits, wanted, reduction="sum")
            return nats, torch.zeros_like(nats, dtype=torch.int64)
        hidden = self.lm.base_model(input_ids=inputs, use_cache=False, **mask)[0].flatten(0, 1)
        hidden = hidden if counted is None else hidden[counted]
        linear = self.lm.get_output_embeddings()
        if by_block:
            parts = hidden.split(chunk_tokens(len(linear.weight), hidden.device))
            return _of_blocks(map(self._logits, parts), wanted, counted, targets.shape)
        nats = chunked_nats(hidden, linear.weight, linear.bias, wanted, self.head)
        return nats, torch.zeros_like(nats, dtype=torch.int64)

    def _logits(self, hidden: torch.Tensor) -> torch.Tensor:
        """Of hidden states (tokens, width), in at least float32 from the head's product on."""
        assert self.head is not None
        product = self.lm.get_output_embeddings()(self.head.scaled(hidden))
        return self.head.logits(product.to(torch.promote_types(product.dtype, torch.float32)))


@torch.no_grad()
def _of_blocks(
    chunks: Iterable[torch.Tensor],
    targets: torch.Tensor,
    counted: torch.Tensor | None,
    shape: torch.Size,
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nats, correct) of each block (blocks,), float64 and int64, from logits of their tokens.

    chunks: (tokens, vocabulary) each, in the order of targets, which count: those at the places
    `counted` of all that blocks of `shape` (blocks, tokens) hold; None: all.
    """
    nats, correct, place = [], [], 0
    for logits in chunks:
        wanted = targets[place : place + len(logits)]
        logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
        nats.append(nn.functional.cross_entropy(logits, wanted, reduction="none"))
        correct.append(logits.argmax(-1) == wanted)
        place += len(logits)
    by_token = [torch.cat(nats).double(), torch.cat(correct).long()]
    if counted is not None:
        places = shape.numel()
        by_token = [one.new_zeros(places).index_copy(0, counted, one) for one in by_token]
    of_nats, of_correct = (one.view(shape).sum(1) for one in by_token)
    return of_nats, of_correct
