"""Gradients averaged over all ranks in every update, by DDP while backward runs."""

from __future__ import annotations

import contextlib
import time
from collections.abc import Callable, Iterator
from concurrent.futures import CancelledError, Future
from contextlib import AbstractContextManager
from typing import Any

import torch
from accelerate import DistributedDataParallelKwargs
from torch import Tensor
from torch.distributed.algorithms.ddp_comm_hooks import default_hooks, powerSGD_hook

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.files import fingerprint
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.rank_failure import RankFailure
from p2p_llm_forge.sync.allreduce import AllReduce
from p2p_llm_forge.sync.base import SavedSync, Sync, SyncReport, SyncState
from p2p_llm_forge.sync.compress import CODECS, Codec
from p2p_llm_forge.sync.compressed_allreduce import (
    CompressedAllReduce,
    is_finite,
    redistributed_residuals,
)

# Megabytes of gradients that DDP exchanges at once: its own, and where they are compressed, when an
# exchange begins while the one before is being finished. There smaller ones leave earlier while
# backward runs; an all-reduce, which waits for its end, takes longer in small ones. (Trials at 50
# Mbit/s, 13.9 M parameters: int8 in halves and small buckets 3.16 s an update, in one piece and
# large ones 3.27 s; plain 13.1 s in small ones, 10.9 s in large ones.)
BUCKET_MB, COMPRESSED_BUCKET_MB = 25, 10
# Adapters are small enough for a single bucket, none of which could leave before backward is over.
BUCKETS_OF_ADAPTERS, LEAST_BUCKET_MB = 8, 0.25


def settle_ddp(config: TrainConfig, cluster: Cluster, model: torch.nn.Module) -> None:
    """Set, before Accelerate wraps a model in DDP, what DDP exchanges itself: on gloo nothing.

    It would send weights, shapes and the order of its buckets, and never encrypts. Its group is
    this rank alone; weights go by `share_first_weights`, gradients by GradientAveraging's hook.
    """
    accelerator = cluster.accelerator
    accelerator.ddp_handler.bucket_cap_mb = bucket_mb(config, cluster, model)
    if cluster.is_on_gloo and cluster.world_size > 1:
        arguments = {**accelerator.ddp_handler.to_kwargs(), "process_group": cluster.own_group()}

        class OfThisRank(DistributedDataParallelKwargs):
            """Accelerate's handler has no field for the group."""

            def to_kwargs(self) -> dict[str, Any]:
                return arguments

        accelerator.ddp_handler = OfThisRank()


def bucket_mb(config: TrainConfig, cluster: Cluster, model: torch.nn.Module) -> float:
    """Megabytes of gradients that are exchanged at once."""
    by_halves = config.sync == "ddp" and config.compress not in ("none", "powersgd")
    most = COMPRESSED_BUCKET_MB if by_halves and cluster.is_on_gloo else BUCKET_MB
    if not config.lora_rank:
        return most
    trained = sum(one.nbytes for one in model.parameters() if one.requires_grad)
    return min(most, max(LEAST_BUCKET_MB, trained / 2**20 / BUCKETS_OF_ADAPTERS))


def share_first_weights(cluster: Cluster, model: torch.nn.Module) -> None:
    """Give rank 0's trained parameters, and buffers, to all, where DDP does not. All must call.

    What is not trained stays: every rank has read the same, or no text reaches it.
    """
    trained = {name: one for name, one in model.named_parameters() if one.requires_grad}
    if cluster.is_on_gloo and cluster.world_size > 1:
        cluster.send_from_main_({**trained, **dict(model.named_buffers())})
    else:
        stays = [name for name, _ in model.named_parameters() if name not in trained]
        # DDP (torch 2.13) sends all others when it is made.
        model._ddp_params_and_buffers_to_ignore = stays  # type: ignore[assignment]


