"""Many small GPT-2s of one shape that train in one process, side by side, as one batch.

A machine (a model with its optimizer) is a row of one tensor, and all machines go through batched
multiplications together, so that dozens of models share what it costs to start each operation.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from p2p_llm_forge.config import TrainConfig

NORM = ("weight", "bias")
# The matrices of a layer: rows and columns, in widths of the model.
SIDES = {"attn.c_attn": (1, 3), "attn.c_proj": (1, 1), "mlp.c_fc": (1, 4), "mlp.c_proj": (4, 1)}


@dataclass(frozen=True)
class Sizes:
    """The model's: a GPT-2 without dropout."""

    layers: int
    heads: int
    width: int
    vocabulary: int
    length: int  # tokens in a block

    def shapes(self) -> dict[str, tuple[int, ...]]:
        """Parameters by transformers' names: the layers' matrices, the embeddings, the vectors."""
        width, matrices, vectors = self.width, {}, {}
        for layer in (f"h.{number}" for number in range(self.layers)):
            for name, (rows, columns) in SIDES.items():
                matrices[f"{layer}.{name}.weight"] = (rows * width, columns * width)
                vectors[f"{layer}.{name}.bias"] = (columns * width,)
            vectors |= {f"{layer}.ln_{n}.{kind}": (width,) for n in "12" for kind in NORM}
        embeddings = {"wte.weight": (self.vocabulary, width), "wpe.weight": (self.length, width)}
        return matrices | embeddings | vectors | {f"ln_f.{kind}": (width,) for kind in NORM}

    def parts(self, flat: Tensor) -> dict[str, Tensor]:
        """Views of (machines, parameters) by name, each (machines, *its shape)."""
        shapes = self.shapes()
        parts = flat.split([math.prod(shape) for shape in shapes.values()], dim=1)
        return {
            name: part.unflatten(1, shape)
            for (name, shape), part in zip(shapes.items(), parts, strict=True)
        }

    def initial(self, seed: int) -> Tensor:
        """One machine's weights (1, parameters), drawn as GPT-2's are."""
        numbers = torch.Generator().manual_seed(seed)
        flat = torch.zeros(1, sum(map(math.prod, self.shapes().values())))
        for name, part in self.parts(flat).items():
            if part.dim() == 3:
                into_residual = (2 * self.layers) ** -0.5 if name.endswith("c_proj.weight") else 1
                part.normal_(0, 0.02 * into_residual, generator=numbers)
            elif "ln_" in name and name.endswith("weight"):
                part.fill_(1)
        return flat


def losses(weights: Tensor, inputs: Tensor, targets: Tensor, sizes: Sizes) -> Tensor:
    """Nats per token of every machine on its own blocks.

    weights: (machines, parameters) float32; inputs, targets: (machines, blocks, length) int64.
    """
    machines, blocks, length = inputs.shape
    part = sizes.parts(weights)

    def linear(x: Tensor, name: str) -> Tensor:
        return torch.baddbmm(part[f"{name}.bias"].unsqueeze(1), x, part[f"{name}.weight"])

    def norm(x: Tensor, name: str) -> Tensor:
        scale, shift = (part[f"{name}.{kind}"].unsqueeze(1) for kind in NORM)
        return F.layer_norm(x, (sizes.width,)) * scale + shift

    def attention(x: Tensor, name: str) -> Tensor:
        joined = linear(x, f"{name}.c_attn").view(machines * blocks, length, 3, sizes.heads, -1)
        heads = F.scaled_dot_product_attention(*joined.permute(2, 0, 3, 1, 4), is_causal=True)
        return linear(heads.transpose(1, 2).reshape(x.shape), f"{name}.c_proj")

    # One table for all machines: each looks up in its own part.
    table, first_rows = part["wte.weight"], torch.arange(machines) * sizes.vocabulary
    x = F.embedding(inputs + first_rows.view(-1, 1, 1), table.flatten(0, 1))
    x = (x + part["wpe.weight"][:, None, :length]).flatten(1, 2)
    for layer in (f"h.{number}" for number in range(sizes.layers)):
        x = x + attention(norm(x, f"{layer}.ln_1"), f"{layer}.attn")
        hidden = F.gelu(linear(norm(x, f"{layer}.ln_2"), f"{layer}.mlp.c_fc"), approximate="tanh")
        x = x + linear(hidden, f"{layer}.mlp.c_proj")
    logits = torch.bmm(norm(x, "ln_f"), table.mT)
    nats = F.cross_entropy(logits.flatten(0, 1), targets.flatten(), reduction="none")
    return nats.view(machines, -1).mean(1)


