"""How the peers agree on weights. The training loop does not know which way is at work.

AllReduce averages gradients in every update (DDP), compressed on the wire if asked for. DiLoCo lets
every rank train alone for a round of updates and then averages how far the ranks have moved.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import platform
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch

from p2p_llm_forge.cluster import Channel, Cluster
from p2p_llm_forge.compress import CODECS, Codec, ErrorFeedback
from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.outer import fragment_due, fragments_of, outer_step

# Values of one exchange: small enough that it ends within --peer-timeout on any usable link.
PIECE = 2**20
LOST_ROUNDS_IN_A_ROW = 3  # until the run ends


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
    may_lose_rounds: bool  # whether it goes back by itself when weights become NaN

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
    if before != now or saved.world_size != cluster.world_size:
        raise ForgeError(
            f"the checkpoint of step {step} lies in the middle of a round of {saved.world_size}"
            f" process(es) ({told_settings(before)}), this run has {cluster.world_size}"
            f" ({told_settings(now)}): go on with the same, or from a checkpoint between two rounds"
            " by --resume FOLDER"
        )


def told_settings(settings: list[Any]) -> str:
    """A strategy's settings as flags."""
    if settings[0] != "diloco":
        return "--sync ddp"
    _, every, fragments, overlap = settings
    return f"--sync diloco --sync-every {every} --fragments {fragments} --overlap-steps {overlap}"


def refuse_different_models(cluster: Cluster, lm: Any, is_loaded: bool) -> None:
    """Raise ForgeError, naming the ranks, if their models are not the same as rank 0's.

    is_loaded: from files, whose weights must be equal too; weights from scratch are made by the
    seed and may differ in their last bits between kinds of CPUs: rank 0's are taken.
    """
    shapes = {name: list(parameter.shape) for name, parameter in lm.named_parameters()}
    digest = hashlib.blake2b(digest_size=16)
    if is_loaded:
        for _, parameter in lm.named_parameters():
            digest.update(parameter.detach().cpu().contiguous().view(torch.uint8).numpy())
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


# --- means over all ranks -------------------------------------------------------------------------