class GradientAveraging(Sync):
    """Gradients averaged over all ranks in every update, by DDP while backward runs."""

    _failure: BaseException | None = None  # of the first exchange that failed

    def __init__(
        self, cluster: Cluster, model: Any, codec: Codec, *, leaves_to_nccl: bool = True
    ) -> None:
        """leaves_to_nccl: what it can do, where there is a GPU."""
        self._cluster, self._model, self._codec = cluster, model, codec
        self._world_size = cluster.world_size
        self._channel = cluster.open_channel()
        self._names = {
            parameter: name.removeprefix("module.").removeprefix("lm.")  # of DDP, of the loss
            for name, parameter in model.named_parameters()
        }
        self._reductions: dict[int, AllReduce | CompressedAllReduce] = {}  # by bucket
        self._saved_residuals: dict[str, Tensor] = {}  # of the checkpoint, by parameter
        self._bytes_before = self._bytes_by_nccl = 0
        self._last_began = self._last_ended = 0.0
        self.is_priming = False
        self.has_own_state = codec.is_lossy and self._world_size > 1
        if self._world_size == 1:
            return
        # Set here because the constructor's argument has two names (renamed in torch 2.13). A
        # language model's buffers are constants: sending them in every forward costs a slow link a
        # round trip.
        model.broadcast_buffers = False
        # On gloo by the ranks' own code, also on a GPU: its peers may be without one.
        if cluster.is_on_gloo or codec.group > 1 or not leaves_to_nccl:
            # Without annotations: DDP (torch 2.13) compares them, and here they are strings.
            model.register_comm_hook(None, lambda state, bucket: self._exchange(bucket))
            return
        if codec.name == "bf16":
            model.register_comm_hook(None, default_hooks.bf16_compress_hook)
        # NCCL's all-reduces are not ours to count: their size is known, their waiting is not.
        values, world = sum(p.numel() for p in self._names if p.requires_grad), self._world_size
        self._bytes_by_nccl = 2 * (world - 1) * codec.wire_bytes(values) // world

    def context(self, is_last_micro_batch: bool) -> AbstractContextManager[Any]:
        """Only an update's last micro-batch exchanges gradients."""
        accelerator = self._cluster.accelerator
        return self._exchanging() if is_last_micro_batch else accelerator.no_sync(self._model)

    @contextlib.contextmanager
    def _exchanging(self) -> Iterator[None]:
        """Raise what an exchange has raised: of that, DDP (torch 2.13) leaves a text."""
        try:
            yield
        except Exception as error:
            if self._failure is not None:
                raise self._failure from error
            raise

    def loss_scale(self, own_tokens: int, tokens_per_update: int) -> float:
        """DDP averages over the ranks; what is wanted is the mean over all tokens."""
        return self._world_size / tokens_per_update

    @contextlib.contextmanager
    def priming(self) -> Iterator[None]:
        """Backward without any exchange, in which DDP learns in which order gradients come.

        It cuts them into other buckets after its first backward (torch 2.13). A resumed run would
        add in another order there than the run that it resumes.
        """
        self.is_priming = True
        try:
            yield
        finally:
            self.is_priming = False

    def _exchange(self, bucket: Any) -> torch.futures.Future[Tensor]:
        """DDP's communication hook: called for one bucket after the other, while backward runs."""
        buffer = bucket.buffer()
        devices = None if buffer.device.type == "cpu" else [buffer.device]
        future: torch.futures.Future[Tensor] = torch.futures.Future(devices=devices)
        if self.is_priming:
            future.set_result(buffer)
            return future
        self._last_began = time.perf_counter()
        begin, finish = self._exchange_of(bucket)

        def pass_on(exchanged: Future[Tensor]) -> None:
            self._last_ended = time.perf_counter()
            # Raised where DDP waits. Cancelled is what had not begun when the run ended.
            if error := CancelledError() if exchanged.cancelled() else exchanged.exception():
                self._failure = self._failure or error
                future.set_exception(error)  # type: ignore[arg-type]
            else:
                future.set_result(exchanged.result())

        without_grad = torch.no_grad()
        exchange = self._channel.in_background(without_grad(begin), without_grad(finish))
        exchange.add_done_callback(pass_on)
        return future

    def _exchange_of(self, bucket: Any) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
        """What begins to average this bucket's buffer, and what finishes it and returns it."""
        world, buffer, index = self._world_size, bucket.buffer(), bucket.index()
        is_new = index not in self._reductions
        if is_new:
            self._reductions[index] = self._reduction_of(bucket)
        reduction = self._reductions[index]

        def begin() -> Any:
            if is_new:
                self._refuse_other_buckets(reduction.label, index)
            own = buffer.div_(world).cpu()
            return reduction.begin(own if isinstance(reduction, AllReduce) else own.float())

        def finish(begun: Any) -> Tensor:
            summed = reduction.finish(begun)
            if isinstance(reduction, CompressedAllReduce) and not is_finite(summed):
                reduction.drop_residuals()  # loss scaling skips this update; NaN must not stay
            return buffer.copy_(summed)

        return begin, finish

    def _reduction_of(self, bucket: Any) -> AllReduce | CompressedAllReduce:
        parts = [(self._names[p], p.numel()) for p in bucket.parameters()]
        if self._codec.name == "none":
            return AllReduce(self._channel, fingerprint(parts))
        reduction = CompressedAllReduce(self._channel, self._codec, parts)
        reduction.restore(self._saved_residuals)
        return reduction

    def _refuse_other_buckets(self, label: str, index: int) -> None:
        """Raise RankFailure if a rank's bucket holds other gradients: each rank orders its own."""
        own = torch.frombuffer(bytearray(label.encode()), dtype=torch.uint8)
        by_rank = self._channel.all_to_all(own.repeat(self._world_size, 1))()
        others = [rank for rank, one in enumerate(by_rank) if not torch.equal(one, own)]
        if others:
            found = f"the gradients of rank {others[0]} come in another order than those of rank"
            found = f"{found} {self._cluster.rank} (bucket {index})"
            raise RankFailure(found, "give all ranks the same kind of device, and --backend gloo")

    def after_update(self, step: int, own_tokens: int) -> SyncReport:
        """Nothing is left to do: DDP exchanged the gradients during backward."""
        sent = self._channel.bytes_sent - self._bytes_before
        self._bytes_before += sent
        # The last bucket is ready when backward is over; from then on everybody waits.
        waited = max(0.0, self._last_ended - self._last_began)
        return SyncReport(sent + self._bytes_by_nccl, waited)

    def settings(self) -> dict[str, Any]:
        return {"sync": "ddp"}

    def state(self) -> SyncState:
        """The residuals of compressed gradients."""
        own: dict[str, Tensor] = {}
        for reduction in self._reductions.values():
            if isinstance(reduction, CompressedAllReduce):
                own |= reduction.residuals()
        facts = {"ranks": self._world_size} if self.has_own_state else {}
        return SyncState(facts, own=own)

    def load_state(self, saved: SavedSync) -> None:
        if not self.has_own_state or not saved.is_of(self):
            return
        rank, world = self._cluster.rank, self._world_size
        is_same = saved.world_size == world
        self._saved_residuals = (
            saved.own_of(rank) if is_same else redistributed_residuals(saved, rank, world)
        )


