"""What surviving costs: the stall of a save, the start of a resumed run, a lost peer.

    python benchmarks/recovery.py

1. Milliseconds that a save holds training up, with and without the background writer (a model of
   13.8 M parameters, one process; median of several saves).
2. Milliseconds to find an update's blocks at step 10 of 1,000 blocks and at step 1,000,000 of
   1,000,000,000 virtual blocks: starting again does not walk through the data.
3. Seconds from the loss of a peer to the others' next logged update, and to that after a peer came
   back (three hosts in network namespaces; skipped where those are not permitted).
"""

from __future__ import annotations

import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from p2p_llm_forge.config import PrepareConfig, TrainConfig
from p2p_llm_forge.data import order as data_order
from prepare_data import prepare
from tests.texts import write_text


def main() -> None:
    """Measure the three and print them."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text = write_text(folder / "text.txt", documents=500)
        data = folder / "data"
        prepare(PrepareConfig([str(text)], str(data), vocab_size=300, sequence_length=64))
        for in_background in (False, True):
            print_stall(data, folder / f"run-{in_background}", in_background)
    print_start()
    print_lost_peers()


def print_stall(data: Path, folder: Path, in_background: bool) -> None:
    """The median time that `save` keeps the loop from its next update."""
    import train
    from p2p_llm_forge.training.run import Run

    stalls = []
    save = Run.evaluate_and_save

    def timed(*args: object) -> None:
        began = time.perf_counter()
        save(*args)
        stalls.append(time.perf_counter() - began)

    Run.evaluate_and_save = timed
    try:
        train.train(
            TrainConfig(
                dataset_path=str(data),
                output_dir=str(folder),
                model_type="gpt2",
                optimizer="adamw",
                config_overrides="n_layer=6,n_head=6,n_embd=384,vocab_size=8192",
                batch_size=8,
                max_steps=60,
                save_every=10,
                save_in_background=in_background,
                report_to="none",
            )
        )
    finally:
        Run.evaluate_and_save = save
    how = "background" if in_background else "foreground"
    shown = statistics.median(stalls[:-1]) * 1000  # the last one is at the end of the run
    print(f"stall of a save, {how}: {shown:.0f} ms (median of {len(stalls) - 1})")


def print_start() -> None:
    """The time to find the blocks of one update early in small data and late in huge data."""
    for step, num_blocks in ((10, 10**3), (10**6, 10**9)):
        times = []
        for seed in range(21):
            began = time.perf_counter()
            data_order.blocks_at(step * 512, 512, num_blocks, seed)
            times.append(time.perf_counter() - began)
        shown = statistics.median(times) * 1000
        print(f"blocks of update {step:,} of {num_blocks:,} blocks: {shown:.2f} ms for 512 blocks")


def print_lost_peers() -> None:
    """The times that the multi-host test prints."""
    words = ["-m", "pytest", "-q", "-s", "tests/multihost/test_elastic.py", "-k", "ddp"]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    for line in done.stdout.splitlines():
        if line.startswith("a peer") or "skipped" in line or "failed" in line:
            print(line)


if __name__ == "__main__":
    main()
