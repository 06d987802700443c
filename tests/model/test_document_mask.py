"""Documents in one block are read as if each were alone."""

from __future__ import annotations

import copy

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.document_mask import positions_in_documents
from p2p_llm_forge.model.loss import NextTokenLoss
from tests.conversations import begins_of, nats_by_hand, some_blocks, tokens_of, trained_of
from tests.model.families import FAMILIES, model_of

END = 3
FIRST, OTHER, SECOND = [5, 9, 20, 31, 8, 8], [40, 41, 7, 60, 61, 62], [11, 12, 50, 13, 9]


def test_positions_begin_again_after_the_end_of_a_document():
    inputs = torch.tensor([[7, 8, END, 9, END, END, 4], [END, 1, 2, 4, 5, 6, END]])
    assert positions_in_documents(inputs, END).tolist() == [
        [0, 1, 0, 1, 0, 0, 1],
        [0, 1, 2, 3, 4, 5, 0],
    ]


def logits_of(module, tokens):
    inputs = torch.tensor([tokens])
    mask = module.document_mask(inputs)
    return module.lm(input_ids=inputs, use_cache=False, **mask).logits[0]


@pytest.fixture(scope="module", params=FAMILIES)
def module(request):
    """A model of each family, masked."""
    return NextTokenLoss(model_of(request.param, **FAMILIES[request.param][0]), document_end=END)


def test_the_logits_of_a_document_do_not_change_with_its_neighbours(module):
    lm = module.eval().lm
    with torch.no_grad():
        alone = lm(input_ids=torch.tensor([[END, *SECOND]])).logits[0]
        place = slice(len(FIRST) + 1, len(FIRST) + 1 + len(alone))
        for neighbour in (FIRST, OTHER):
            packed = logits_of(module, [END, *neighbour, END, *SECOND, END, *neighbour])
            torch.testing.assert_close(packed[place], alone, rtol=1e-4, atol=1e-5)
        crossing = lm(input_ids=torch.tensor([[END, *FIRST, END, *SECOND]])).logits[0]
        assert not torch.allclose(crossing[place], alone, atol=1e-3), "else this shows nothing"
        shuffled = logits_of(module, [END, *FIRST, END, *SECOND[::-1]])
        assert not torch.allclose(shuffled[-1], alone[-1], atol=1e-3), "attention inside is kept"


@pytest.mark.parametrize("in_training", [True, False])
def test_a_masked_loss_is_the_sum_over_the_documents_alone(module, small_chunks, in_training):
    module.train(in_training)
    tokens = [END, *FIRST, END, *SECOND, END]
    nats, _ = module(torch.tensor([tokens[:-1]]), torch.tensor([tokens[1:]]))
    alone = sum(
        torch.nn.functional.cross_entropy(
            module.lm(input_ids=torch.tensor([[END, *part]]), use_cache=False).logits[0],
            torch.tensor([*part, END]),
            reduction="sum",
        )
        for part in (FIRST, SECOND)
    )
    assert nats.item() == pytest.approx(alone.item(), rel=1e-4)


def test_inputs_of_conversations_begin_one_place_after_the_targets_that_do():
    """Whatever ends their turns; what stands before the block is alone."""
    inputs = torch.tensor([[END, 7, END, 8, 9, 9, END]])
    begins = torch.tensor([[True, False, False, True, True, False, False]])
    assert positions_in_documents(inputs, END, begins).tolist() == [[0, 0, 1, 2, 0, 0, 1]]


@pytest.mark.parametrize("in_training", [True, False])
def test_masked_conversations_have_the_loss_and_gradient_of_each_alone(
    module, small_chunks, in_training
):
    """Against a loop over them in float64; their turns end as documents do."""
    module.train(in_training)
    length, end = 24, END
    blocks = some_blocks(3, length, 64, end, seed=5)
    assert max(map(len, blocks)) > 2
    assert any(token == end for block in blocks for turn in block for token, _ in turn[1:-1])
    tokens = torch.tensor([tokens_of(block) for block in blocks])
    targets = tokens.masked_fill(~torch.tensor([trained_of(block) for block in blocks]), -100)
    inputs = torch.cat([torch.full((3, 1), end), tokens[:, :-1]], 1)
    begins = torch.tensor([begins_of(block) for block in blocks])
    module.zero_grad()
    nats, _ = module(inputs, targets, begins)
    nats.backward()
    exact = copy.deepcopy(module.lm).double()
    exact.zero_grad()
    alone = [nats_by_hand(exact, block, end, alone=True)[0] for block in blocks]
    sum(alone).backward()
    assert nats.item() == pytest.approx(sum(alone).item(), rel=1e-5)
    got = dict(module.lm.named_parameters())
    assert got
    for name, parameter in exact.named_parameters():
        if parameter.grad is not None:
            torch.testing.assert_close(
                got[name].grad.double(), parameter.grad, rtol=1e-3, atol=1e-4, msg=name
            )
    of_blocks, _ = module(inputs, targets, begins, by_block=True)
    assert of_blocks.tolist() == pytest.approx([one.item() for one in alone], rel=1e-5)


def test_masked_conversations_have_the_loss_that_transformers_gives_packed_ones(small_chunks):
    """Whose trainers pack them with positions that begin again at 0."""
    module = NextTokenLoss(model_of("llama", **FAMILIES["llama"][0]), document_end=END)
    (block,) = some_blocks(1, 32, 64, END, seed=2)
    assert len(block) > 2
    tokens, trained = torch.tensor([tokens_of(block)]), torch.tensor([trained_of(block)])
    labels = tokens.masked_fill(~trained, -100)
    positions = torch.tensor([[place for one in block for place in range(len(one))]])
    expected = module.lm(input_ids=tokens, position_ids=positions, labels=labels, use_cache=False)
    inputs = torch.cat([torch.tensor([[END]]), tokens[:, :-1]], 1)
    nats, _ = module(inputs, labels, torch.tensor([begins_of(block)]))
    assert nats.item() / trained.sum().item() == pytest.approx(expected.loss.item(), rel=1e-5)


def test_a_base_in_half_the_digits_keeps_them_apart_by_the_same_mask(module):
    lm = copy.deepcopy(module.lm).bfloat16()
    by = NextTokenLoss(lm, document_end=END).document_mask
    assert by.func is module.document_mask.func and by.keywords == module.document_mask.keywords


def test_a_family_whose_state_runs_through_documents_is_refused():
    lm = model_of("mamba", hidden_size=32, num_hidden_layers=2, vocab_size=64, state_size=4)
    with pytest.raises(ForgeError) as error:
        NextTokenLoss(lm, document_end=END)
    (problem,) = error.value.problems
    assert "--document-mask: a mamba cannot keep attention inside" in problem.found
    with pytest.raises(ForgeError, match="its logits change with the document before"):
        NextTokenLoss(lm.bfloat16(), document_end=END)
    assert problem.fix.startswith("leave the flag out")
