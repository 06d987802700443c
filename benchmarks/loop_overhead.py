"""What train.py's loop takes besides forward, backward and optimizer, which are made free here.

    python -m benchmarks.loop_overhead --work-dir /tmp/loop_overhead

The real loop runs with real data, logging and checks. Only the model (one number) and the
optimizer (nothing) are replaced once the run is set up; saves and evaluations are not counted.
"""

from __future__ import annotations

import argparse
import os
import shutil
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))  # the project's own modules
STEP_S = 0.5  # of an update that the overhead is compared with
SIZES = [(16, 8, 256), (512, 8, 1024)]  # blocks in an update and in a micro-batch, tokens in one


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--updates", type=int, default=200)
    parser.add_argument("--repeats", type=int, default=3)
    return parser.parse_args()


def overhead_s(data: Path, folder: Path, sizes: tuple[int, int], updates: int) -> float:
    """Seconds of an update in which nothing is computed. sizes: blocks of it and of a forward."""
    import torch

    from p2p_llm_forge.config import TrainConfig
    from p2p_llm_forge.peers.join import join
    from p2p_llm_forge.training.interruptions import Interruptions
    from p2p_llm_forge.training.job import open_job
    from p2p_llm_forge.training.run_folder import run_folder
    from p2p_llm_forge.training.setup import set_up
    from train import loop

    class Free(torch.nn.Module):
        """A loss that costs nothing."""

        def __init__(self) -> None:
            super().__init__()
            self.weight = torch.nn.Parameter(torch.ones(()))

        def forward(
            self, inputs: torch.Tensor, targets: torch.Tensor, begins: None
        ) -> tuple[Any, None]:
            return self.weight * 1.0, None

    shutil.rmtree(folder, ignore_errors=True)
    config = TrainConfig(
        dataset_path=str(data),
        output_dir=str(folder),
        model_type="gpt2",
        config_overrides="n_layer=1,n_head=1,n_embd=8",
        batch_size=sizes[0],
        micro_batch_size=sizes[1],
        max_steps=updates,
        save_every=0,
        compile="off",
    )
    with join(config) as cluster:
        job = open_job(config, cluster)
        with run_folder(job) as held, set_up(job, held) as run, Interruptions(None) as asked:
            nothing = SimpleNamespace(
                param_groups=[{"lr": 0.0}], step=lambda: None, zero_grad=lambda: None
            )
            run.learner = replace(run.learner, model=Free(), optimizer=nothing)
            loop(run, asked)
            return run.clock.seconds / updates


def main() -> None:
    asked = parse()
    from benchmarks.generated_blocks import generate

    os.environ["HF_HUB_OFFLINE"] = "1"
    asked.work_dir.mkdir(parents=True, exist_ok=True)
    print(f"| an update | ms of the loop | of {STEP_S} s |\n|---|---|---|", flush=True)
    for batch, micro, length in SIZES:
        data = asked.work_dir / f"blocks-{length}"
        if not data.exists():
            generate(data, 512, length, blocks=2048)
        spent = [
            overhead_s(data, asked.work_dir / "run", (batch, micro), asked.updates)
            for _ in range(asked.repeats)
        ]
        ms, share = 1000 * statistics.median(spent), statistics.median(spent) / STEP_S
        what = f"{batch} blocks of {length} tokens, {micro} at a time"
        print(f"| {what} | {ms:.2f} | {share:.2%} |", flush=True)


if __name__ == "__main__":
    main()
