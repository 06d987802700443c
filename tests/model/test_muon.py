"""Muon's steps are those of an SVD and a plain loop in float64, and of torch's own optimizers."""

from __future__ import annotations

import threading
import time

import pytest
import torch
from torch.optim._muon import _zeropower_via_newtonschulz

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model import muon
from p2p_llm_forge.model.optimizer import build_optimizer
from tests.model.families import FAMILIES, LLAMA, model_of

SHAPES = [(24, 24), (16, 40), (1, 8)]
EXPERTS = {**LLAMA, "num_local_experts": 3, "num_experts_per_tok": 2, "head_dim": 16}


def after_svd(matrix: torch.Tensor) -> torch.Tensor:
    """The five iterations on singular values alone, in float64: the polynomial, five times."""
    left, values, right = torch.linalg.svd(matrix.double(), full_matrices=False)
    values = values / values.norm()
    for _ in range(5):
        values = 3.4445 * values - 4.7750 * values**3 + 2.0315 * values**5
    return left @ torch.diag(values) @ right


@pytest.mark.parametrize("shape", SHAPES)
def test_singular_values_are_what_the_published_polynomial_makes_of_them(shape):
    torch.manual_seed(0)
    stack = torch.randn(3, *shape)
    ours = muon.orthogonalised(stack, torch.float32)
    for matrix, got in zip(stack, ours, strict=True):
        torch.testing.assert_close(got.double(), after_svd(matrix), rtol=0, atol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_singular_values_end_in_the_published_band(dtype):
    """From two hundredths of the norm on: 0.5 to 1.5 says its author, of bfloat16."""
    torch.manual_seed(0)
    left, right = (torch.linalg.qr(torch.randn(20, 20))[0] for _ in range(2))
    values = torch.linspace(1, 12, 20)
    assert (values / values.norm()).min() > 0.02
    got = muon.orthogonalised((left @ torch.diag(values) @ right).unsqueeze(0), dtype)[0]
    assert got.dtype is dtype
    of_got = torch.linalg.svdvals(got.float())
    assert of_got.min() > 0.5 and of_got.max() < 1.5
    assert torch.cosine_similarity(got.float().flatten(), (left @ right).flatten(), 0) > 0.97


def test_bfloat16_is_that_of_torch():
    torch.manual_seed(0)
    stack = torch.randn(2, 32, 96)
    for matrix, got in zip(stack, muon.orthogonalised(stack, torch.bfloat16), strict=True):
        theirs = _zeropower_via_newtonschulz(matrix, muon.COEFFICIENTS, 5, 1e-7).float()
        assert (got.float() - theirs).norm() < 0.03 * theirs.norm()


def test_a_matrix_of_zeros_and_one_of_tiny_numbers_stay_finite():
    stack = torch.stack([torch.zeros(4, 6), torch.full((4, 6), 1e-30)])
    assert muon.orthogonalised(stack, torch.float32).isfinite().all()


def in_layers(*parameters: torch.Tensor) -> torch.nn.Module:
    """A model whose only layer has these weights, (rows, columns) each."""
    layer = torch.nn.Module()
    for number, weight in enumerate(parameters):
        linear = torch.nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        linear.weight = torch.nn.Parameter(weight.clone())
        layer.add_module(f"linear_{number}", linear)
    model = torch.nn.Module()
    model.layers = torch.nn.ModuleList([layer])
    return model


def take_steps(optimizer, parameters, gradients) -> None:
    for of_step in gradients:
        for parameter, gradient in zip(parameters, of_step, strict=True):
            parameter.grad = gradient.clone()
        optimizer.step()
        optimizer.zero_grad()


@pytest.fixture
def weights() -> list[torch.Tensor]:
    torch.manual_seed(1)
    return [torch.randn(16, 40), torch.randn(40, 16), torch.randn(24, 24), torch.randn(16, 40)]


@pytest.fixture
def gradients(weights) -> list[list[torch.Tensor]]:
    return [[torch.randn_like(weight) for weight in weights] for _ in range(3)]


def test_updates_are_those_of_a_plain_loop_in_float64(weights, gradients):
    model = in_layers(*weights)
    config = TrainConfig(optimizer="muon", learning_rate=0.02, weight_decay=0.3)
    take_steps(build_optimizer(config, model), list(model.parameters()), gradients)
    for number, (weight, got) in enumerate(zip(weights, model.parameters(), strict=True)):
        expected, momentum = weight.double(), 0.0
        for of_step in gradients:
            gradient = of_step[number].double()
            momentum = 0.95 * momentum + 0.05 * gradient
            direction = after_svd(0.05 * gradient + 0.95 * momentum)
            expected = expected - 0.02 * 0.3 * expected
            expected = expected - 0.02 * 0.2 * max(weight.shape) ** 0.5 * direction
        torch.testing.assert_close(got.double(), expected, rtol=0, atol=2e-5)
        assert (expected - weight).abs().max() > 0.01, "it has moved"


def test_updates_in_bfloat16_are_those_of_torch(weights, gradients):
    model = in_layers(*weights)
    ours = build_optimizer(TrainConfig(optimizer="muon", learning_rate=0.02), model)
    assert isinstance(ours, muon.Muon)
    ours.dtype = torch.bfloat16
    take_steps(ours, list(model.parameters()), gradients)
    own = [torch.nn.Parameter(weight.clone()) for weight in weights]
    settings = {"weight_decay": 0.1, "adjust_lr_fn": "match_rms_adamw"}
    take_steps(torch.optim.Muon(own, lr=0.02, **settings), own, gradients)
    for before, got, expected in zip(weights, model.parameters(), own, strict=True):
        assert (got - expected).norm() < 0.03 * (expected - before).norm()


def test_everything_else_takes_the_steps_of_adamw():
    torch.manual_seed(0)
    sizes, _ = FAMILIES["gpt2"]
    ours, theirs = model_of("gpt2", **sizes), model_of("gpt2", **sizes)
    left = [n for n, p in ours.named_parameters() if p.dim() < 2 or n.endswith("e.weight")]
    assert {"transformer.wte.weight", "transformer.h.1.ln_1.weight"} <= {*left}
    optimizers = [
        build_optimizer(TrainConfig(optimizer=name, learning_rate=1e-3, weight_decay=0.2), lm)
        for name, lm in (("muon", ours), ("adamw", theirs))
    ]
    for _ in range(3):
        draws = {name: torch.randn_like(p) for name, p in ours.named_parameters()}
        for optimizer, lm in zip(optimizers, (ours, theirs), strict=True):
            for name, parameter in lm.named_parameters():
                parameter.grad = draws[name].clone()
            optimizer.step()
    both = dict(ours.named_parameters()), dict(theirs.named_parameters())
    assert all(torch.equal(both[0][name], both[1][name]) for name in left)
    assert all(
        not torch.equal(both[0][name], both[1][name]) for name in both[0] if name not in left
    )


# --- which parameters -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("family", "sizes", "of_a_layer"),
    [
        ("gpt2", FAMILIES["gpt2"][0], "attn.c_attn attn.c_proj mlp.c_fc mlp.c_proj"),
        *(
            (
                "llama",
                {**LLAMA, "tie_word_embeddings": is_tied},
                "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
                " mlp.gate_proj mlp.up_proj mlp.down_proj",
            )
            for is_tied in (False, True)
        ),
        (
            "mixtral",
            EXPERTS,
            "self_attn.q_proj self_attn.k_proj self_attn.v_proj self_attn.o_proj"
            " mlp.experts.gate_up_proj mlp.experts.down_proj",
        ),
    ],
)
def test_muon_takes_the_matrices_inside_layers_only(family, sizes, of_a_layer):
    lm = model_of(family, **sizes)
    taken = {id(parameter) for parameter in muon.matrices_inside_layers(lm)}
    names = {name for name, p in lm.named_parameters() if id(p) in taken}
    stack = "transformer.h" if family == "gpt2" else "model.layers"
    assert {name.removesuffix(".weight") for name in names} == {
        f"{stack}.{layer}.{one}" for layer in (0, 1) for one in of_a_layer.split()
    }
    optimizer = build_optimizer(TrainConfig(optimizer="muon"), lm)
    held = [id(p) for group in optimizer.param_groups for p in group["params"]]
    assert sorted(held) == sorted(id(p) for p in lm.parameters()), "each once"


