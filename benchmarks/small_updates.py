"""What an update of a small model costs, and what parts of it could be without.

    python -m benchmarks.small_updates --work-dir /tmp/small_updates

One real run of train.py is set up, as --minutes does for a short time. Its arms take turns in
bursts of updates: as they are, with torch's attention in the place of our own of short blocks, that
in float32, with norms and rotary positions as transformers writes them, both as before they were
fused, 8 blocks in a forward, and one thread; with --dropout, torch's own, and none. Medians of all
bursts are printed, and of the ratios to the first arm's burst of the same turn.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import shutil
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any
from unittest.mock import patch

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project's own modules


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--model-type", default="lfm2")
    parser.add_argument("--depth", type=int, default=2)
    parser.add_argument("--vocab-size", type=int, default=1024)
    parser.add_argument("--sequence-length", type=int, default=256)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--precision", default="auto", choices=["auto", "no", "bf16"])
    parser.add_argument("--turns", type=int, default=12)
    parser.add_argument("--updates", type=int, default=10, help="of a burst")
    return parser.parse_args()


def arms(run: Any) -> dict[str, Callable[[], AbstractContextManager[Any]]]:
    """Name of an arm, and what surrounds its updates."""
    import torch
    import torch.nn.functional as F

    from p2p_llm_forge.model import fused

    @contextlib.contextmanager
    def micro_batches_of(size: int) -> Iterator[None]:
        usual, run.micro_batch_size = run.micro_batch_size, size
        yield
        run.micro_batch_size = usual

    @contextlib.contextmanager
    def one_thread() -> Iterator[None]:
        usual = torch.get_num_threads()
        torch.set_num_threads(1)
        yield
        torch.set_num_threads(usual)

    def torchs_attention() -> AbstractContextManager[Any]:
        return patch.object(fused, "SHORT_BLOCK", 0)

    @contextlib.contextmanager
    def attention_in_float32() -> Iterator[None]:
        usual = F.scaled_dot_product_attention

        def attended(query: Any, key: Any, value: Any, **others: Any) -> Any:
            exact = usual(query.float(), key.float(), value.float(), **others)
            return exact.to(value.dtype)

        with torchs_attention(), patch.object(F, "scaled_dot_product_attention", attended):
            yield

    @contextlib.contextmanager
    def norms_of_transformers() -> Iterator[None]:
        known = [one for one in run.learner.lm.modules() if "forward" in vars(one)]
        ours = [vars(one).pop("forward") for one in known]
        yield
        for module, forward in zip(known, ours, strict=True):
            module.forward = forward

    @contextlib.contextmanager
    def nothing_fused() -> Iterator[None]:
        with torchs_attention(), norms_of_transformers():
            yield

    place = "p2p_llm_forge.model.dropout.dropped"
    of_dropout = {
        "torch's dropout": lambda: patch(place, F.dropout),
        "no dropout": lambda: patch(place, lambda values, probability: values),
    }
    return {
        "as it is": nullcontext,
        "torch's attention": torchs_attention,
        "attention in float32": attention_in_float32,
        "norms and rotary positions of transformers": norms_of_transformers,
        "both": nothing_fused,
        "8 blocks in a forward": lambda: micro_batches_of(8),
        "one thread": one_thread,
        **(of_dropout if run.job.config.dropout else {}),
    }


def burst_ms(run: Any, first: int, updates: int) -> float:
    """Milliseconds of an update, of some in a row. first: the step before them."""
    from train import take_update

    began = time.perf_counter()
    for step in range(first, first + updates):
        float(take_update(run, step).nats)
    return (time.perf_counter() - began) * 1000 / updates


def measure(asked: argparse.Namespace, data: Path) -> dict[str, list[float]]:
    """Milliseconds an update of each arm, of each turn."""
    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.memory import freed_memory_kept
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.training.job import open_job
    from p2p_llm_forge.training.run_folder import run_folder
    from p2p_llm_forge.training.setup import set_up

    folder = asked.work_dir / "run"
    shutil.rmtree(folder, ignore_errors=True)
    config = TrainConfig(
        dataset_path=str(data),
        output_dir=str(folder),
        model_type=asked.model_type,
        depth=asked.depth,
        batch_size=asked.batch_size,
        dropout=asked.dropout,
        mixed_precision=asked.precision,
        max_steps=100_000,
        save_every=0,
        compile="off",
    )
    with join(config) as cluster:
        job = open_job(config, cluster)
        with freed_memory_kept(), run_folder(job) as held, set_up(job, held) as run:
            around, step = arms(run), 0
            found: dict[str, list[float]] = {name: [] for name in around}
            for turn in range(1 + asked.turns):
                for name, context in around.items():
                    with context():
                        spent = burst_ms(run, step, asked.updates)
                    step += asked.updates
                    found[name] += [spent] * (turn > 0)  # the first turn warms up
            return found


def main() -> None:
    asked = parse()
    from benchmarks.generated_blocks import generate

    os.environ["HF_HUB_OFFLINE"] = "1"
    asked.work_dir.mkdir(parents=True, exist_ok=True)
    data = asked.work_dir / f"blocks-{asked.vocab_size}-{asked.sequence_length}"
    if not data.exists():
        generate(data, asked.vocab_size, asked.sequence_length, blocks=2048)
    found = measure(asked, data)
    usual = next(iter(found.values()))
    print("| an update | ms | x the first |\n|---|---|---|")
    for name, spent in found.items():
        ratios = [one / other for one, other in zip(spent, usual, strict=True)]
        ratio, least, most = statistics.median(ratios), min(ratios), max(ratios)
        ms = statistics.median(spent)
        print(f"| {name} | {ms:.1f} | {ratio:.2f} ({least:.2f} to {most:.2f}) |")


if __name__ == "__main__":
    main()
