"""Sums of long vectors over all ranks, compressed on the wire, with error feedback."""

from __future__ import annotations

from collections import deque
from itertools import accumulate

import torch
from torch import Tensor

from p2p_llm_forge.files import fingerprint
from p2p_llm_forge.peers.channel import Channel, Waiting
from p2p_llm_forge.sync.base import SavedSync
from p2p_llm_forge.sync.compress import Codec, ErrorFeedback

CHUNK = 2**18  # values of one exchange
AHEAD = 3  # sums that stay on their way while the next is made
Parts = list[tuple[str, int]]  # names and sizes of the parameters that make up a vector
OF_SENDING, OF_SUM = "residual_of_sending.", "residual_of_sum."  # and the parameter's name


class CompressedAllReduce:
    """Sums over all ranks of vectors of one length, encoded on the wire.

    The vector is cut into one shard for each rank. Every rank sends each shard to its owner, which
    adds the decoded shards in float32 and sends the encoded sum to all (the two phases of 1-bit
    Adam's compressed all-reduce, arXiv 2102.02888): 2 (ranks - 1) / ranks of the encoded vector
    leave every rank. What encoding drops in either phase, the residual, is added the next time
    (error feedback, arXiv 1901.09847). All ranks get the same bits.
    """

    def __init__(self, channel: Channel, codec: Codec, parts: Parts) -> None:
        self._channel, self._codec, self._parts = channel, codec, parts
        self._count, self.label = sum(size for _, size in parts), fingerprint(parts)
        unit = channel.world_size * codec.group
        self._width = -(-self._count // unit) * codec.group
        self._chunk = max(1, CHUNK // unit) * codec.group
        self.drop_residuals()

    def drop_residuals(self) -> None:
        """Begin error feedback from scratch, as after values that were not finite."""
        # Of each chunk: residuals of sending (ranks, chunk) and of this rank's sum (chunk).
        self._feedback = [
            (ErrorFeedback(), ErrorFeedback()) for _ in range(0, self._width, self._chunk)
        ]

    def begin(self, values: Tensor) -> deque[Waiting]:
        """Begin to send `values` to the owners of their shards; `finish` takes what is returned.

        values: (count) float32 on the CPU, finite. All chunks are sent at once: a link that waits
        for a CPU, for an answer or for a lost packet carries nothing. (One chunk at a time used
        less than half of 50 Mbit/s.)
        """
        if self._channel.world_size == 1:  # alone there is no wire, so nothing is encoded
            return deque([lambda: values])
        chunks = self._rows(values).split(self._chunk, dim=1)
        return deque(
            self._channel.all_to_all(of_sending.encode(self._codec, chunk.contiguous()), self.label)
            for chunk, (of_sending, _) in zip(chunks, self._feedback, strict=True)
        )

    def finish(self, begun: deque[Waiting]) -> Tensor:
        """The sum over all ranks of what they have begun to send. (count) float32."""
        codec, channel = self._codec, self._channel
        if channel.world_size == 1:
            return begun.popleft()()
        summed = torch.empty(channel.world_size, self._width)
        chunks, on_their_way = deque(summed.split(self._chunk, dim=1)), deque[Waiting]()
        for _, of_sum in self._feedback:
            shard = codec.decode(begun.popleft()()).sum(0)
            on_their_way.append(channel.all_gather(of_sum.encode(codec, shard), self.label))
            if len(on_their_way) > AHEAD:
                chunks.popleft().copy_(codec.decode(on_their_way.popleft()()))
        for chunk, rows in zip(chunks, on_their_way, strict=True):
            chunk.copy_(codec.decode(rows()))
        return summed.view(-1)[: self._count]

    def _rows(self, values: Tensor) -> Tensor:
        """The vector as (ranks, width), filled up with zeros."""
        missing = self._channel.world_size * self._width - len(values)
        return torch.nn.functional.pad(values, (0, missing)).view(-1, self._width)

    def residuals(self) -> dict[str, Tensor]:
        """This rank's residuals, of sending and of its shard of the sum; by parameter."""
        if any(of_sending.residual is None for of_sending, _ in self._feedback):
            return {}
        sending = torch.cat([of_sending.residual for of_sending, _ in self._feedback], dim=1)  # type: ignore[misc]
        in_sum = torch.zeros_like(sending)
        in_sum[self._channel.rank] = torch.cat([of_sum.residual for _, of_sum in self._feedback])  # type: ignore[misc]
        of_sending = split_by_name(sending.view(-1), OF_SENDING, self._parts)
        return of_sending | split_by_name(in_sum.view(-1), OF_SUM, self._parts)

    def restore(self, residuals: dict[str, Tensor]) -> None:
        """Resume with residuals (see `residuals`); what is not named there is zero."""
        if not residuals or not self._codec.is_lossy:
            return
        sending, in_sum = (
            self._rows(joined_by_name(residuals, kind, self._parts)).split(self._chunk, dim=1)
            for kind in (OF_SENDING, OF_SUM)
        )
        self._feedback = [
            (ErrorFeedback(rows.clone()), ErrorFeedback(sums[self._channel.rank].clone()))
            for rows, sums in zip(sending, in_sum, strict=True)
        ]


def split_by_name(flat: Tensor, prefix: str, parts: Parts) -> dict[str, Tensor]:
    """A flat vector as one vector for each (name, size) of `parts`; what is behind them is left."""
    ends = accumulate(size for _, size in parts)
    # Copies: the file format of checkpoints wants each to have memory of its own.
    return {
        prefix + name: flat[end - size : end].clone()
        for (name, size), end in zip(parts, ends, strict=True)
    }


def joined_by_name(named: dict[str, Tensor], prefix: str, parts: Parts) -> Tensor:
    """The inverse of `split_by_name`; what is missing is zero."""
    return torch.cat([named.get(prefix + name, torch.zeros(size)) for name, size in parts])


def redistributed_residuals(saved: SavedSync, rank: int, world_size: int) -> dict[str, Tensor]:
    """The residuals of error feedback that rank `rank` of `world_size` resumes with, by parameter,
    where the vectors are now cut into other shards. The sum over all ranks stays the same."""
    residuals: dict[str, Tensor] = {}
    for other in range(rank, saved.world_size, world_size):
        for key, residual in saved.own_of(other).items():
            if key.startswith((OF_SENDING, OF_SUM)):
                name = OF_SENDING + key.partition(".")[2]
                residuals[name] = residuals[name] + residual if name in residuals else residual
    return residuals


def is_finite(values: Tensor) -> bool:
    """Whether no value is NaN or infinite; the extremes decide, and no mask is made."""
    return bool(torch.stack(values.aminmax()).isfinite().all())
