"""How the peers agree on weights. The training loop does not know which way is at work.

Strategies: gradients averaged in every update (gradients.py), or rounds in which every rank trains
alone, ended by an exchange of how far the ranks have moved (diloco.py).
"""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from p2p_llm_forge.config import TrainConfig, multiples_near
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.cluster import Cluster


@dataclass(frozen=True)
class SyncReport:
    """What one update cost in communication."""

    bytes_sent: int = 0  # payload that left this rank
    seconds: float = 0.0  # in which this rank waited for it
    peers: int = 1


@dataclass(frozen=True)
class SyncState:
    """What a checkpoint holds of a strategy, beside the agreed weights. Tensors on the CPU."""

    facts: dict[str, Any] = field(default_factory=dict)  # JSON, the same on every rank
    shared: dict[str, torch.Tensor] = field(default_factory=dict)  # the same on every rank
    own: dict[str, torch.Tensor] = field(default_factory=dict)  # of this rank


@dataclass(frozen=True)
class SavedSync:
    """What a checkpoint holds of a strategy, perhaps of another one or of other ranks."""

    facts: dict[str, Any]
    shared: dict[str, torch.Tensor]
    own_of: Callable[[int], dict[str, torch.Tensor]]  # of a rank of the saved run

    @property
    def world_size(self) -> int:
        """How many ranks have something of their own in the checkpoint."""
        return int(self.facts.get("ranks", 0))

    def is_of(self, sync: Sync) -> bool:
        """Whether ranks kept something of their own by the same strategy."""
        return self.world_size > 0 and self.facts["strategy"][0] == sync.settings()[0]


class Sync(Protocol):
    """A strategy. All ranks call `after_update` after every update, and `state` together."""

    has_own_state: bool  # whether ranks hold what others do not: checkpoints take a file of each
    trains_alone: bool  # whether optimizer states are among that

    @property
    def loses_rounds_after(self) -> float:
        """After how many updates it goes back by itself when weights become NaN."""

    def context(self, is_last_micro_batch: bool) -> AbstractContextManager[Any]:
        """What forward and backward of a micro-batch run in."""

    def priming(self) -> AbstractContextManager[None]:
        """What a backward runs in whose gradients are thrown away."""

    def loss_scale(self, own_tokens: int, tokens_per_update: int) -> float:
        """By what a summed loss (nats) is multiplied before its backward."""

    def after_update(self, step: int, own_tokens: int) -> SyncReport:
        """Exchange what is due after update `step` (from 0) on `own_tokens` tokens of this rank."""

    def meets(self, done: int) -> bool:
        """Whether all ranks wait for each other after `done` updates, so that asking is cheap."""

    def settings(self) -> list[Any]:
        """What must be the same where a round is taken up in its middle. JSON."""

    def is_agreed(self) -> bool:
        """Whether all ranks hold the same weights now."""

    def agreed_weights(self) -> AbstractContextManager[None]:
        """Put the weights that all ranks agree on into the model, for as long as it is entered."""

    def state(self) -> SyncState: ...

    def load_state(self, saved: SavedSync) -> None:
        """Go on from what a checkpoint holds."""


class Meter:
    """What the updates of this process have cost in communication, added up."""

    def __init__(self) -> None:
        self.bytes_sent, self.seconds = 0, 0.0

    def add(self, report: SyncReport) -> None:
        """One more update."""
        self.bytes_sent += report.bytes_sent
        self.seconds += report.seconds

    def figures(self, spent_s: float, updates: int) -> dict[str, float]:
        """Share of the time, and bytes, of the updates so far."""
        return {
            "communication": self.seconds / spent_s,
            "bytes_sent_per_update": self.bytes_sent / updates,
        }


def strategy(
    config: TrainConfig,
    cluster: Cluster,
    model: Any,
    lm: Any,
    optimizer: Any,
    total_steps: int,
    done: int,
) -> Sync:
    """The way that `--sync` and `--compress` ask for. Raises ForgeError where the model is too
    small for it.

    model: as Accelerate wraps it; lm: the causal LM in it; done: updates taken before.
    """
    from p2p_llm_forge.sync.compress import CODECS
    from p2p_llm_forge.sync.ddp import AllReduce, PowerSGD
    from p2p_llm_forge.sync.diloco import DiLoCo

    if config.sync == "diloco":
        return DiLoCo(config, cluster, model, lm, optimizer, total_steps, done)
    if config.compress == "powersgd":
        return PowerSGD(cluster, model, config.powersgd_rank or 4)
    return AllReduce(cluster, model, CODECS[config.compress])


