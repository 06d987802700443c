"""Two ranks of which one is slowed to a tenth: equal shares against --balance auto.

    python benchmarks/uneven_peers.py

The slow rank is stopped and continued in turn so that it runs for a tenth of the time. Measured are
tokens/s (after the shares have settled) of each rank alone and of both together. Speeds alone are
measured with the other rank's core idle, as on two machines.
"""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
os.environ["HF_HUB_OFFLINE"] = "1"

from p2p_llm_forge.config import PrepareConfig
from prepare_data import prepare
from tests.runs import LONG, flags, lines, slowed, start_ranks, step_logged
from tests.texts import write_text
from tests.waiting import wait_until
from tests.zygote import Zygote

SHARE = 0.1
SETTLE_STEPS, MEASURED_S = 30, 20.0
SETTINGS = {
    **LONG,
    **{
        "batch_size": 64,
        "micro_batch_size": 1,
        **{"model_type": "gpt2", "optimizer": "adamw", "learning_rate": 1e-3},
        "config_overrides": "n_layer=4,n_head=4,n_embd=256",
    },
}


def tokens_per_second(zygote: Zygote, data: Path, folder: Path, **how: object) -> float:
    """Speed of a run of `processes`, the last of which is slowed if `is_slowed`."""
    processes, is_slowed, balance = how["processes"], how["is_slowed"], how["balance"]
    words = flags(data, folder, **SETTINGS, balance=balance)
    ranks = start_ranks(zygote, words, processes, folder.with_suffix(".log"))
    wait_until(lambda: step_logged(folder) >= 1)
    with slowed(ranks[-1], SHARE) if is_slowed else contextlib.nullcontext():
        settle = SETTLE_STEPS if balance == "auto" else 2
        wait_until(lambda: step_logged(folder) >= settle)
        first, began = step_logged(folder), time.monotonic()
        wait_until(lambda: time.monotonic() - began > MEASURED_S and step_logged(folder) > first)
        last, spent = step_logged(folder), time.monotonic() - began
    os.kill(ranks[0], signal.SIGTERM)
    for pid in ranks:
        zygote.wait(pid)
    tokens = [line["tokens"] for line in lines(folder) if "tokens" in line]
    return (last - first) * tokens[0] / spent


def main() -> None:
    """Measure the four arms and print their speeds and ratios."""
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        text, data = write_text(folder / "text.txt", documents=2000), folder / "data"
        prepare(PrepareConfig([str(text)], str(data), vocab_size=300, sequence_length=64))
        zygote = Zygote()

        def speed(name: str, processes: int, is_slowed: bool, balance: str = "none") -> float:
            return tokens_per_second(
                zygote,
                data,
                folder / name,
                processes=processes,
                is_slowed=is_slowed,
                balance=balance,
            )

        fast, slow = speed("fast", 1, False), speed("slow", 1, True)
        equal, balanced = speed("equal", 2, True), speed("balanced", 2, True, "auto")
        zygote.close()
    print(f"fast rank alone       {fast:8,.0f} tokens/s")
    print(f"slowed rank alone     {slow:8,.0f} tokens/s")
    print(f"both, equal shares    {equal:8,.0f} tokens/s = {equal / (fast + slow):.2f} of the sum")
    print(
        f"both, --balance auto  {balanced:8,.0f} tokens/s = {balanced / (fast + slow):.2f} of"
        " the sum"
    )


if __name__ == "__main__":
    main()
