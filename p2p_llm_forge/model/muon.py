"""Muon: the matrices inside the layers take orthogonalised steps, all else takes those of AdamW."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.optim.adamw import adamw
from transformers.pytorch_utils import Conv1D

# Of the quintic iteration, by Keller Jordan (kellerjordan.github.io/posts/muon), as in torch.
COEFFICIENTS = (3.4445, -4.7750, 2.0315)
ITERATIONS, LEAST_NORM, MOMENTUM = 5, 1e-7, 0.95
BETAS, EPS = (0.9, 0.95), 1e-8  # of AdamW
STACK_VALUES = 2**22  # numbers in the matrices that are orthogonalised at once
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16}
# Of the matrix products that decide between them. A GPU does the small ones in the time that
# starting one takes, whatever their dtype.
TRIAL_SIZE, TRIAL_SIZE_ON_GPU, TRIALS = 384, 4096, 6
# bfloat16 must be that much faster. (AVX512-BF16 2.2 times, a CPU without such units 0.3 times.)
WORTHWHILE = 1.2


def orthogonalised(stack: Tensor, dtype: torch.dtype) -> Tensor:
    """The matrices of a stack (n, rows, columns), with singular values of about one each.

    They come out between 0.6 and 1.2 where they were not below a thousandth of the matrix's norm;
    the spaces that belong to them stay. Returns (n, rows, columns) of `dtype`, in which the five
    iterations of Newton-Schulz are computed; rows must be the shorter side, or it is slow.
    """
    a, b, c = COEFFICIENTS
    norms = stack.norm(dim=(-2, -1), keepdim=True).clamp_(min=LEAST_NORM)
    x = (stack / norms).to(dtype)
    for _ in range(ITERATIONS):
        gram = x @ x.mT
        x = torch.baddbmm(x, torch.baddbmm(gram, gram, gram, beta=b, alpha=c), x, beta=a)
    return x


def prefers_bfloat16(device: torch.device) -> bool:
    """Whether `device` multiplies matrices faster in bfloat16: measured, in milliseconds.

    On a CPU by the time that one thread computes, which others that run here cannot take away.
    """
    is_on_cpu, threads = device.type == "cpu", torch.get_num_threads()
    clock = time.thread_time if is_on_cpu else time.perf_counter
    torch.set_num_threads(1)
    seconds = dict.fromkeys(DTYPES.values(), math.inf)
    size = TRIAL_SIZE if is_on_cpu else TRIAL_SIZE_ON_GPU
    one = torch.ones(size, size, device=device)
    matrices = {dtype: one.to(dtype) for dtype in seconds}
    for _ in range(TRIALS):
        for dtype, matrix in matrices.items():
            began = clock()
            (matrix @ matrix)[0, 0].item()  # waits for the device
            seconds[dtype] = min(seconds[dtype], clock() - began)
    torch.set_num_threads(threads)
    return seconds[torch.float32] > WORTHWHILE * seconds[torch.bfloat16]


# --- which parameters -----------------------------------------------------------------------------


def matrices_inside_layers(lm: torch.nn.Module) -> list[torch.nn.Parameter]:
    """What Muon takes of a causal LM: trainable weights of linear maps inside its layers.

    (rows, columns) each, or (experts, rows, columns): every expert's is a matrix. Not embeddings,
    nor what is tied to one; not kernels of convolutions, nor tables that multiply no vector (states
    of recurrent layers, biases of experts), whatever their shape.
    """
    layers = [f"{name}." for name, m in lm.named_modules() if isinstance(m, torch.nn.ModuleList)]
    embeddings = {
        id(p)
        for module in lm.modules()
        if isinstance(module, torch.nn.Embedding)
        for p in module.parameters(recurse=False)
    }
    found = {}
    for name, module in lm.named_modules():
        if not f"{name}.".startswith(tuple(layers)):
            continue
        for key, parameter in module.named_parameters(recurse=False):
            is_linear = isinstance(module, torch.nn.Linear | Conv1D) and key == "weight"
            path = f"{name}.{type(module).__name__}".lower()
            is_stack = parameter.dim() == 3 and "expert" in path
            is_matrix = (is_linear or is_stack) and min(parameter.shape) > 1
            if is_matrix and parameter.requires_grad and id(parameter) not in embeddings:
                found[id(parameter)] = parameter
    return list(found.values())


# --- ranks that share the work --------------------------------------------------------------------


@dataclass(frozen=True)
class Team:
    """Ranks that hold the same gradients, and orthogonalise some of the matrices each."""

    number: int  # of this rank in it
    size: int
    all_gather: Callable[[Tensor], Tensor]  # (n) of this rank -> (size, n) of all, in their order


ALONE = Team(0, 1, lambda row: row.unsqueeze(0))


def divided(costs: list[int], ranks: int) -> list[list[int]]:
    """Which of the jobs each rank does, in their order: the dearest first, to who has least."""
    jobs: list[list[int]] = [[] for _ in range(ranks)]
    spent = [0] * ranks
    for job in sorted(range(len(costs)), key=lambda job: -costs[job]):
        rank = spent.index(min(spent))
        jobs[rank].append(job)
        spent[rank] += costs[job]
    return [sorted(one) for one in jobs]


# --- the optimizer --------------------------------------------------------------------------------


@dataclass(frozen=True)
class Matrix:
    """One matrix of a parameter: views, turned so that rows are the shorter side."""

    weight: Tensor
    gradient: Tensor
    momentum: Tensor

    @property
    def cost(self) -> int:
        """The multiplications of its orthogonalisation, in units that cancel out."""
        rows, columns = self.weight.shape
        return rows * rows * (rows + 2 * columns)

    def direction(self) -> Tensor:
        """Nesterov's."""
        return self.gradient.lerp(self.momentum, MOMENTUM)