def refuse_unfinished_round(saved: SavedSync, sync: Sync, cluster: Cluster, step: int) -> None:
    """Raise ForgeError if this run cannot take up the round in whose middle the other was saved."""
    if saved.facts.get("is_agreed", True):
        return
    before, now = saved.facts["strategy"], sync.settings()
    if before == now and saved.world_size == cluster.world_size:
        return
    sent_at, lands_at = saved.facts["sent_at"], saved.facts["lands_at"]
    if saved.is_of(sync) and all(lands_at) and all(sent == step for sent in sent_at):
        return  # a round has ended; its moves are on their way
    _, _, fragments, overlap = before
    other = "from a checkpoint of the end of a round by --resume FOLDER"
    if fragments > 1:
        other = "change when the run has ended (--max-steps), as all ranks agree then"
    elif overlap and not saved.is_of(sync):
        other = "change after a round without --overlap-steps, when no move is on its way"
    raise ForgeError(
        f"the checkpoint of step {step} holds a round of {saved.world_size} process(es)"
        f" ({told_settings(before)}) that has not been agreed on, this run has"
        f" {cluster.world_size} ({told_settings(now)}): go on with the same, or {other}"
    )


def refuse_to_end_in_a_round(saved: SavedSync, step: int, total_steps: int) -> None:
    """Raise ForgeError if the run would end with a checkpoint whose round has not been agreed on:
    its model lacks what the ranks have done since."""
    if step == total_steps and not saved.facts.get("is_agreed", True):
        raise ForgeError(
            f"the run was asked to end after {total_steps} updates, but the checkpoint of step"
            f" {step} was saved before its round was agreed on, and its model lacks what the ranks"
            f" have done in it: take at least one more update with --max-steps {step + 1}"
        )


def told_settings(settings: list[Any]) -> str:
    """A strategy's settings as flags."""
    if settings[0] != "diloco":
        return "--sync ddp"
    _, every, fragments, overlap = settings
    return f"--sync diloco --sync-every {every} --fragments {fragments} --overlap-steps {overlap}"


def refuse_elastic(config: TrainConfig, cluster: Cluster) -> None:
    """Raise ForgeError where peers come and go, but could not between this strategy's rounds."""
    if not cluster.launch.is_elastic or config.sync != "diloco":
        return
    if config.fragments > 1:
        raise ForgeError(
            f"--fragments {config.fragments} leaves no moment at which the round ends for the whole"
            " model, so no peer could join or leave: leave it out, or launch with a fixed number of"
            " peers"
        )
    if config.save_every % config.round_length():
        sizes = " or ".join(map(str, multiples_near(config.save_every, config.round_length())))
        raise ForgeError(
            f"--save-every {config.save_every} is not a multiple of --sync-every"
            f" {config.round_length()}, and only where a round ends can peers join or leave:"
            f" use {sizes}"
        )


def refuse_different_models(cluster: Cluster, lm: Any, is_loaded: bool) -> None:
    """Raise ForgeError, naming the ranks, if their models are not the same as rank 0's.

    is_loaded: from files, whose weights must be equal too; weights from scratch are made by the
    seed and may differ in their last bits between kinds of CPUs: rank 0's are taken.
    """
    shapes = {name: list(parameter.shape) for name, parameter in lm.named_parameters()}
    digest = hashlib.blake2b(digest_size=16)
    if is_loaded:
        for _, parameter in lm.named_parameters():
            digest.update(parameter.detach().cpu().reshape(-1).view(torch.uint8).numpy())
    described = hashlib.blake2b(json.dumps(shapes).encode(), digest_size=16).hexdigest()
    fact = {"shapes": described, "weights": digest.hexdigest(), "host": platform.node()}
    told = cluster.gather_facts(fact)
    if all(other["shapes"] == told[0]["shapes"] for other in told):
        others = [r for r, other in enumerate(told) if other["weights"] != told[0]["weights"]]
        if others:
            names = ", ".join(f"rank {rank} ({told[rank]['host']})" for rank in others)
            raise ForgeError(
                f"the peers of a run must start from the same weights, but {names} has others than"
                " rank 0 in its files: copy rank 0's --model-name folder"
            )
        return
    told = cluster.gather_facts({**fact, "shapes": shapes})
    problems = []
    for rank, other in enumerate(told):
        for name in sorted({*other["shapes"], *told[0]["shapes"]}):
            here, there = other["shapes"].get(name), told[0]["shapes"].get(name)
            if here != there:
                problems.append(f"rank {rank} ({other['host']}) has {name} {here}, rank 0 {there}")
                break
    raise ForgeError(
        "the peers of a run must train the same model:\n  "
        + "\n  ".join(problems)
        + "\n  Give all the same --model-name (the same files), --model-type and --config-overrides"
    )


def units_of(lm: Any) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """The model's parameters in the parts that a fragment is made of: what comes before the layers
    (embeddings), each layer, what comes after. Tied weights count where they come first."""
    # The largest: a layer may itself hold a longer list, of experts.
    stacks = [
        (sum(p.numel() for p in module.parameters()), name, len(module))
        for name, module in lm.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    ]
    _, stack, layers = max(stacks, key=lambda entry: entry[0], default=(0, "", 0))
    units: list[list[tuple[str, torch.nn.Parameter]]] = [[] for _ in range(layers + 2)]
    is_behind = False
    for name, parameter in lm.named_parameters():
        number = name.removeprefix(stack + ".").partition(".")[0]
        if layers and name.startswith(stack + ".") and number.isdigit():
            units[1 + int(number)].append((name, parameter))
            is_behind = True
        else:
            units[layers + 1 if is_behind else 0].append((name, parameter))
    return [unit for unit in units if unit]
