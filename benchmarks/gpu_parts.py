"""What benchmarks/gpu.py measures, a part in a process of its own; figures go to a JSON file.

    python -m benchmarks.gpu_parts matmul --json /tmp/matmul.json
    python -m benchmarks.gpu_parts forge --data PREPARED --work-dir /tmp/run --json /tmp/forge.json

found: what torch sees. matmul: the peak of matrix products. data: the blocks of the other parts.
forge: the loop of train.py, its updates in segments, and between them the same updates without the
loop. loss: the chunked loss at several sizes of its chunks, and the loss over all logits.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import shutil
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project's own modules


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=("found", "matmul", "data", "forge", "loss"))
    parser.add_argument("--json", type=Path, required=True, help="file for the figures")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="sizes for a rehearsal")
    parser.add_argument("--data", type=Path, help="the blocks; of `data`: a new folder")
    parser.add_argument("--work-dir", type=Path)
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--model-type", default="gpt2")
    parser.add_argument("--config-overrides", default="")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--micro-batch-size", type=int, default=32)
    parser.add_argument("--mixed-precision", default="auto")
    parser.add_argument("--optimizer", default="adamw")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--warm-up", type=int, default=5)
    parser.add_argument("--updates", type=int, default=10, help="updates of a segment")
    parser.add_argument("--segments", type=int, default=3)
    return parser.parse_args()


def found(asked: argparse.Namespace) -> dict[str, Any]:
    """What torch sees, and what compiling needs."""
    import torch

    facts = {"torch": torch.__version__, "built for CUDA": str(torch.version.cuda)}
    facts["C compiler"] = shutil.which("gcc") or shutil.which("cc") or shutil.which("clang")
    facts["has a GPU"] = torch.cuda.is_available()
    if not torch.cuda.is_available():
        return facts
    card = torch.cuda.get_device_properties(0)
    driver = getattr(torch._C, "_cuda_getDriverVersion", lambda: None)()
    return facts | {
        "card": card.name,
        "cards": torch.cuda.device_count(),
        "memory_bytes": card.total_memory,
        "capability": ".".join(map(str, torch.cuda.get_device_capability())),
        "CUDA of the driver": driver,
        "bf16": torch.cuda.is_bf16_supported(including_emulation=False),
        "float32 products": torch.get_float32_matmul_precision(),
    }


def waited(device: str) -> float:
    """A clock, read when the device has done all that it was given."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_s(act: Callable[[], object], device: str, repeats: int, at_once: int = 1) -> float:
    """The median of the seconds that `act` takes, of which `at_once` are timed together."""
    act()
    spent = []
    for _ in range(repeats):
        began = waited(device)
        for _ in range(at_once):
            act()
        spent.append((waited(device) - began) / at_once)
    return statistics.median(spent)


def matmul(asked: argparse.Namespace) -> dict[str, Any]:
    """Floating-point operations a second of large products of random numbers, by dtype."""
    import torch

    size, peaks = 256 if asked.tiny else 8192, {}
    for name, precision in (("bfloat16", "highest"), ("float16", "highest"), ("tf32", "high")):
        torch.set_float32_matmul_precision(precision)
        dtype = torch.float32 if name == "tf32" else getattr(torch, name)
        one, other = (torch.randn(size, size, device=asked.device, dtype=dtype) for _ in range(2))
        product_s = median_s(lambda a=one, b=other: a @ b, asked.device, 5, at_once=10)
        peaks[name] = 2 * size**3 / product_s
    return {"flops": peaks, "size": size}


def data(asked: argparse.Namespace) -> dict[str, Any]:
    """Write the blocks."""
    from benchmarks.generated_blocks import generate

    generate(asked.data, asked.vocab_size, asked.sequence_length, 64 if asked.tiny else 2048)
    return {"blocks": str(asked.data)}


class Enough(Exception):
    """The updates that were to be timed are taken."""


class Timed:
    """Stands in for `take_update` in train.py's loop, and times segments of what the loop does.

    After each segment the same updates are taken without the loop: forward, backward, clipping
    and optimizer on tensors that lie on the device.
    """

    def __init__(self, asked: argparse.Namespace, take_update: Callable[..., Any]) -> None:
        self._asked, self._take_update, self._steps = asked, take_update, 0
        self._began: float | None = None
        self.loop_s: list[float] = []
        self.bare_s: list[float] = []
        self.facts: dict[str, Any] = {}

    def __call__(self, run: Any, step: int) -> Any:
        done, asked = self._steps - self._asked.warm_up, self._asked
        if done >= 0 and done % asked.updates == 0:
            self._end_segment(run)
        self._steps += 1
        return self._take_update(run, step)

    def _end_segment(self, run: Any) -> None:
        device, asked = self._asked.device, self._asked
        if self._began is not None:
            self.loop_s.append((waited(device) - self._began) / asked.updates)
            self._note(run)
            began = waited(device)
            for _ in range(asked.updates):
                bare_update(run)
            self.bare_s.append((waited(device) - began) / asked.updates)
        else:
            bare_update(run)  # warms up too
        if len(self.loop_s) == asked.segments:
            raise Enough
        self._began = waited(device)

    def _note(self, run: Any) -> None:
        if self.facts:
            return
        job, lm = run.job, run.learner.lm
        self.facts = {
            "tokens_per_update": job.plan.tokens_per_update,
            "micro_batch_size": job.plan.micro_batch_size,
            "parameters": sum(p.numel() for p in lm.parameters()),
            "device": job.cluster.device.type,
            "precision": job.cluster.accelerator.mixed_precision,
            "peak_bytes": peak_bytes(self._asked.device),
        }