def orthogonalized(matrices: Tensor) -> Tensor:
    """Matrices (count, rows, columns) with their singular values brought near 1 (0.5 to 1.5).

    Newton and Schulz's iteration with the coefficients of Muon (Keller Jordan, 2024).
    """
    if matrices.shape[1] > matrices.shape[2]:
        return orthogonalized(matrices.mT).mT
    x = matrices / (torch.linalg.matrix_norm(matrices, keepdim=True) + 1e-7)
    for _ in range(5):
        square = x @ x.mT
        x = 3.4445 * x + (-4.7750 * square + 2.0315 * square @ square) @ x
    return x


class Optimizer:
    """AdamW as of train.py for every machine; Muon for the layers' matrices of some.

    Muon's steps are scaled to the size of AdamW's (0.2 sqrt(longer side), arXiv 2502.16982), so
    that one learning rate suits both.
    """

    def __init__(self, weights: Tensor, sizes: Sizes, rates: list[float], inner: list[str]) -> None:
        self.gradient = torch.zeros_like(weights)  # (machines, parameters), set before each step
        shapes = sizes.shapes()
        hidden = [name for name, shape in shapes.items() if name[:2] == "h." and len(shape) == 2]
        hidden_end = sum(math.prod(shapes[name]) for name in hidden)
        decayed_end = sum(math.prod(shape) for shape in shapes.values() if len(shape) == 2)
        self._decay = TrainConfig().decay()
        groups = []
        for row, (rate, kind) in enumerate(zip(rates, inner, strict=True)):
            matrices = slice(hidden_end if kind == "muon" else 0, decayed_end)
            for span, decay in ((matrices, self._decay), (slice(decayed_end, None), 0.0)):
                parameter = torch.nn.Parameter(weights[row, span])
                parameter.grad = self.gradient[row, span]
                groups.append(
                    {"params": [parameter], "lr": rate, "peak": rate, "weight_decay": decay}
                )
        self._adamw = torch.optim.AdamW(groups, betas=(0.9, 0.95), fused=True)
        self._rows = torch.tensor([row for row, kind in enumerate(inner) if kind == "muon"])
        self._rates = torch.tensor(rates)[:, None, None]
        weights_of, gradients_of = sizes.parts(weights), sizes.parts(self.gradient)
        names = hidden if len(self._rows) else []
        self._muon = [(weights_of[name], gradients_of[name]) for name in names]
        self._buffers = [torch.zeros_like(part[self._rows]) for part, _ in self._muon]

    def average_moments(self, machines: range) -> None:
        """Give each of these machines the mean of their AdamW's moments."""
        groups = self._adamw.param_groups
        for part in range(2):
            states = [
                self._adamw.state[groups[2 * machine + part]["params"][0]] for machine in machines
            ]
            for name in ("exp_avg", "exp_avg_sq"):
                mean = torch.stack([state[name] for state in states]).mean(0)
                for state in states:
                    state[name].copy_(mean)

    def step(self, factor: float) -> None:
        """Take an update with `factor` times the peak learning rates."""
        for group in self._adamw.param_groups:
            group["lr"] = group["peak"] * factor
        self._adamw.step()
        for (weights, gradients), buffer in zip(self._muon, self._buffers, strict=True):
            rate, gradient = factor * self._rates[self._rows], gradients[self._rows]
            buffer.mul_(0.95).add_(gradient)
            direction = orthogonalized(torch.add(gradient, buffer, alpha=0.95))
            size = 0.2 * max(direction.shape[1:]) ** 0.5
            weights[self._rows] = (
                weights[self._rows] * (1 - rate * self._decay) - rate * size * direction
            )
