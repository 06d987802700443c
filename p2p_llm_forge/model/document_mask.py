"""Attention, and short convolutions, that do not cross the end of a document."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.fit import in_trial
from p2p_llm_forge.model.short_convolution import keep_inside_documents

DocumentMask = Callable[..., dict[str, torch.Tensor]]


def starts_of_documents(
    inputs: torch.Tensor, document_end: int, begins: torch.Tensor | None = None
) -> torch.Tensor:
    """Which inputs are the first of a document, bool. inputs: (blocks, tokens) int64.

    The end of a document, as an input, is where the next one is predicted from: it begins that.
    begins: of conversations, in which that token may end every turn: whether the target at each
    place is the first of one. An input is the target before, so it begins one place later; what
    stands before a block of them is alone.
    """
    if begins is None:
        return inputs == document_end
    return torch.cat([torch.ones_like(begins[:, :1]), begins[:, :-1]], 1)


def positions_in_documents(
    inputs: torch.Tensor, document_end: int, begins: torch.Tensor | None = None
) -> torch.Tensor:
    """Each token's position in its document, int64; all as for `starts_of_documents`.

    A document that began in an earlier block begins again here.
    """
    positions = torch.arange(inputs.shape[1], device=inputs.device).expand_as(inputs)
    is_start = starts_of_documents(inputs, document_end, begins)
    return positions - torch.where(is_start, positions, 0).cummax(1).values


def documents_of(
    inputs: torch.Tensor, document_end: int, begins: torch.Tensor | None = None
) -> torch.Tensor:
    """The number of each token's document in its block, int64; all as for `starts_of_documents`."""
    return starts_of_documents(inputs, document_end, begins).cumsum(1)


def by_positions(
    inputs: torch.Tensor, document_end: int, begins: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """For families that read from the positions which tokens belong together (transformers 5)."""
    return {"position_ids": positions_in_documents(inputs, document_end, begins)}


def by_scores(
    inputs: torch.Tensor, document_end: int, begins: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """For others that take a mask: added to the attention scores, (blocks, 1, tokens, tokens)."""
    document = documents_of(inputs, document_end, begins)
    allowed = (document.unsqueeze(2) == document.unsqueeze(1)).tril().unsqueeze(1)
    mask = torch.zeros(allowed.shape, device=inputs.device)
    mask.masked_fill_(~allowed, torch.finfo(mask.dtype).min)
    return {"attention_mask": mask, **by_positions(inputs, document_end, begins)}


def by_documents(
    inputs: torch.Tensor, document_end: int, begins: torch.Tensor | None = None
) -> dict[str, torch.Tensor]:
    """For families with short convolutions, too, by their name for it."""
    documents = documents_of(inputs, document_end, begins)
    return {"seq_idx": documents, **by_positions(inputs, document_end, begins)}


def document_mask_for(lm: Any, document_end: int) -> DocumentMask:
    """What this model's forward needs besides its inputs to keep attention inside documents.

    A function of the inputs, and of what begins in blocks of conversations, that returns more
    arguments of the forward. Found by trial, on two short documents: the logits of the second must
    be those that it has alone. Raises ForgeError for a model that cannot.
    """
    vocabulary = range(min(lm.get_input_embeddings().num_embeddings, 32))
    tokens = [token for token in vocabulary if token != document_end]
    first, second = tokens[:9], tokens[9:14]
    if len(second) < 2:  # a tiny vocabulary
        first, second = tokens[:1] * 9, tokens[:1] * 5
    end, device = [document_end], next(lm.parameters()).device
    packed = torch.tensor([end + first + end + second], device=device)
    other = torch.tensor([end + first[::-1] + end + second], device=device)
    place = slice(len(first) + 1, None)
    masks = [by_positions, by_scores, *[by_documents] * keep_inside_documents(lm)]
    with in_trial(lm):
        alone = lm(input_ids=packed[:, place], use_cache=False).logits
        # Half the digits (--base-dtype bfloat16) round what is alone otherwise than what is not.
        is_rounded = torch.finfo(alone.dtype).eps > 1e-4
        loose = 0.1 * float(alone.abs().max()) if is_rounded else 1e-4
        for mask in masks:
            try:
                logits, beside = (
                    lm(input_ids=ids, use_cache=False, **mask(ids, document_end)).logits[:, place]
                    for ids in ((packed, other) if is_rounded else (packed, packed))
                )
            except (TypeError, ValueError, RuntimeError):
                continue
            is_alike = torch.allclose(logits, alone, rtol=1e-3, atol=loose)
            if is_alike and torch.allclose(logits, beside, rtol=1e-3, atol=1e-4):
                return functools.partial(mask, document_end=document_end)
    raise ForgeError(
        f"--document-mask: a {lm.config.model_type} cannot keep attention inside documents (its"
        " logits change with the document before)",
        "leave the flag out, or train another family",
    )