def bare_update(run: Any) -> None:
    """An update without the loop: a share of micro-batches of the same tokens, and a step."""
    from p2p_llm_forge.training.learner import first_micro_batch

    job, learner = run.job, run.learner
    if not hasattr(run, "bare_batch"):
        run.bare_batch = first_micro_batch(job, run.blocks)
    scale = run.sync.loss_scale(job.plan.tokens_per_update, job.plan.tokens_per_update)
    for _ in range(job.plan.shares[0] // job.plan.micro_batch_size):
        nats, _ = learner.model(*run.bare_batch)
        job.cluster.accelerator.backward(nats * scale)
    job.cluster.accelerator.clip_grad_norm_(learner.model.parameters(), job.config.max_grad_norm)
    learner.optimizer.step()
    learner.optimizer.zero_grad()


def peak_bytes(device: str) -> int:
    """The most memory of the device that this process has held."""
    import resource

    import torch

    if device == "cuda":
        return torch.cuda.max_memory_allocated()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def forge(asked: argparse.Namespace) -> dict[str, Any]:
    """Run train.py's own loop, and say what its updates take, and without the loop."""
    import train
    from p2p_llm_forge.config import TrainConfig

    began = time.perf_counter()
    config = TrainConfig(
        dataset_path=str(asked.data),
        output_dir=str(asked.work_dir),
        overwrite=True,
        model_type=asked.model_type,
        config_overrides=asked.config_overrides,
        compile="on" if asked.compile else "off",
        optimizer=asked.optimizer,
        learning_rate=1e-4,
        batch_size=asked.batch_size,
        micro_batch_size=asked.micro_batch_size,
        max_steps=1_000_000,
        save_every=0,
        mixed_precision=asked.mixed_precision,
        report_to="none",
        cpu=asked.device == "cpu",
        cpu_threads=1 if asked.tiny else 0,
        world_size=1,
    )
    timed = Timed(asked, train.take_update)
    train.take_update = timed
    with contextlib.suppress(Enough):
        train.train(config)
    ratios = [1 - bare / loop for loop, bare in zip(timed.loop_s, timed.bare_s, strict=True)]
    return {
        **timed.facts,
        "segments_s": [seconds * asked.updates for seconds in timed.loop_s],
        "bare_s": [seconds * asked.updates for seconds in timed.bare_s],
        "updates": asked.updates,
        "overhead": statistics.median(ratios),
        "start_s": time.perf_counter() - began - sum(timed.loop_s + timed.bare_s) * asked.updates,
    }


def loss(asked: argparse.Namespace) -> dict[str, Any]:
    """Seconds and memory of the head and its loss, forward and backward, by size of chunk."""
    import torch

    from p2p_llm_forge.model import loss as chunked

    tokens, width = (64, 16) if asked.tiny else (16_384, 768)
    sizes = (2**10, 2**12) if asked.tiny else tuple(2**n for n in range(22, 29, 2))
    rows, usual = [], chunked.CHUNK_VALUES_ON_GPU
    for vocab_size in (97, 128) if asked.tiny else (50_257, 50_304):
        hidden = torch.randn(tokens, width, device=asked.device, requires_grad=True)
        weight = torch.randn(vocab_size, width, device=asked.device, requires_grad=True)
        targets = torch.randint(vocab_size, (tokens,), device=asked.device)

        def whole(hidden: Any = hidden, weight: Any = weight, targets: Any = targets) -> None:
            logits = hidden @ weight.T
            nats = torch.nn.functional.cross_entropy(logits.float(), targets, reduction="sum")
            nats.backward()

        def in_chunks(hidden: Any = hidden, weight: Any = weight, targets: Any = targets) -> None:
            chunked.chunked_nats(hidden, weight, None, targets).backward()

        for values in (None, *sizes):
            chunked.CHUNK_VALUES = chunked.CHUNK_VALUES_ON_GPU = values or usual
            act = in_chunks if values else whole
            if asked.device == "cuda":
                torch.cuda.reset_peak_memory_stats()
            with torch.autocast(asked.device, torch.bfloat16):
                spent_s = median_s(act, asked.device, 3)
            rows.append(
                {
                    "vocab_size": vocab_size,
                    "chunk_values": values,  # None: all logits at once
                    "seconds": spent_s,
                    "flops": 6 * tokens * width * vocab_size / spent_s,
                    "peak_bytes": peak_bytes(asked.device),
                }
            )
    return {"tokens": tokens, "width": width, "rows": rows}


def main() -> None:
    asked = parse()
    if asked.tiny and asked.device == "cpu":
        import torch

        torch.set_num_threads(1)
    figures = globals()[asked.part](asked)
    asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures), flush=True)


if __name__ == "__main__":
    main()