def test_frozen_matrices_are_left_out():
    lm = model_of("llama", **LLAMA)
    frozen = lm.model.layers[0].mlp.up_proj.weight.requires_grad_(False)
    assert all(one is not frozen for one in muon.matrices_inside_layers(lm))
    optimizer = build_optimizer(TrainConfig(optimizer="muon"), lm)
    assert all(p is not frozen for group in optimizer.param_groups for p in group["params"])


def test_tables_and_kernels_are_no_matrices():
    """Mamba's states are a table, and its convolution's kernels are vectors."""
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "vocab_size": 64, "state_size": 4}
    lm = model_of("mamba", **sizes)
    taken = {id(parameter) for parameter in muon.matrices_inside_layers(lm)}
    names = {n.split(".mixer.")[1] for n, p in lm.named_parameters() if id(p) in taken}
    assert names == {f"{one}.weight" for one in ("in_proj", "x_proj", "dt_proj", "out_proj")}


def test_each_expert_is_a_matrix_of_its_own():
    torch.manual_seed(0)
    lm = model_of("mixtral", **EXPERTS)
    experts = lm.model.layers[0].mlp.experts.down_proj
    before, gradient = experts.detach().clone(), torch.randn_like(experts)
    config = TrainConfig(optimizer="muon", learning_rate=0.1, weight_decay=0.0)
    experts.grad = gradient
    build_optimizer(config, lm).step()
    assert len(before) == 3
    for number, matrix in enumerate(before):
        moved = (matrix - experts[number]).double()
        expected = 0.1 * 0.2 * max(matrix.shape) ** 0.5 * after_svd(gradient[number])
        torch.testing.assert_close(moved, expected, rtol=0, atol=1e-5)


