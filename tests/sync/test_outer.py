"""The outer step is torch's SGD and a float64 loop; fragments are even and each has its turn."""

from __future__ import annotations

from fractions import Fraction
from itertools import combinations, pairwise, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.sync.outer import (
    fragment_due,
    fragments_of,
    outer_settings,
    outer_step,
    settings_of_rounds,
    units_of,
)

SETTINGS = [(1.0, 0.0), (0.7, 0.0), (0.7, 0.9), (1.0, 0.5), (0.3, 0.99)]


def random_rounds(rounds: int, count: int = 1000) -> tuple[torch.Tensor, list[torch.Tensor]]:
    numbers = torch.Generator().manual_seed(rounds)
    gradients = [torch.randn(count, generator=numbers) * 1e-3 for _ in range(rounds)]
    return torch.randn(count, generator=numbers), gradients


@pytest.mark.parametrize(("lr", "momentum"), SETTINGS)
def test_rounds_are_those_of_a_float64_loop(lr, momentum):
    anchor, gradients = random_rounds(12, count=50)
    wanted, buffer_wanted = anchor.tolist(), [0.0] * 50
    buffer = None
    for gradient in gradients:
        anchor, buffer = outer_step(anchor, gradient, buffer, lr, momentum)
        for place, value in enumerate(gradient.tolist()):
            buffer_wanted[place] = momentum * buffer_wanted[place] + value
            wanted[place] -= lr * (value + momentum * buffer_wanted[place])
    torch.testing.assert_close(
        anchor.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )
    assert anchor.dtype == torch.float32
    if momentum:
        assert buffer is not None
        torch.testing.assert_close(
            buffer.double(), torch.tensor(buffer_wanted, dtype=torch.float64), rtol=1e-5, atol=1e-8
        )


@pytest.mark.parametrize(("lr", "momentum"), SETTINGS)
def test_rounds_are_those_of_torch_bit_for_bit(lr, momentum):
    anchor, gradients = random_rounds(10)
    weights = torch.nn.Parameter(anchor.clone())
    sgd = torch.optim.SGD([weights], lr=lr, momentum=momentum, nesterov=momentum > 0, foreach=False)
    buffer = None
    for gradient in gradients:
        anchor, buffer = outer_step(anchor, gradient, buffer, lr, momentum)
        weights.grad = gradient
        sgd.step()
        assert torch.equal(anchor, weights.detach())
    if momentum:
        assert torch.equal(buffer, sgd.state[weights]["momentum_buffer"])


def test_rate_1_without_momentum_is_plain_averaging_bit_for_bit():
    anchor, (gradient,) = random_rounds(1)
    averaged, buffer = outer_step(anchor, gradient, None, 1.0, 0.0)
    assert torch.equal(averaged, anchor - gradient)
    assert buffer is None


def test_more_ranks_take_a_higher_outer_rate_by_the_root_of_their_number():
    rates = {ranks: settings_of_rounds(None, None, ranks, 20)[0] for ranks in range(1, 20)}
    assert rates[2] == 0.5
    assert all(rates[4 * n] == pytest.approx(2 * rates[n]) for n in (1, 2))
    assert all(rate == 1 for ranks, rate in rates.items() if ranks >= 8)


def test_rounds_of_20_updates_and_more_have_momentum_and_shorter_ones_less():
    assert {settings_of_rounds(None, None, 2, every) for every in (20, 50, 500)} == {(0.5, 0.8)}
    by_length = [settings_of_rounds(None, None, 2, every) for every in range(1, 21)]
    assert all(1 > a[0] > b[0] and 0 < a[1] < b[1] for a, b in pairwise(by_length))
    gains = [lr / (1 - momentum) for lr, momentum in by_length]
    assert 1 < gains[0] < 1.25 and 1.3 < gains[4] < 1.5, "the best of a sweep at 5: 1.4"
    assert all(settings_of_rounds(None, 0.0, 8, every) == (1.0, 0.0) for every in (1, 5, 20))