class Muon(torch.optim.Optimizer):
    """Muon for `matrices`, AdamW for the parameters of `others`, whose groups have a weight decay.

    An update of a matrix has the root mean square that one of AdamW usually has, so one learning
    rate serves both (0.2 x the root of the longer side: Moonlight, arXiv 2502.16982). All decay is
    AdamW's. dtype and team may be set until the first step; the dtype decides the bits of a run.
    """

    def __init__(
        self,
        matrices: list[torch.nn.Parameter],
        others: list[dict[str, Any]],
        lr: float,
        weight_decay: float,
    ) -> None:
        self.dtype, self.team = torch.float32, ALONE
        group = {"params": matrices, "weight_decay": weight_decay, "is_orthogonalised": True}
        super().__init__([group, *others], {"lr": lr, "is_orthogonalised": False})

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> None:  # type: ignore[override]
        """Take one update of all parameters that have a gradient."""
        assert closure is None
        for group in self.param_groups:
            parameters = [p for p in group["params"] if p.grad is not None]
            if group["is_orthogonalised"]:
                self._step_matrices(parameters, group["lr"], group["weight_decay"])
            elif parameters:
                self._step_others(parameters, group["lr"], group["weight_decay"])

    def _step_matrices(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        matrices: list[Matrix] = []
        for parameter in parameters:
            assert parameter.grad is not None
            state = self.state[parameter]
            if not state:
                state["momentum_buffer"] = torch.zeros_like(parameter)
            momentum = state["momentum_buffer"].lerp_(parameter.grad, 1 - MOMENTUM)
            parameter.mul_(1 - lr * weight_decay)
            matrices.extend(matrices_of(parameter, parameter.grad, momentum))
        for matrix, update in self._updates(matrices):
            scale = 0.2 * max(matrix.weight.shape) ** 0.5
            matrix.weight.add_(update, alpha=-lr * scale)

    def _updates(self, matrices: list[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
        """Every matrix and its orthogonalised direction; those of other ranks from them."""
        if self.team.size == 1:
            yield from orthogonalised_by_stacks(matrices, self.dtype)
            return
        jobs = divided([matrix.cost for matrix in matrices], self.team.size)
        shares = [[matrices[job] for job in own] for own in jobs]
        longest = max(sum(matrix.weight.numel() for matrix in share) for share in shares)
        row = matrices[0].weight.new_zeros(longest, dtype=self.dtype)
        own = shares[self.team.number]
        parts = {id(matrix): part for matrix, part in parts_of(row, own)}
        for matrix, update in orthogonalised_by_stacks(own, self.dtype):
            parts[id(matrix)].copy_(update)
        for share, gathered in zip(shares, self.team.all_gather(row), strict=True):
            yield from parts_of(gathered, share)

    def _step_others(self, parameters: list[Tensor], lr: float, weight_decay: float) -> None:
        for parameter in parameters:
            state = self.state[parameter]
            if not state:
                state["step"] = torch.zeros((), device=parameter.device)
                state["exp_avg"] = torch.zeros_like(parameter)
                state["exp_avg_sq"] = torch.zeros_like(parameter)
        kept = {
            entry: [self.state[parameter][entry] for parameter in parameters]
            for entry in ("exp_avg", "exp_avg_sq", "step")
        }
        adamw(
            parameters,
            [p.grad for p in parameters if p.grad is not None],
            kept["exp_avg"],
            kept["exp_avg_sq"],
            [],
            kept["step"],
            fused=are_fusible(parameters),
            amsgrad=False,
            beta1=BETAS[0],
            beta2=BETAS[1],
            lr=lr,
            weight_decay=weight_decay,
            eps=EPS,
            maximize=False,
        )


def matrices_of(parameter: Tensor, gradient: Tensor, momentum: Tensor) -> Iterator[Matrix]:
    """The matrices that a parameter (rows, columns) or (experts, rows, columns) is made of."""
    views = [one.unsqueeze(0) if one.dim() == 2 else one for one in (parameter, gradient, momentum)]
    if parameter.shape[-2] > parameter.shape[-1]:
        views = [one.mT for one in views]
    for weight, of_gradient, of_momentum in zip(*views, strict=True):
        yield Matrix(weight, of_gradient, of_momentum)


def orthogonalised_by_stacks(
    matrices: Iterable[Matrix], dtype: torch.dtype
) -> Iterator[tuple[Matrix, Tensor]]:
    """Every matrix and its orthogonalised direction, of `dtype`; those of one shape at once."""
    by_shape: dict[torch.Size, list[Matrix]] = {}
    for matrix in matrices:
        by_shape.setdefault(matrix.weight.shape, []).append(matrix)
    for shape, alike in by_shape.items():
        at_once = max(1, STACK_VALUES // shape.numel())
        for first in range(0, len(alike), at_once):
            some = alike[first : first + at_once]
            stack = torch.stack([matrix.direction() for matrix in some])
            yield from zip(some, orthogonalised(stack, dtype), strict=True)


def parts_of(row: Tensor, matrices: Iterable[Matrix]) -> Iterator[tuple[Matrix, Tensor]]:
    """Every matrix and its part of a row in which those of all lie one behind the other."""
    begin = 0
    for matrix in matrices:
        shape = matrix.weight.shape
        yield matrix, row[begin : begin + shape.numel()].view(shape)
        begin += shape.numel()


def are_fusible(parameters: Iterable[Tensor]) -> bool:
    """Whether torch has a fused AdamW for their devices."""
    return all(p.device.type in ("cpu", "cuda") for p in parameters)