def test_a_model_without_matrices_inside_layers_is_refused():
    lm = model_of("llama", **LLAMA)
    lm.model.layers.requires_grad_(False)
    with pytest.raises(ForgeError, match="muon is for matrices inside layers") as error:
        build_optimizer(TrainConfig(optimizer="muon"), lm)
    assert error.value.problems[0].fix == "use --optimizer adamw"
    build_optimizer(TrainConfig(optimizer="adamw"), lm).step()


# --- ranks that share the work --------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 7])
def test_every_job_has_one_rank_and_none_has_much_more_than_another(ranks):
    costs = [8, 1, 5, 5, 1, 9, 3, 3, 4, 6]
    jobs = muon.divided(costs, ranks)
    assert sorted(job for of_rank in jobs for job in of_rank) == list(range(len(costs)))
    spent = [sum(costs[job] for job in of_rank) for of_rank in jobs]
    assert max(spent) - min(spent) <= max(costs)
    assert muon.divided([2, 2, 2, 3, 3], 2) == [[0, 2, 3], [1, 4]], "the dearest first"


class Meeting:
    """What ranks in threads gather through."""

    def __init__(self, size: int) -> None:
        self.rows: list[torch.Tensor] = [torch.empty(0)] * size
        self._barrier = threading.Barrier(size)

    def team(self, number: int) -> muon.Team:
        def all_gather(row: torch.Tensor) -> torch.Tensor:
            self.rows[number] = row.clone()
            self._barrier.wait(60)
            gathered = torch.stack(self.rows)
            self._barrier.wait(60)
            return gathered

        return muon.Team(number, len(self.rows), all_gather)


@pytest.mark.parametrize("ranks", [2, 3, 5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_team_takes_the_steps_of_one_with_the_same_bits_on_all(weights, gradients, ranks, dtype):
    """(With five ranks one has nothing to do.)"""

    def trained(team: muon.Team) -> list[torch.Tensor]:
        model = in_layers(*weights)
        optimizer = build_optimizer(TrainConfig(optimizer="muon", learning_rate=0.02), model)
        optimizer.dtype, optimizer.team = dtype, team
        take_steps(optimizer, list(model.parameters()), gradients)
        return [parameter.detach() for parameter in model.parameters()]

    meeting, by_rank = Meeting(ranks), {}

    def rank(number: int) -> None:
        by_rank[number] = trained(meeting.team(number))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(ranks)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(by_rank) == ranks
    alone = trained(muon.ALONE)
    for of_rank in by_rank.values():
        for got, first, expected in zip(of_rank, by_rank[0], alone, strict=True):
            assert torch.equal(got, first)
            tolerance = 1e-5 if dtype is torch.float32 else 2e-3
            torch.testing.assert_close(got, expected, rtol=0, atol=tolerance)


# --- in which dtype -------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("float32_s", "bfloat16_s", "expected"),
    [(2.2, 1.0, True), (1.1, 1.0, False), (1.0, 1.0, False), (1.0, 3.0, False)],
)
def test_bfloat16_is_preferred_where_it_was_measured_to_be_faster(
    monkeypatch, float32_s, bfloat16_s, expected
):
    durations = [float32_s, bfloat16_s, 9.0 * float32_s, 9.0 * bfloat16_s] * 100
    now = [0.0]
    readings = []
    for duration in durations:
        readings += [now[0], now[0] + duration]
        now[0] += duration + 1
    monkeypatch.setattr(time, "thread_time", iter(readings).__next__)
    threads = torch.get_num_threads()
    assert muon.prefers_bfloat16(torch.device("cpu")) is expected
    assert torch.get_num_threads() == threads