class Averager:
    """Weighted sums over all ranks of vectors of one length, encoded on the wire.

    The vector is cut into one shard for each rank. Every rank sends each shard to its owner, which
    adds the decoded shards in float32 and sends the encoded sum to all (the two phases of 1-bit
    Adam's compressed all-reduce, arXiv 2102.02888): 2 (ranks - 1) / ranks of the encoded vector
    leave every rank. What encoding loses in either phase is added the next time (error feedback,
    arXiv 1901.09847). All ranks get the same bits.
    """

    def __init__(self, channel: Channel, codec: Codec, count: int) -> None:
        self._channel, self._codec, self._count = channel, codec, count
        unit = channel.world_size * codec.group
        self._width = -(-count // unit) * codec.group
        self._piece = max(1, PIECE // unit) * codec.group
        # Of each piece: what is owed in sending (ranks, piece) and in this rank's sum (piece).
        self._owed = [
            (ErrorFeedback(), ErrorFeedback()) for _ in range(0, self._width, self._piece)
        ]

    def sum(self, values: torch.Tensor) -> torch.Tensor:
        """The sum over all ranks. values: (count) float32 on the CPU, finite."""
        if self._channel.world_size == 1:  # alone there is no wire, so nothing is encoded
            return values
        pieces = zip(self._rows(values).split(self._piece, dim=1), self._owed, strict=True)
        summed = [self._sum_piece(rows.contiguous(), *owed) for rows, owed in pieces]
        return torch.cat(summed, dim=1).view(-1)[: self._count]

    def _sum_piece(
        self, rows: torch.Tensor, sending: ErrorFeedback, in_sum: ErrorFeedback
    ) -> torch.Tensor:
        codec, channel = self._codec, self._channel
        shard = codec.decode(channel.deal(sending.encode(codec, rows))).sum(0)
        return codec.decode(channel.share(in_sum.encode(codec, shard)))

    def _rows(self, values: torch.Tensor) -> torch.Tensor:
        """The vector as (ranks, width), filled up with zeros."""
        ranks = self._channel.world_size
        return torch.nn.functional.pad(values, (0, ranks * self._width - len(values))).view(
            ranks, self._width
        )

    def lost(self, parts: list[tuple[str, int]]) -> dict[str, torch.Tensor]:
        """What this rank still owes, in sending and in its shard of the sum; by parameter.

        parts: the names and sizes that make up the vector.
        """
        if any(sending.residual is None for sending, _ in self._owed):
            return {}
        in_sending = torch.cat([sending.residual for sending, _ in self._owed], dim=1)  # type: ignore[misc]
        in_sum = torch.zeros_like(in_sending)
        in_sum[self._channel.rank] = torch.cat([summed.residual for _, summed in self._owed])  # type: ignore[misc]
        return _split(in_sending.view(-1)[: self._count], SENDING, parts) | _split(
            in_sum.view(-1)[: self._count], IN_SUM, parts
        )

    def restore(self, lost: dict[str, torch.Tensor], parts: list[tuple[str, int]]) -> None:
        """Go on with what was lost (see `lost`); what is not named there is zero."""
        if not lost or not self._codec.is_lossy:
            return
        rows = [self._rows(_joined(lost, kind, parts)) for kind in (SENDING, IN_SUM)]
        for number, (sending, in_sum) in enumerate(self._owed):
            piece = slice(number * self._piece, (number + 1) * self._piece)
            sending.residual = rows[0][:, piece].clone()
            in_sum.residual = rows[1][self._channel.rank, piece].clone()

    def forget(self) -> None:
        """Owe nothing any more."""
        for owed in self._owed:
            for feedback in owed:
                feedback.residual = None


SENDING, IN_SUM = "lost_sending.", "lost_in_sum."  # and the parameter's name


def dealt_out(saved: SavedSync, cluster: Cluster) -> dict[str, torch.Tensor]:
    """This rank's part of what the ranks of another number had lost: the sum stays the same."""
    dealt: dict[str, torch.Tensor] = {}
    for rank in range(cluster.rank, saved.world_size, cluster.world_size):
        for key, lost in saved.own_of(rank).items():
            if key.startswith((SENDING, IN_SUM)):
                name = SENDING + key.partition(".")[2]
                dealt[name] = dealt[name] + lost if name in dealt else lost
    return dealt


# --- gradients in every update --------------------------------------------------------------------


class AllReduce:
    """Gradients averaged over all ranks in every update, by DDP while backward runs."""

    trains_alone = may_lose_rounds = False

    def __init__(self, cluster: Cluster, model: Any, codec: Codec) -> None:
        self._cluster, self._model, self._codec = cluster, model, codec
        self._channel = cluster.open_channel()
        self._names = {parameter: name for name, parameter in parameters_of(model)}
        self._averagers: dict[int, tuple[Averager, list[tuple[str, int]]]] = {}
        self._lost: dict[str, torch.Tensor] = {}  # of the checkpoint, by parameter
        self._bytes_before = 0
        self._last_began = self._last_ended = 0.0
        self.is_priming = False
        self.has_own_state = codec.is_lossy and cluster.world_size > 1
        if cluster.world_size > 1:
            # Set here because the constructor's argument has two names (renamed in torch 2.13). A
            # language model's buffers are constants: sending them in every forward costs a slow
            # link a round trip.
            model.broadcast_buffers = False
            self._register()

    def _register(self) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks import default_hooks

        on_nccl = {
            "fp16": default_hooks.fp16_compress_hook,
            "bf16": default_hooks.bf16_compress_hook,
        }
        if self._cluster.device.type == "cpu" or self._codec.name.startswith("int"):
            self._model.register_comm_hook(None, self._hook)
        elif self._codec.name in on_nccl:
            self._model.register_comm_hook(None, on_nccl[self._codec.name])

    def context(self, is_last_micro_batch: bool) -> AbstractContextManager[Any]:
        """Only an update's last micro-batch exchanges gradients."""
        return (
            nullcontext() if is_last_micro_batch else self._cluster.accelerator.no_sync(self._model)
        )

    def loss_scale(self, own_tokens: int, tokens_per_update: int) -> float:
        """DDP averages over the ranks; what is wanted is the mean over all tokens."""
        return self._cluster.world_size / tokens_per_update

    @contextlib.contextmanager
    def priming(self) -> Iterator[None]:
        """Backward without any exchange, in which DDP learns in which order gradients come.

        It cuts them into other buckets after its first backward (torch 2.13). A resumed run would
        add in another order there than the run that it goes on with.
        """
        self.is_priming = True
        try:
            yield
        finally:
            self.is_priming = False

    @property
    def _hook(self) -> Any:
        # Without annotations: DDP (torch 2.13) compares them, and here they are strings.
        return lambda state, bucket: self._exchange(bucket)

    def _exchange(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        """DDP's communication hook: called for one bucket after the other, while backward runs."""
        future: torch.futures.Future[torch.Tensor] = torch.futures.Future()
        buffer = bucket.buffer()
        if self.is_priming:
            future.set_result(buffer)
            return future
        self._last_began = time.perf_counter()
        buffer.div_(self._cluster.world_size)
        average = self._way(bucket)

        def exchange() -> None:
            try:
                with torch.no_grad():
                    future.set_result(average(buffer))
            except Exception as error:  # raised where DDP waits
                future.set_exception(error)  # type: ignore[arg-type]
            self._last_ended = time.perf_counter()

        self._channel.in_background(exchange)
        return future

    def _way(self, bucket: Any) -> Any:
        """What averages this bucket's buffer."""
        if self._codec.name == "none":
            return self._channel.sum_
        if bucket.index() not in self._averagers:
            parts = [(self._names[p], p.numel()) for p in bucket.parameters()]
            averager = Averager(self._channel, self._codec, len(bucket.buffer()))
            averager.restore(self._lost, parts)
            self._averagers[bucket.index()] = averager, parts
        averager, _ = self._averagers[bucket.index()]
        return lambda buffer: buffer.copy_(averager.sum(buffer.float().cpu()))

    def after_update(self, step: int, own_tokens: int) -> SyncReport:
        """Nothing is left to do: DDP exchanged the gradients during backward."""
        sent, self._bytes_before = (
            self._channel.bytes_sent - self._bytes_before,
            self._channel.bytes_sent,
        )
        # The last bucket is ready when backward is over; from then on everybody waits.
        waited = max(0.0, self._last_ended - self._last_began)
        return SyncReport(sent, waited, self._cluster.world_size)

    def meets(self, done: int) -> bool:
        """Every update is a meeting."""
        return True

    def settings(self) -> list[Any]:
        """There are no rounds."""
        return ["ddp"]

    def is_agreed(self) -> bool:
        """All ranks hold the same weights after every update."""
        return True

    def agreed_weights(self) -> AbstractContextManager[None]:
        """They are in the model."""
        return nullcontext()

    def state(self) -> SyncState:
        """What compression still owes to the gradients."""
        own: dict[str, torch.Tensor] = {}
        for averager, parts in self._averagers.values():
            own |= averager.lost(parts)
        facts = {"ranks": self._cluster.world_size} if self.has_own_state else {}
        return SyncState(facts, own={key: tensor.clone() for key, tensor in own.items()})

    def load_state(self, saved: SavedSync) -> None:
        """See `state`."""
        if not self.has_own_state or not saved.is_of(self):
            return
        if saved.world_size == self._cluster.world_size:
            self._lost = saved.own_of(self._cluster.rank)
        else:
            self._lost = dealt_out(saved, self._cluster)


class PowerSGD(AllReduce):
    """Gradients approximated by matrices of low rank (arXiv 1905.13727), by PyTorch's own hook.

    What the approximation loses is added to the next gradient.
    """

    def __init__(self, cluster: Cluster, model: Any, rank: int) -> None:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState

        # The hook's first updates, which set it up, are not compressed; it wants two of them.
        self._powersgd = PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=2, min_compression_rate=1
        )
        super().__init__(cluster, model, CODECS["none"])
        self.has_own_state = cluster.world_size > 1

    def _register(self) -> None:
        self._model.register_comm_hook(None, self._hook)

    def _exchange(self, bucket: Any) -> torch.futures.Future[torch.Tensor]:
        from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import powerSGD_hook

        if self.is_priming:
            return super()._exchange(bucket)
        self._last_began = time.perf_counter()
        before = self._sent_values(bucket)
        future = powerSGD_hook(self._powersgd, bucket)
        values = self._sent_values(bucket) - before
        world = self._cluster.world_size
        self._channel.bytes_sent += 2 * (world - 1) * 4 * values // world
        return future.then(self._note_end)

    def _note_end(self, future: torch.futures.Future[torch.Tensor]) -> torch.Tensor:
        self._last_ended = time.perf_counter()
        return future.value()

    def _sent_values(self, bucket: Any) -> int:
        """Values that the hook has given to all-reduces so far."""
        if self._powersgd.iter < self._powersgd.start_powerSGD_iter:
            return 0
        return self._powersgd.total_numel_after_compression

    def state(self) -> SyncState:
        """The matrices of the last update, and what they have lost."""
        state = self._powersgd
        own = {
            f"{kind}.{bucket}": tensor.detach().cpu().clone()
            for kind, tensors in self._matrices().items()
            for bucket, tensor in tensors.items()
        }
        return SyncState(
            {"ranks": self._cluster.world_size, "powersgd_updates": state.iter}, own=own
        )

    def _matrices(self) -> dict[str, dict[int, torch.Tensor]]:
        state = self._powersgd
        return {"error": state.error_dict, "p": state.p_memory_dict, "q": state.q_memory_dict}

    def load_state(self, saved: SavedSync) -> None:
        """See `state`. Ranks of another number deal out among them what was lost."""
        rank, world = self._cluster.rank, self._cluster.world_size
        if not self.has_own_state or "powersgd_updates" not in saved.facts:
            return
        self._powersgd.iter = saved.facts["powersgd_updates"]
        device = self._cluster.device
        for key, tensor in saved.own_of(rank % saved.world_size).items():
            kind, _, number = key.partition(".")
            if kind in self._matrices():
                self._matrices()[kind][int(number)] = tensor.to(device)
        if saved.world_size == world:
            return
        # Errors are added to gradients that are averaged: their sum by the number of ranks stays.
        for bucket, error in self._powersgd.error_dict.items():
            error.zero_()
            for other in range(rank, saved.world_size, world):
                error += (
                    saved.own_of(other)[f"error.{bucket}"].to(device) * world / saved.world_size
                )


def parameters_of(model: Any) -> list[tuple[str, torch.nn.Parameter]]:
    """The model's own names and parameters, seen through DDP's and the loss's wrapping."""
    prefixes = ("module.", "lm.")
    found = []
    for name, parameter in model.named_parameters():
        for prefix in prefixes:
            name = name.removeprefix(prefix)
        found.append((name, parameter))
    return found


def _split(
    flat: torch.Tensor, prefix: str, parts: list[tuple[str, int]]
) -> dict[str, torch.Tensor]:
    """A flat vector as one vector for each (name, size) of `parts`."""
    pieces = flat.split([size for _, size in parts])
    return {prefix + name: piece for (name, _), piece in zip(parts, pieces, strict=True)}


def _joined(
    named: dict[str, torch.Tensor], prefix: str, parts: list[tuple[str, int]]
) -> torch.Tensor:
    """The inverse of `_split`; what is missing is zero."""
    missing = torch.zeros
    return torch.cat([named.get(prefix + name, missing(size)) for name, size in parts])


# --- a round of updates alone, then one exchange --------------------------------------------------


class Fragment:
    """A part of the model that is synchronised at one moment. Tensors: flat float32, on the CPU."""

    def __init__(self, parameters: list[tuple[str, torch.nn.Parameter]], averager: Averager):
        self.parameters = parameters
        self.parts = [(name, parameter.numel()) for name, parameter in parameters]
        self.averager = averager
        self.anchor = self.weights()  # what all ranks agreed on last
        self.velocity: torch.Tensor | None = None
        self.tokens = 0  # that this rank has trained on since
        self.share = 1.0  # of this rank, of all ranks' tokens
        self.move: Future[torch.Tensor] | None = None  # of all ranks, on its way
        self.start = self.anchor  # this rank's weights when it was sent
        self.sent_at = self.lands_at = 0  # updates done when it was sent, and when it is applied

    def weights(self) -> torch.Tensor:
        """A copy of this rank's weights."""
        return torch.cat([p.detach().flatten().float().cpu() for _, p in self.parameters])

    def put(self, weights: torch.Tensor) -> None:
        """Write weights into the model."""
        parts = weights.split([size for _, size in self.parts])
        for (_, parameter), part in zip(self.parameters, parts, strict=True):
            parameter.data.copy_(part.view_as(parameter))


class DiLoCo:
    """Rounds of `--sync-every` updates that every rank takes alone, each ended by an outer step.

    DiLoCo, arXiv 2311.08105 (and OpenDiLoCo, arXiv 2407.07852): the peers' moves (weights agreed on
    last minus weights now) are averaged by the tokens they were trained on, and an outer SGD with
    Nesterov momentum takes the average as its gradient. A round is all or nothing: unless every
    rank's move is finite, all go back to the weights they agreed on last.

    With `--fragments` one part of the layers is synchronised at a time, and with `--overlap-steps`
    training goes on while the move travels (Streaming DiLoCo, arXiv 2501.18512). The outer step is
    then added to the weights that the rank has by then, so its updates meanwhile count in the next
    round.
    """

    has_own_state = trains_alone = may_lose_rounds = True

    def __init__(
        self,
        config: TrainConfig,
        cluster: Cluster,
        model: Any,
        lm: Any,
        optimizer: Any,
        total: int,
        done: int,
    ) -> None:
        self._cluster, self._config, self._optimizer = cluster, config, optimizer
        self._every = config.round_length()
        self._warmup, self._total, self._done = config.ddp_warmup_steps, total, done
        self._warm = AllReduce(cluster, model, CODECS["none"])
        self._channel = cluster.open_channel()
        codec = CODECS[config.compress]
        units = units_of(lm)
        sizes = [sum(p.numel() for _, p in unit) for unit in units]
        self._fragments = []
        for numbers in fragments_of(sizes, config.fragments):
            parameters = [entry for number in numbers for entry in units[number]]
            count = sum(p.numel() for _, p in parameters)
            self._fragments.append(Fragment(parameters, Averager(self._channel, codec, count)))
        self._bytes_before = 0
        self._lost_rounds = 0  # in a row

    def context(self, is_last_micro_batch: bool) -> AbstractContextManager[Any]:
        """No gradient is exchanged after the warm-up."""
        if self._cluster.world_size == 1:
            return nullcontext()
        return self._warm.context(is_last_micro_batch and self._done < self._warmup)

    def priming(self) -> AbstractContextManager[None]:
        """See `AllReduce.priming`."""
        return self._warm.priming()

    def loss_scale(self, own_tokens: int, tokens_per_update: int) -> float:
        """The mean over the tokens of this rank alone, but for the warm-up."""
        if self._done < self._warmup:
            return self._warm.loss_scale(own_tokens, tokens_per_update)
        return 1 / own_tokens

    def after_update(self, step: int, own_tokens: int) -> SyncReport:
        """Apply the move that lands now, send that which is due. All at once after the last."""
        self._done = done = step + 1
        if done <= self._warmup:
            if done == self._warmup:
                self._agree()
            return self._warm.after_update(step, own_tokens)
        for fragment in self._fragments:
            fragment.tokens += own_tokens
        is_last = done == self._total
        waited = sum(
            self._land(fragment)
            for fragment in self._fragments
            if fragment.move and (is_last or fragment.lands_at == done)
        )
        due = self._due(done)
        if due and self._all_finite(due):
            for fragment in due:
                self._send(fragment, done + (0 if is_last else self._config.overlap_steps))
            waited += sum(self._land(f) for f in due if f.move and f.lands_at == done)
        sent = self._channel.bytes_sent - self._bytes_before
        self._bytes_before += sent
        return SyncReport(sent, waited, self._cluster.world_size)

    def _due(self, done: int) -> list[Fragment]:
        if done == self._total:
            return self._fragments
        numbers = fragment_due(done, self._every, len(self._fragments))
        return [self._fragments[number] for number in numbers]

    def _all_finite(self, due: list[Fragment]) -> bool:
        """Whether the round may go on; else every rank goes back. Waits for slower ranks."""
        is_finite = all(bool(fragment.weights().isfinite().all()) for fragment in due)
        tokens = [fragment.tokens for fragment in due]
        # Over the store: it waits for as long as a slow rank that lives needs.
        told = self._cluster.gather_facts({"is_finite": is_finite, "tokens": tokens})
        for number, fragment in enumerate(due):
            fragment.share = fragment.tokens / sum(fact["tokens"][number] for fact in told)
        bad = [rank for rank, fact in enumerate(told) if not fact["is_finite"]]
        self._lost_rounds = self._lost_rounds + 1 if bad else 0
        if self._lost_rounds == LOST_ROUNDS_IN_A_ROW:
            raise ForgeError(
                f"weights became NaN or infinite in {LOST_ROUNDS_IN_A_ROW} rounds in a row (now on"
                f" rank {bad[0]}); earlier checkpoints are untouched. Lower --learning-rate, raise"
                " --warmup-steps or set --max-grad-norm 1, then go on with --resume auto"
            )
        if bad:
            self._go_back()
        return not bad

    def _send(self, fragment: Fragment, lands_at: int) -> None:
        fragment.start, fragment.sent_at, fragment.lands_at = (
            fragment.weights(),
            self._done,
            lands_at,
        )
        move = (fragment.anchor - fragment.start).mul_(fragment.share)
        fragment.tokens = 0
        fragment.move = self._channel.in_background(lambda: fragment.averager.sum(move))

    def _land(self, fragment: Fragment) -> float:
        """Take the outer step with the move that was sent. Returns the seconds that it waited."""
        assert fragment.move is not None
        began = time.perf_counter()
        fragment.move.result()
        waited = time.perf_counter() - began
        before = fragment.start
        if not self._step(fragment):
            self._go_back()
        elif fragment.sent_at == self._done:
            fragment.put(fragment.anchor)
        else:
            fragment.put(fragment.weights() + (fragment.anchor - before))
        return waited

    def _step(self, fragment: Fragment) -> bool:
        """The outer step of a fragment whose move has arrived; False if its result is not finite.

        All ranks compute it on the same bits, so it is so on all or on none.
        """
        assert fragment.move is not None
        move, fragment.move = fragment.move.result(), None
        anchor, velocity = outer_step(
            fragment.anchor, move, fragment.velocity, self._config.outer_lr, self._momentum()
        )
        if not anchor.isfinite().all():
            fragment.averager.forget()
            return False
        fragment.anchor, fragment.velocity = anchor, velocity
        return True

    def _go_back(self) -> None:
        """Give up the updates since the last agreement, on all ranks."""
        for fragment in self._fragments:
            if fragment.move:
                self._step(fragment)
            fragment.put(fragment.anchor)
            fragment.tokens = 0
        state = self._optimizer.state
        if not all(
            value.isfinite().all()
            for entries in state.values()
            for value in entries.values()
            if isinstance(value, torch.Tensor)
        ):
            state.clear()

    def _agree(self) -> None:
        """Take the weights, which are the same on all ranks, as agreed on."""
        for fragment in self._fragments:
            fragment.anchor = fragment.weights()

    def _momentum(self) -> float:
        return self._config.outer_momentum

    def meets(self, done: int) -> bool:
        """The ranks wait for each other where something is sent."""
        return done <= self._warmup or bool(self._due(done))

    def is_agreed(self) -> bool:
        """Whether nobody has trained alone since the last agreement."""
        return not any(fragment.tokens or fragment.move for fragment in self._fragments)

    @contextlib.contextmanager
    def agreed_weights(self) -> Iterator[None]:
        """See `Sync`."""
        if self._done <= self._warmup or self.is_agreed():
            yield
            return
        own = [fragment.weights() for fragment in self._fragments]
        for fragment in self._fragments:
            fragment.put(fragment.anchor)
        try:
            yield
        finally:
            for fragment, weights in zip(self._fragments, own, strict=True):
                fragment.put(weights)

    def state(self) -> SyncState:
        """The velocity, and of each rank what it has done alone. Waits for what is sent."""
        fragments, is_agreed = self._fragments, self.is_agreed()
        shared: dict[str, torch.Tensor] = {}
        own = {"tokens": torch.tensor([fragment.tokens for fragment in fragments])}
        for fragment in fragments:
            if fragment.velocity is not None:
                shared |= _split(fragment.velocity, "velocity.", fragment.parts)
            own |= fragment.averager.lost(fragment.parts)
            if not is_agreed:
                own |= _split(fragment.weights(), "weights.", fragment.parts)
            if fragment.move:
                shared |= _split(fragment.move.result(), "move.", fragment.parts)
                own |= _split(fragment.start, "start.", fragment.parts)
        facts = {
            "is_agreed": is_agreed,
            "ranks": self._cluster.world_size,
            "lost_rounds": self._lost_rounds,
            "sent_at": [fragment.sent_at for fragment in fragments],
            "lands_at": [fragment.lands_at if fragment.move else 0 for fragment in fragments],
        }
        # Parts of one flat tensor: the file format wants each to have memory of its own.
        return SyncState(
            facts,
            {key: tensor.clone() for key, tensor in shared.items()},
            {key: tensor.clone() for key, tensor in own.items()},
        )

    def settings(self) -> list[Any]:
        """What must be the same where a round is taken up in its middle."""
        return ["diloco", self._every, len(self._fragments), self._config.overlap_steps]

    def load_state(self, saved: SavedSync) -> None:
        """See `state`. The weights in the model are those that all agree on."""
        self._agree()
        if not saved.is_of(self):
            return
        self._lost_rounds = saved.facts["lost_rounds"]
        is_same = (
            saved.facts["strategy"] == self.settings()
            and saved.world_size == self._cluster.world_size
        )
        own = saved.own_of(self._cluster.rank) if is_same else dealt_out(saved, self._cluster)
        for number, fragment in enumerate(self._fragments):
            fragment.averager.restore(own, fragment.parts)
            if any(key.startswith("velocity.") for key in saved.shared):
                fragment.velocity = _joined(saved.shared, "velocity.", fragment.parts)
            if not is_same:
                continue
            fragment.tokens = int(own["tokens"][number])
            if not saved.facts["is_agreed"]:
                fragment.put(_joined(own, "weights.", fragment.parts))
            fragment.sent_at = saved.facts["sent_at"][number]
            fragment.lands_at = saved.facts["lands_at"][number]
            if fragment.lands_at:
                fragment.start = _joined(own, "start.", fragment.parts)
                fragment.move = Future()
                fragment.move.set_result(_joined(saved.shared, "move.", fragment.parts))


def units_of(lm: Any) -> list[list[tuple[str, torch.nn.Parameter]]]:
    """The model's parameters in the parts that a fragment is made of: what comes before the layers
    (embeddings), each layer, what comes after. Tied weights count where they come first."""
    stacks = [
        (name, len(module))
        for name, module in lm.named_modules()
        if isinstance(module, torch.nn.ModuleList)
    ]
    stack, layers = max(stacks, key=lambda entry: entry[1], default=("", 0))
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