class PowerSGD(GradientAveraging):
    """Gradients approximated by matrices of low rank (arXiv 1905.13727), by PyTorch's own hook.

    What the approximation drops is added to the next gradient (error feedback).
    """

    def __init__(self, cluster: Cluster, model: Any, rank: int) -> None:
        # The hook's first updates, which set it up, are not compressed; it wants two of them.
        self._powersgd = powerSGD_hook.PowerSGDState(
            None, matrix_approximation_rank=rank, start_powerSGD_iter=2, min_compression_rate=1
        )
        super().__init__(cluster, model, CODECS["none"], leaves_to_nccl=False)
        self.has_own_state = self._world_size > 1

    def _exchange_of(self, bucket: Any) -> tuple[Callable[[], Any], Callable[[Any], Tensor]]:
        def average(_: Any) -> Tensor:
            world, before = self._world_size, self._powersgd.total_numel_after_compression
            # The hook chains all-reduces, and those of two buckets under way at once meet each
            # other's on gloo (torch 2.13): here one bucket is done before the next begins.
            with self._cluster.exchange():
                averaged = powerSGD_hook.powerSGD_hook(self._powersgd, bucket).wait()
            compressed = self._powersgd.total_numel_after_compression - before
            values = compressed or bucket.buffer().numel()
            self._channel.count(2 * (world - 1) * 4 * values // world)
            if not is_finite(averaged):  # see GradientAveraging
                for tensors in self._matrices().values():
                    tensors.pop(bucket.index(), None)
            return averaged

        return lambda: None, average

    def state(self) -> SyncState:
        """The matrices of the last update, and the residuals of what they approximate."""
        if not self.has_own_state:
            return SyncState()
        own = {
            f"{kind}.{bucket}": tensor.detach().cpu().clone()
            for kind, tensors in self._matrices().items()
            for bucket, tensor in tensors.items()
        }
        facts = {
            "ranks": self._world_size,
            "powersgd_updates": self._powersgd.iter,
            "powersgd_rank": self._powersgd.matrix_approximation_rank,
        }
        return SyncState(facts, own=own)

    def _matrices(self) -> dict[str, dict[int, Tensor]]:
        state = self._powersgd
        return {"error": state.error_dict, "p": state.p_memory_dict, "q": state.q_memory_dict}

    def load_state(self, saved: SavedSync) -> None:
        """See `state`. Other ranks than those that were saved redistribute the residuals.

        Matrices of another --powersgd-rank start from scratch; their residuals still count.
        """
        rank, world = self._cluster.rank, self._world_size
        if not self.has_own_state or "powersgd_updates" not in saved.facts:
            return
        self._powersgd.iter = saved.facts["powersgd_updates"]
        device, matrices = self._cluster.device, self._matrices()
        if saved.facts["powersgd_rank"] != self._powersgd.matrix_approximation_rank:
            matrices = {"error": matrices["error"]}
        for key, tensor in saved.own_of(rank % saved.world_size).items():
            kind, _, number = key.partition(".")
            if kind in matrices:
                matrices[kind][int(number)] = tensor.to(device)
        if saved.world_size == world:
            return
        # Errors are added to gradients that are averaged: their sum by the number of ranks stays.
        for error in matrices["error"].values():
            error.zero_()
        for other in range(rank, saved.world_size, world):
            own = saved.own_of(other)
            for bucket, error in matrices["error"].items():
                error += own[f"error.{bucket}"].to(device) * world / saved.world_size
