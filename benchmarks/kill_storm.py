"""Kill a run again and again, at random moments, and see what is lost: nothing but unsaved steps.

    python benchmarks/kill_storm.py --kills 200

Prints the kills, the checkpoints that could not be loaded (0), the most steps lost by a kill
(bounded by --save-every), and whether the final weights, optimizer state and logged losses are
bit for bit those of a run that was never killed.
"""

from __future__ import annotations

import argparse
import os
import random
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

import torch

from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.training import checkpoint
from prepare_data import prepare
from tests.runs import (
    DROPOUT,
    SEQUENCE_LENGTH,
    flags,
    lines,
    newest_step,
    start_ranks,
    tensors,
)
from tests.texts import write_text
from tests.zygote import Zygote

SAVE_EVERY = 4


def main() -> None:
    """Run the storm and print what came of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--processes", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    steps = 10 * args.kills
    settings = {
        **{"max_steps": steps, "save_every": SAVE_EVERY, "log_every": 6, "peer_timeout": 8},
        **{"config_overrides": DROPOUT, "micro_batch_size": 2},
    }
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data, text = folder / "data", write_text(folder / "text.txt", documents=200)
        prepare(
            PrepareConfig([str(text)], str(data), vocab_size=300, sequence_length=SEQUENCE_LENGTH)
        )
        zygote = Zygote()
        calm, stormy, log = folder / "calm", folder / "stormy", folder / "log"
        for pid in start_ranks(zygote, flags(data, calm, **settings), args.processes, log):
            assert zygote.wait(pid) == 0, log.read_text()[-2000:]
        lost, kills, began = [], 0, time.monotonic()
        for kill in range(args.kills):
            ranks = start_ranks(zygote, flags(data, stormy, **settings), args.processes, log)
            goal = draw.choice([0, steps * (kill + 1) // (args.kills + 2)])
            victim = draw.choice(ranks)
            while newest_step(stormy) < goal and not zygote.has_ended(victim):
                time.sleep(0.001)
            time.sleep(draw.uniform(0, 0.1 if goal else 0.8))
            if zygote.has_ended(victim):
                break
            os.kill(victim, signal.SIGKILL)
            for pid in ranks:
                zygote.wait(pid)
            kills += 1
            metrics = stormy / "metrics.jsonl"
            reached = (
                lines(stormy)[-1]["step"] if metrics.exists() and metrics.stat().st_size else 0
            )
            lost.append(max(0, reached - newest_step(stormy)))
        for pid in start_ranks(zygote, flags(data, stormy, **settings), args.processes, log):
            assert zygote.wait(pid) == 0, log.read_text()[-2000:]
        zygote.close()
        expected, got = tensors(calm, steps), tensors(stormy, steps)
        same = set(expected) == set(got) and all(torch.equal(expected[k], got[k]) for k in got)
        damaged = [
            s
            for s in checkpoint.steps_saved(stormy)
            if checkpoint.damage(stormy / f"checkpoint-{s}")
        ]
        skipped = log.read_text().count(f"skipped {stormy}")
        print(
            f"kills                            {kills} (of {args.processes} process(es),"
            f" {time.monotonic() - began:.0f} s)"
        )
        print(f"unloadable checkpoints           {len(damaged) + skipped}")
        print(
            f"most steps lost by a kill        {max(lost)} (saved every {SAVE_EVERY}, logged"
            " every 6)"
        )
        print(f"weights and optimizer identical  {same}")
        print(f"logged losses identical          {lines(calm) == lines(stormy)}")


if __name__ == "__main__":
    main()
