"""The sweep's batched models train as transformers' GPT-2 and torch's optimizers do one by one."""

from __future__ import annotations

import copy
import sys
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F

from benchmarks.diloco_sweep import ARMS, Arm, Rounds, Run, TopK, main, train
from benchmarks.side_by_side import Sizes, losses, orthogonalized
from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.data.order import blocks_at
from p2p_llm_forge.model.optimizer import build_optimizer, learning_rate_factor

SIZES = Sizes(layers=2, heads=2, width=16, vocabulary=300, length=32)
RUN = Run(Arm(), 0.01, seed=1, every=2, rounds=3, peers=2, batch_size=4, sizes=SIZES, text="")


@pytest.fixture(scope="module")
def blocks(prepared):
    return open_prepared(prepared).train_blocks()


def gpt2_of(weights: torch.Tensor) -> torch.nn.Module:
    """One machine's weights (parameters) as transformers' model."""
    from transformers import GPT2Config, GPT2LMHeadModel

    model = GPT2LMHeadModel(
        GPT2Config(
            n_layer=SIZES.layers,
            n_head=SIZES.heads,
            n_embd=SIZES.width,
            vocab_size=SIZES.vocabulary,
            n_positions=SIZES.length,
            resid_pdrop=0.0,
            embd_pdrop=0.0,
            attn_pdrop=0.0,
        )
    )
    parts = {name: part[0] for name, part in SIZES.parts(weights[None]).items()}
    model.transformer.load_state_dict(parts)
    return model


def flat(model: torch.nn.Module, of_gradients: bool = False) -> torch.Tensor:
    named = dict(model.transformer.named_parameters())
    parts = [named[name].grad if of_gradients else named[name].detach() for name in SIZES.shapes()]
    return torch.cat([part.flatten() for part in parts])


def loss_of(model: torch.nn.Module, blocks, numbers: list[int]) -> torch.Tensor:
    inputs, targets = map(torch.from_numpy, blocks.inputs_and_targets(numbers))
    return F.cross_entropy(model(input_ids=inputs).logits.flatten(0, 1), targets.flatten())


