"""Float32 tensors as fewer bytes for the wire, and back; error feedback sends the rest later.

Integers share a scale among the values of a group: 256 for int8 (1.0078 bytes a value), 64 for
int4 (0.5313 bytes). On gradients and pseudo-gradients (of 20 and 40 updates) of a small GPT-2, int8
errs by 0.4 to 0.5 % of the vector's norm and int4 by 5.8 to 6.5 %; one scale for all would err by 1
to 9 % and 15 to 29 %. Scales are bfloat16: they have float32's range, and rounding them cost less
than 0.5 % more error than float32 scales of the same group.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterable

import torch
from torch import Tensor

TILE = 131_072  # values worked on at a time on a CPU: they and their scratch stay in the cache
# The least scale is the least normal float32: its inverse is finite, and no device flushes it to
# zero. So values below 2**-127 may become 0, and nothing else is special about small ones.
LEAST_SCALE = 2.0**-126


class Codec(ABC):
    """A format of float32 values in bytes. Holds no state: one instance of each serves all.

    The result depends on the values along the last dimension only, and is the same bytes on every
    call; decoding the same bytes gives the same values on every machine. What is not finite before
    encoding is not finite after decoding (with the others of its group), so no peer misses it.
    """

    name: str
    group: int = 1  # values that share a scale: counts are multiples of it
    group_bytes: int  # that they and their scale take on the wire
    is_lossy: bool = True

    def wire_bytes(self, count: int) -> int:
        """Bytes that `count` values take."""
        return count // self.group * self.group_bytes

    def encode(self, values: Tensor) -> Tensor:
        """Float32 (..., count) on any device as new uint8 (..., wire_bytes(count)) there.

        Raises ValueError for other dtypes and for counts that are no multiple of `group`.
        """
        *leading, count = values.shape
        if values.dtype != torch.float32 or count % self.group:
            wanted = f"float32 in multiples of {self.group}"
            raise ValueError(f"{self.name} encodes {wanted}, not {count} of {values.dtype}")
        size = self.wire_bytes(count)
        wire = torch.empty((*leading, size), dtype=torch.uint8, device=values.device)
        if values.numel():
            self._write(values.reshape(-1, count), wire.view(-1, size))
        return wire

    def decode(self, wire: Tensor) -> Tensor:
        """What `encode` wrote, uint8 (..., wire_bytes(count)), as new float32 (..., count).

        Raises ValueError for other dtypes and for lengths that `encode` never makes.
        """
        *leading, size = wire.shape
        if wire.dtype != torch.uint8 or size % self.group_bytes:
            raise ValueError(f"{self.name} never makes {size} of {wire.dtype}")
        count = size // self.group_bytes * self.group
        values = torch.empty((*leading, count), dtype=torch.float32, device=wire.device)
        if values.numel():
            self._read(wire.reshape(-1, size), values.view(-1, count))
        return values

    @abstractmethod
    def _write(self, values: Tensor, wire: Tensor) -> None:
        """Encode rows. values: (rows, count); wire: (rows, wire_bytes(count)), contiguous."""

    @abstractmethod
    def _read(self, wire: Tensor, values: Tensor) -> None:
        """Decode rows. wire: (rows, wire_bytes(count)); values: (rows, count), contiguous."""


class Cast(Codec):
    """A cast to another float type: float32 itself, or bfloat16, which has float32's range.

    A bfloat16 is off by at most 2**-8 of its value. Its largest is 3.39e38: the sliver of float32
    above becomes infinite, which is seen, rather than something smaller, which is not.
    """

    def __init__(self, name: str, dtype: torch.dtype) -> None:
        self.name, self.is_lossy = name, dtype != torch.float32
        self.group_bytes, self._dtype = dtype.itemsize, dtype

    def _write(self, values: Tensor, wire: Tensor) -> None:
        wire.view(self._dtype).copy_(values)

    def _read(self, wire: Tensor, values: Tensor) -> None:
        values.copy_(as_dtype(wire, self._dtype))


class Integers(Codec):
    """Whole numbers of 8 or 4 bits times a scale that a group shares; 0 stays exactly 0.

    A value is off by at most half its group's scale. The scale is the group's largest magnitude by
    `steps`: as many as keep the largest, also where rounding the scale to bfloat16 made that 2**-8
    smaller, from being rounded up to a number that does not fit.
    """

    def __init__(self, name: str, bits: int, group: int, steps: float) -> None:
        self.name, self.group, self._steps = name, group, steps
        self.group_bytes = group * bits // 8 + 2
        self._is_packed = bits == 4

    def _parts(self, wire: Tensor) -> tuple[Tensor, Tensor]:
        """The numbers (rows, groups, bytes of a group) and the scales' bytes (rows, 2 groups)."""
        groups = wire.shape[1] // self.group_bytes
        numbers, scales = wire.tensor_split([-2 * groups], dim=1)
        return numbers.view(torch.int8).unflatten(1, (groups, -1)), scales

    def _tiles(self, *parts: Tensor) -> Iterable[tuple[Tensor, ...]]:
        """Cut parts (rows, groups, ...) alike into about TILE values each; not at all on a GPU."""
        rows, groups = parts[0].shape[:2]
        wide = max(1, TILE // (rows * self.group)) if parts[0].device.type == "cpu" else groups
        return zip(*(part.split(wide, dim=1) for part in parts), strict=True)

    def _write(self, values: Tensor, wire: Tensor) -> None:
        numbers, scale_bytes = self._parts(wire)
        scales, scratch = scale_bytes.view(torch.bfloat16), torch.empty(0, device=values.device)
        grouped = values.unflatten(1, (-1, self.group))
        for tile, whole, scale in self._tiles(grouped, numbers, scales):
            largest = torch.maximum(tile.amax(-1), tile.amin(-1).neg_())  # NaN where there is one
            scale.copy_(largest.div_(self._steps).clamp_min_(LEAST_SCALE))
            if scratch.shape != tile.shape:
                scratch = torch.empty_like(tile, memory_format=torch.contiguous_format)
            torch.mul(tile, scale.float().reciprocal_().unsqueeze_(-1), out=scratch).round_()
            if self._is_packed:
                # Each number of a group's first half, plus 8, and 16 times its fellow of the second
                # half: between -111 and 127, with them in the low and the high bits of an int8.
                first, second = scratch.chunk(2, dim=-1)
                whole.copy_(first.add_(second, alpha=16).add_(8))
            else:
                whole.copy_(scratch)

    def _read(self, wire: Tensor, values: Tensor) -> None:
        numbers, scale_bytes = self._parts(wire)
        scales = as_dtype(scale_bytes, torch.bfloat16).float().unsqueeze_(-1)
        grouped = values.unflatten(1, (-1, self.group))
        for tile, whole, scale in self._tiles(grouped, numbers, scales):
            if self._is_packed:
                first, second = tile.chunk(2, dim=-1)
                first.copy_(whole & 15).sub_(8)
                second.copy_(whole >> 4)
                tile.mul_(scale)
            else:
                torch.mul(whole, scale, out=tile)


CODECS: dict[str, Codec] = {
    codec.name: codec
    for codec in (
        Cast("none", torch.float32),
        Cast("bf16", torch.bfloat16),
        Integers("int8", bits=8, group=256, steps=127.0),
        Integers("int4", bits=4, group=64, steps=7.47),
    )
}


class ErrorFeedback:
    """Error feedback: what encoding drops is added to what is sent next, so nothing is lost.

    `residual` is float32, shaped like the values, or None: what has still to be sent. It belongs
    into checkpoints. `encode` puts a new tensor there and never changes the old one, so setting
    that again undoes a round. Sources: arXiv 1809.07599 (algorithm 1), arXiv 1901.09847.
    """

    def __init__(self, residual: Tensor | None = None) -> None:
        self.residual = residual

    def encode(self, codec: Codec, values: Tensor) -> Tensor:
        """Encode values (see Codec) plus the residual; what that drops is the new residual.

        Exact but for the rounding of one float32 addition. Raises ValueError where shapes differ.
        """
        if self.residual is not None:
            if self.residual.shape != values.shape:
                raise ValueError(f"a residual of {self.residual.shape} with {values.shape} values")
            values = values + self.residual
        wire = codec.encode(values)
        if codec.is_lossy:
            arrives = codec.decode(wire)
            self.residual = torch.sub(values, arrives, out=arrives)
        else:
            self.residual = None
        return wire


def as_dtype(wire: Tensor, dtype: torch.dtype) -> Tensor:
    """Bytes (rows, bytes) read as another type; copied where they do not lie as that type must."""
    size = dtype.itemsize
    is_aligned = wire.storage_offset() % size == 0 and wire.stride(0) % size == 0
    if not is_aligned or wire.stride(1) != 1:
        wire = wire.clone(memory_format=torch.contiguous_format)
    return wire.view(dtype)
