"""What a session of a run has used so far: its time, its memory, and the speed of its hardware."""

from __future__ import annotations

import re
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.plausible import require_numbers
from p2p_llm_forge.training.numbers import data_sheet_flops, flops_per_token, mfu

# On a CPU: products of square matrices, the fastest of a few.
SIZE, TRIALS = 768, 5
LONGEST_TRIAL_S = 0.5
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Gauge:
    """The time, memory and hardware of one session. began: by `clock`, when it did.

    flops_per_token: forward and backward, of the model. peak_flops: a second, of all ranks. Either
    may be unknown.
    """

    began: float
    flops_per_token: float | None
    peak_flops: float | None
    device: torch.device = torch.device("cpu")
    source: str = "measured"  # of the peak
    clock: Callable[[], float] = time.monotonic

    memory_peak: float = 0.0  # bytes, of this rank, after the last line
    worst_memory_peak: float = 0.0  # of any rank, when they agreed last
    _training_began: float = 0.0

    def start(self) -> None:
        """The first update of the session is about to be taken."""
        self._training_began = self.clock()

    @property
    def seconds(self) -> float:
        """Of this session, from its start."""
        return self.clock() - self.began

    def mfu(self, tokens_per_second: float | None) -> float | None:
        """Model FLOPs utilisation, 0 to 1, of all ranks; None where it is unknown."""
        if tokens_per_second is None:
            return None
        return mfu(tokens_per_second, self.flops_per_token, self.peak_flops)

    def figures(self, done: int, left: int, tokens_per_second: float) -> dict[str, Any]:
        """What a line of metrics.jsonl says of a session that has taken `done` updates.

        left: how many are still to come.
        """
        self.memory_peak = memory_peak(self.device)
        return {
            "mfu": self.mfu(tokens_per_second),
            "seconds": self.seconds,
            "seconds_left": left * (self.clock() - self._training_began) / done,
        }

    def agree_on_memory(self, cluster: Cluster) -> int | None:
        """Bytes that the worst rank has held at most; None if unknown. All ranks must call."""
        by_rank = [one for (one,) in cluster.gather_numbers([memory_peak(self.device)])]
        require_numbers("its memory is", by_rank, are_whole=True)
        return int(max(by_rank)) or None

    def in_words(self) -> str:
        """What the utilisation is measured by, in a line."""
        work = "an unknown number of FLOPs"
        if self.flops_per_token:
            work = f"{self.flops_per_token / 1e9:,.3g} GFLOP"
        if not self.peak_flops:
            return f"compute   {work} a token; {self.source}: MFU unknown"
        return f"compute   {work} a token, peak {self.peak_flops / 1e9:,.4g} GFLOP/s {self.source}"


def new_gauge(lm: Any, length: int, cluster: Cluster, began: float, counted: float = 1.0) -> Gauge:
    """The gauge of a session. All ranks must call, and compute for a moment at the same time.

    length: tokens in a block. began: when the session did, by `time.monotonic`. counted: the share
    of tokens that count in the loss.
    """
    precision, device = cluster.accelerator.mixed_precision, cluster.device
    cluster.barrier()
    peaks = [one for (one,) in cluster.gather_numbers([peak_flops(device, precision) or 0.0])]
    require_numbers("its FLOP/s are", peaks)
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else device.type
    source = f"by the data sheet of {name}"
    if device.type == "cpu":
        source = f"measured in {'float32' if precision == 'no' else precision}"
    if not all(peaks):
        source = f"no peak is known of {'one of them' if peaks[0] else name}"
    known = sum(peaks) if all(peaks) else None
    return Gauge(began, flops_per_token(lm, length, counted), known, device, source)


def peak_flops(device: torch.device, precision: str) -> float | None:
    """FLOP/s of matrix products on this rank: by data sheet on a GPU, measured on a CPU."""
    if device.type == "cuda":
        may_use_tf32 = torch.get_float32_matmul_precision() != "highest"
        return data_sheet_flops(torch.cuda.get_device_name(device), precision, may_use_tf32)
    return measured_flops(DTYPES.get(precision, torch.float32)) if device.type == "cpu" else None


def measured_flops(dtype: torch.dtype) -> float:
    """FLOP/s of matrix products in `dtype` on this rank's CPU threads."""
    draw = torch.Generator().manual_seed(0)
    one = torch.randn(SIZE, SIZE, generator=draw).to(dtype)
    shortest_s, began = LONGEST_TRIAL_S, time.perf_counter()
    for _ in range(1 + TRIALS):  # the first warms up, and counts only if it is alone
        began_one = time.perf_counter()
        one @ one
        ended = time.perf_counter()
        shortest_s = min(shortest_s, ended - began_one)
        if ended - began > LONGEST_TRIAL_S:
            break
    return 2 * SIZE**3 / shortest_s


def memory_peak(device: torch.device) -> int:
    """Bytes that this process has held at most: of tensors on a GPU, else in the machine's memory.

    0 where the system does not say (it does on Linux).
    """
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii", errors="replace")
    except OSError:
        return 0
    found = re.search(r"^VmHWM:\s+(\d+) kB$", status, re.MULTILINE)
    return 1024 * int(found[1]) if found else 0