def test_with_muon_momentum_is_less_and_the_rate_not():
    assert settings_of_rounds(None, None, 2, 20, "muon") == (0.6, 0.6)
    assert settings_of_rounds(None, None, 4, 20, "muon") == pytest.approx((0.75, 0.65))
    assert settings_of_rounds(None, None, 10**6, 20, "muon") == pytest.approx((1.0, 0.8))
    for ranks, every in product((2, 3, 4, 8), (1, 5, 10, 20, 50)):
        lr, momentum = settings_of_rounds(None, None, ranks, every)
        other_lr, other_momentum = settings_of_rounds(None, None, ranks, every, "muon")
        assert other_lr >= lr and other_momentum <= momentum
        assert (other_lr, other_momentum) == (lr, momentum) or every > 5
        assert other_lr <= 1 and other_lr / (1 - other_momentum) <= lr / (1 - momentum) + 1e-9
        assert settings_of_rounds(0.7, 0.9, ranks, every, "muon") == (0.7, 0.9)


def test_settings_that_are_asked_for_stay_whatever_the_rounds():
    for ranks, every in product((1, 2, 9), (1, 5, 100)):
        assert settings_of_rounds(0.7, 0.9, ranks, every) == (0.7, 0.9)
        usual = settings_of_rounds(None, None, ranks, every)
        assert settings_of_rounds(0.7, None, ranks, every) == (0.7, usual[1])
        assert settings_of_rounds(None, 0.9, ranks, every) == (usual[0], 0.9)


@pytest.mark.parametrize(("lr", "momentum"), SETTINGS)
@pytest.mark.parametrize("warmup", [0, 1, 4, 20])
def test_outer_settings_go_evenly_from_plain_averaging_to_those_asked_for(lr, momentum, warmup):
    path = [outer_settings(rounds, lr, momentum, warmup) for rounds in range(warmup + 3)]
    assert path[warmup:] == [(lr, momentum)] * 3
    if warmup:
        assert path[0] == (1.0, 0.0)
    for rounds, settings_then in enumerate(path[:warmup]):
        progress = Fraction(rounds, warmup)
        wanted = (1 - progress + progress * Fraction(lr), progress * Fraction(momentum))
        assert settings_then == pytest.approx([float(number) for number in wanted], abs=1e-15)


def test_plain_averaging_stays_plain_averaging_while_it_warms_up():
    assert {outer_settings(rounds, 1.0, 0.0, 7) for rounds in range(9)} == {(1.0, 0.0)}


def test_rounds_that_warm_up_are_those_of_a_float64_loop():
    anchor, gradients = random_rounds(12, count=50)
    wanted, buffer_wanted = anchor.tolist(), [0.0] * 50
    buffer = None
    for rounds, gradient in enumerate(gradients):
        anchor, buffer = outer_step(anchor, gradient, buffer, *outer_settings(rounds, 0.5, 0.8, 8))
        progress = min(1.0, rounds / 8)
        lr, momentum = (1 - progress) + progress * 0.5, progress * 0.8
        for place, value in enumerate(gradient.tolist()):
            # The first round has no momentum, and leaves no buffer.
            buffer_wanted[place] = momentum * buffer_wanted[place] + value if rounds else 0.0
            wanted[place] -= lr * (value + momentum * buffer_wanted[place])
    torch.testing.assert_close(
        anchor.double(), torch.tensor(wanted, dtype=torch.float64), rtol=1e-6, atol=1e-6
    )


@pytest.mark.parametrize(("lr", "momentum"), SETTINGS)
@pytest.mark.parametrize("is_first", [True, False])
def test_a_step_leaves_its_inputs_as_they_are(lr, momentum, is_first):
    anchor, (gradient, buffer) = random_rounds(2)
    inputs = [anchor, gradient, None if is_first else buffer]
    copies = [None if tensor is None else tensor.clone() for tensor in inputs]
    results = outer_step(*inputs, lr, momentum)
    for tensor, copy in zip(inputs, copies, strict=True):
        assert tensor is None or torch.equal(tensor, copy)
    places = {t.untyped_storage().data_ptr() for t in [*inputs, *results] if t is not None}
    assert len(places) == sum(t is not None for t in [*inputs, *results]), "memory is shared"


