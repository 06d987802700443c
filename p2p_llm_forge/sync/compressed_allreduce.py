"""Sums over all ranks of long vectors, compressed on the wire; what is lost is sent later."""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable

import torch

from p2p_llm_forge.peers.channel import Channel
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.sync.base import SavedSync
from p2p_llm_forge.sync.compress import Codec, ErrorFeedback

PIECE = 2**18  # values of one exchange
AHEAD = 3  # sums that stay on their way while the next is made
Waiting = Callable[[], torch.Tensor]  # gives what arrives, once it has
SENDING, IN_SUM = "lost_sending.", "lost_in_sum."  # and the parameter's name


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
        return self.finish(self.begin(values))

    def begin(self, values: torch.Tensor) -> deque[Waiting]:
        """Begin to send `values` (see `sum`) to the owners of their shards; `finish` takes it.

        All pieces at once: a link that waits for a CPU, for an answer or for a lost packet carries
        nothing. (One piece at a time used less than half of 50 Mbit/s.)
        """
        if self._channel.world_size == 1:  # alone there is no wire, so nothing is encoded
            return deque([lambda: values])
        pieces = self._rows(values).split(self._piece, dim=1)
        return deque(
            self._channel.all_to_all(sending.encode(self._codec, piece.contiguous()))
            for piece, (sending, _) in zip(pieces, self._owed, strict=True)
        )

    def finish(self, dealt: deque[Waiting]) -> torch.Tensor:
        """The sum over all ranks of what they have begun to send. (count) float32."""
        codec, channel = self._codec, self._channel
        if channel.world_size == 1:
            return dealt.popleft()()
        summed = torch.empty(channel.world_size, self._width)
        pieces, shared = deque(summed.split(self._piece, dim=1)), deque[Waiting]()
        for _, in_sum in self._owed:
            shard = codec.decode(dealt.popleft()()).sum(0)
            shared.append(channel.all_gather(in_sum.encode(codec, shard)))
            if len(shared) > AHEAD:
                pieces.popleft().copy_(codec.decode(shared.popleft()()))
        for piece, rows in zip(pieces, shared, strict=True):
            piece.copy_(codec.decode(rows()))
        return summed.view(-1)[: self._count]

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
        return split_by_name(in_sending.view(-1)[: self._count], SENDING, parts) | split_by_name(
            in_sum.view(-1)[: self._count], IN_SUM, parts
        )

    def restore(self, lost: dict[str, torch.Tensor], parts: list[tuple[str, int]]) -> None:
        """Go on with what was lost (see `lost`); what is not named there is zero."""
        if not lost or not self._codec.is_lossy:
            return
        rows = [self._rows(joined(lost, kind, parts)) for kind in (SENDING, IN_SUM)]
        for number, (sending, in_sum) in enumerate(self._owed):
            piece = slice(number * self._piece, (number + 1) * self._piece)
            sending.residual = rows[0][:, piece].clone()
            in_sum.residual = rows[1][self._channel.rank, piece].clone()

    def forget(self) -> None:
        """Owe nothing any more."""
        for owed in self._owed:
            for feedback in owed:
                feedback.residual = None


def dealt_out(saved: SavedSync, cluster: Cluster) -> dict[str, torch.Tensor]:
    """This rank's part of what the ranks of another number had lost: the sum stays the same."""
    dealt: dict[str, torch.Tensor] = {}
    for rank in range(cluster.rank, saved.world_size, cluster.world_size):
        for key, lost in saved.own_of(rank).items():
            if key.startswith((SENDING, IN_SUM)):
                name = SENDING + key.partition(".")[2]
                dealt[name] = dealt[name] + lost if name in dealt else lost
    return dealt


def split_by_name(
    flat: torch.Tensor, prefix: str, parts: list[tuple[str, int]]
) -> dict[str, torch.Tensor]:
    """A flat vector as one vector for each (name, size) of `parts`."""
    pieces = flat.split([size for _, size in parts])
    return {prefix + name: piece for (name, _), piece in zip(parts, pieces, strict=True)}


def joined(
    named: dict[str, torch.Tensor], prefix: str, parts: list[tuple[str, int]]
) -> torch.Tensor:
    """The inverse of `split_by_name`; what is missing is zero."""
    missing = torch.zeros
    return torch.cat([named.get(prefix + name, missing(size)) for name, size in parts])


def is_finite(values: torch.Tensor) -> bool:
    """Whether no value is NaN or infinite; the extremes tell, and no mask is made."""
    low, high = values.aminmax()
    return math.isfinite(low) and math.isfinite(high)