def updates_alone(model, optimizer, blocks, run: Run, rank: slice, steps: range) -> None:
    """Updates as any loop takes them. rank: the share of the batch's blocks."""
    total = run.rounds * run.every
    factor = learning_rate_factor(TrainConfig(warmup_steps=total // 20, max_steps=total), total)
    for step in steps:
        numbers = blocks_at(step * run.batch_size, run.batch_size, len(blocks), run.seed)[rank]
        for group in optimizer.param_groups:
            group["lr"] = run.learning_rate * factor(step)
        optimizer.zero_grad()
        loss_of(model, blocks, numbers).backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()


def test_each_machine_has_the_loss_and_gradient_of_gpt2_alone(blocks):
    weights = torch.cat([SIZES.initial(seed) for seed in range(3)])
    weights += 0.02 * torch.randn(weights.shape, generator=torch.Generator().manual_seed(0))
    numbers = [[0, 1], [2, 3], [4, 5]]
    inputs, targets = (
        torch.stack([torch.from_numpy(blocks.inputs_and_targets(own)[kind]) for own in numbers])
        for kind in (0, 1)
    )
    weights.requires_grad_()
    found = losses(weights, inputs, targets, SIZES)
    (gradient,) = torch.autograd.grad(found.sum(), weights)
    for machine, own in enumerate(numbers):
        model = gpt2_of(weights[machine].detach())
        wanted = loss_of(model, blocks, own)
        wanted.backward()
        torch.testing.assert_close(found[machine], wanted)
        torch.testing.assert_close(
            gradient[machine], flat(model, of_gradients=True), atol=1e-6, rtol=1e-4
        )


def test_ddp_takes_the_updates_of_one_model_with_the_whole_batch(blocks):
    run = replace(RUN, arm=ARMS["ddp"])
    start = SIZES.initial(run.seed)[0]
    model = gpt2_of(start)
    config = TrainConfig(learning_rate=run.learning_rate)
    updates_alone(model, build_optimizer(config, model), blocks, run, slice(None), range(6))
    beside = replace(run, arm=Arm(), learning_rate=0.03)
    trained = train([beside, run], blocks)
    assert (trained[1] - start).abs().max() > 0.01
    torch.testing.assert_close(trained[1], flat(model), atol=2e-5, rtol=0)


@pytest.mark.parametrize("arm", [Arm(), Arm(averages_moments=1), Arm(ddp_rounds=2)])
def test_plain_averaging_is_the_mean_of_models_that_train_alone(blocks, arm):
    models = [gpt2_of(SIZES.initial(RUN.seed)[0])]
    models.append(copy.deepcopy(models[0]))
    config = TrainConfig(learning_rate=RUN.learning_rate)
    optimizers = [build_optimizer(config, model) for model in models]
    for first in range(0, 6, 2):
        for rank, (model, optimizer) in enumerate(zip(models, optimizers, strict=True)):
            share = slice(2 * rank, 2 * rank + 2) if first >= 2 * arm.ddp_rounds else slice(None)
            updates_alone(model, optimizer, blocks, RUN, share, range(first, first + 2))
        with torch.no_grad():
            for one, other in zip(*(model.parameters() for model in models), strict=True):
                means(one, other)
                if arm.averages_moments:
                    ours, theirs = optimizers[0].state[one], optimizers[1].state[other]
                    means(ours["exp_avg"], theirs["exp_avg"])
                    means(ours["exp_avg_sq"], theirs["exp_avg_sq"])
    trained = train([replace(RUN, arm=arm)], blocks)[0]
    torch.testing.assert_close(trained, flat(models[0]), atol=2e-5, rtol=0)


def means(one: torch.Tensor, other: torch.Tensor) -> None:
    one.copy_((one + other) / 2)
    other.copy_(one)


def test_singular_values_are_brought_near_one():
    matrices = torch.randn(3, 24, 16, generator=torch.Generator().manual_seed(0))
    values = torch.linalg.svdvals(orthogonalized(matrices))
    assert values.min() > 0.6 and values.max() < 1.3


def test_muon_takes_the_updates_of_torch_muon(blocks):
    run = replace(RUN, arm=Arm(sync="ddp", inner="muon"))
    model = gpt2_of(SIZES.initial(run.seed)[0])
    config = TrainConfig(learning_rate=run.learning_rate)
    named = list(model.transformer.named_parameters())
    hidden = [p for name, p in named if name.startswith("h.") and p.dim() == 2]
    muon = torch.optim.Muon(hidden, momentum=0.95, weight_decay=0.1, adjust_lr_fn="match_rms_adamw")
    adamw = build_optimizer(config, model)
    for group in adamw.param_groups:
        group["params"] = [p for p in group["params"] if all(p is not other for other in hidden)]
    both = Both(adamw, muon)
    updates_alone(model, both, blocks, run, slice(None), range(6))
    # torch iterates in bfloat16.
    difference = (train([run], blocks)[0] - flat(model)).norm()
    assert difference < 0.03 * (flat(model) - SIZES.initial(run.seed)[0]).norm()


class Both:
    """Two optimizers as one."""

    def __init__(self, *optimizers: torch.optim.Optimizer) -> None:
        self._optimizers = optimizers
        self.param_groups = [group for one in optimizers for group in one.param_groups]

    def zero_grad(self) -> None:
        for optimizer in self._optimizers:
            optimizer.zero_grad()

    def step(self) -> None:
        for optimizer in self._optimizers:
            optimizer.step()


def test_of_each_chunk_the_largest_values_arrive_and_the_rest_waits():
    gradients = torch.randn(2, 5000, generator=torch.Generator().manual_seed(0))
    rounds = Rounds(Arm(compress="top0.25"), rounds=10, anchor=torch.zeros(5000))
    weights = -gradients
    rounds.end_round(weights)
    sent = []
    for gradient in gradients:
        arriving = torch.zeros(5000)
        for chunk in (slice(0, 4096), slice(4096, 5000)):
            largest = gradient[chunk].abs().argsort(descending=True)[:1024]
            arriving[chunk][largest] = gradient[chunk][largest]
        sent.append(arriving)
    expected = -torch.stack(sent).mean(0)
    assert 0 < (expected == 0).sum() < 5000
    torch.testing.assert_close(weights, expected.expand(2, -1))
    for _ in range(9):  # nobody trains any more: residuals are sent
        rounds.end_round(weights)
    torch.testing.assert_close(weights[0], -gradients.mean(0))


def test_what_is_not_finite_is_sent():
    values = torch.ones(4096)
    values[7] = torch.nan
    codec = TopK(0.05)
    assert codec.decode(codec.encode(values)).isnan().sum() == 1


def test_momentum_grows_and_fades():
    arm = Arm(outer_lr=0.5, outer_momentum=0.5, warmup_rounds=2, fade_rounds=1)
    rounds = Rounds(arm, rounds=4, anchor=torch.zeros(1))
    found = []
    for _ in range(4):
        weights = rounds._anchor - torch.ones(2, 1)  # each round changes it by 1
        rounds.end_round(weights)
        found.append(weights[0].item())
    # By hand: rate and momentum are (1, 0), (0.75, 0.25), (0.5, 0.5), and (1, 0) again.
    expected, place = [], 0.0
    for step in (1, 0.75 * 1.25, 0.5 * (1 + 0.5 * 1.5), 1):
        place -= step
        expected.append(place)
    assert found == pytest.approx(expected)


def test_a_call_goes_on_where_another_ended_and_prints_the_table(
    text_file, tmp_path, monkeypatch, capsys
):
    words = [
        *("diloco_sweep.py", f"--text={text_file}", f"--results={tmp_path / 'sweep.json'}"),
        *("--rounds=2", "--every=2", "--width=16", "--heads=2", "--vocab-size=300", "--seeds=0"),
    ]
    monkeypatch.setattr(sys, "argv", [*words, "--arms", "ddp"])
    main()
    monkeypatch.setattr(sys, "argv", [*words, "--arms", "ddp", "default", "outer_momentum=0.3"])
    main()
    shown = capsys.readouterr()
    assert "1/1 runs" in shown.err and "2/2 runs" in shown.err
    rows = shown.out.strip().splitlines()[-3:]
    assert {row.split("|")[1].strip() for row in rows} == {"ddp", "default", "outer_momentum=0.3"}
    assert "+0.00%" in next(row for row in rows if row.startswith("| ddp |"))