@settings(max_examples=200, deadline=None)
@given(sizes=st.lists(st.integers(0, 50), min_size=1, max_size=9), data=st.data())
def test_no_division_has_a_smaller_largest_fragment(sizes, data):
    count = data.draw(st.integers(1, len(sizes)))
    fragments = fragments_of(sizes, count)
    assert [unit for fragment in fragments for unit in fragment] == list(range(len(sizes)))
    assert len(fragments) == count and all(fragments)
    largest = max(sum(sizes[unit] for unit in fragment) for fragment in fragments)
    for cuts in combinations(range(1, len(sizes)), count - 1):
        ends = [0, *cuts, len(sizes)]
        parts = [sum(sizes[a:b]) for a, b in zip(ends, ends[1:], strict=False)]
        assert largest <= max(parts)


def test_fragments_of_a_small_gpt2():
    layer, embedding = 1_774_464, 8192 * 384 + 1024 * 384
    assert fragments_of([embedding, *[layer] * 6, 768], 4) == [[0], [1, 2], [3, 4], [5, 6, 7]]
    assert fragments_of([10, 1, 1, 1, 1], 3) == [[0], [1, 2], [3, 4]], "even among equals"
    assert fragments_of([5, 5], 1) == [[0, 1]]


@pytest.mark.parametrize("count", [0, 3])
def test_fragments_that_would_be_empty_are_refused(count):
    with pytest.raises(ForgeError, match="this model has 2 parts"):
        fragments_of([1, 2], count)


@pytest.mark.parametrize(("every", "fragments"), [(1, 1), (20, 1), (100, 4), (10, 3), (3, 3)])
def test_each_fragment_has_one_turn_in_a_round(every, fragments):
    turns = [
        (done, p) for done in range(1, 3 * every + 1) for p in fragment_due(done, every, fragments)
    ]
    for p in range(fragments):
        own = [done for done, fragment in turns if fragment == p]
        assert len(own) == 3 and own[1] - own[0] == own[2] - own[1] == every
    assert turns[-1] == (3 * every, fragments - 1), "the last one ends the round"
    per_update = [len(fragment_due(done, every, fragments)) for done in range(1, every + 1)]
    assert max(per_update) == 1, "never two at once"


def test_turns_are_spread_evenly():
    assert {done: fragment_due(done, 100, 4) for done in (25, 50, 75, 100)} == {
        25: [0],
        50: [1],
        75: [2],
        100: [3],
    }
    assert fragment_due(1, 20, 1) == [] and fragment_due(40, 20, 1) == [0]
    assert sorted(fragment_due(1, 1, 3)) == [0, 1, 2], "more fragments than updates: together"


def test_units_are_the_layers_also_where_a_layer_holds_more_experts_than_there_are_layers():
    class Layer(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(8))

    class Mixture(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.embedding = torch.nn.Embedding(5, 2)
            self.layers = torch.nn.ModuleList(Layer() for _ in range(3))
            self.head = torch.nn.Linear(2, 5)

    sizes = [sum(p.numel() for _, p in unit) for unit in units_of(Mixture())]
    assert sizes == [10, 48, 48, 48, 15]


def test_what_is_not_trained_is_in_no_unit():
    lm = torch.nn.Module()
    lm.embedding = torch.nn.Embedding(5, 2).requires_grad_(False)
    lm.layers = torch.nn.ModuleList(torch.nn.Linear(2, 2) for _ in range(3))
    lm.layers[1].weight.requires_grad_(False)
    inside = [[name for name, _ in unit] for unit in units_of(lm)]
    assert inside == [
        ["layers.0.weight", "layers.0.bias"],
        ["layers.1.bias"],
        ["layers.2.weight", "layers.2.bias"],
    ]
