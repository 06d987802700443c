"""Runs of train.py in tests: their flags, how they start, and what they leave."""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from p2p_llm_forge.training import checkpoint
from tests.ports import free_port
from tests.waiting import wait_until

SEQUENCE_LENGTH = 32
TINY_SIZES = "n_layer=2,n_head=2,n_embd=32"  # of a gpt2
TINY_MODEL = TINY_SIZES + ",resid_pdrop=0,embd_pdrop=0,attn_pdrop=0"
# What tests of mechanisms train: quick, and whatever the defaults are.
TINY: dict[str, Any] = {
    **{"model_type": "gpt2", "config_overrides": TINY_MODEL},
    **{"optimizer": "adamw", "learning_rate": 1e-3},
}
# What is trained where nothing is asked for: LFM2 from zero, by Muon; only narrower.
DEFAULTS: dict[str, Any] = {
    **{"model_type": None, "optimizer": None, "learning_rate": None},
    "config_overrides": "num_hidden_layers=2,hidden_size=32,num_attention_heads=2",
}
DROPOUT = TINY_SIZES + ",resid_pdrop=0.1,embd_pdrop=0.1,attn_pdrop=0.1"
# Its rate and momentum still change after the first rounds.
DILOCO = {"sync": "diloco", "outer_lr": 0.7, "outer_momentum": 0.9, "outer_warmup_rounds": 4}
# Figures that the clock and the machine decide.
CLOCKED = {"tokens_per_second", "communication", "bytes_sent_per_update", "mfu", "seconds"}
CLOCKED |= {"seconds_left", "memory_peak_bytes", "safe_step"}
CLOCKED |= {"resumed_from"}  # what was interrupted, and went on to the same end
# A run that trains until it is ended.
LONG = {"max_steps": 100_000, "save_every": 0, "log_every": 1}


def flags(data: Path, folder: Path, **settings: object) -> list[str]:
    """The command line of a short run; `settings` by field names, None leaves one out."""
    settings = {
        "dataset_path": data,
        "output_dir": folder,
        **TINY,
        "batch_size": 8,
        "max_steps": 3,
        "report_to": "none",
        "pictures": False,
        "cpu_threads": 1,
        "compile": "off",  # a long run would try it first
        "resume": "auto",
        **settings,
    }
    return [f"--{name}={value}" for name, value in settings.items() if value is not None]


def by_hand(processes: int) -> dict[str, object]:
    """The settings of ranks on this machine that are started by hand, but for `rank`."""
    return {"world_size": processes, "master_addr": "127.0.0.1", "master_port": free_port()}


def start_ranks(zygote: Any, words: list[str], processes: int, log: Path, **how: Any) -> list[int]:
    """Start a run by hand; `how` goes to `Zygote.start`. Returns the process ids, by rank."""
    if processes == 1:
        return [zygote.start(words, log, **how)]
    return start_each(zygote, [words] * processes, [log] * processes, **how)


def start_each(zygote: Any, words: list[list[str]], logs: list[Path], **how: Any) -> list[int]:
    """Start a run by hand, every rank with words and a log of its own."""
    together = [f"--{name}={value}" for name, value in by_hand(len(words)).items()]
    return [
        zygote.start([*own, *together, f"--rank={rank}"], log, **how)
        for rank, (own, log) in enumerate(zip(words, logs, strict=True))
    ]


def start_apart(
    zygote: Any, data: Path, folders: list[Path], logs: list[Path], **settings: object
) -> list[int]:
    """Start a run by hand of which every rank has a folder of its own."""
    return start_each(zygote, [flags(data, folder, **settings) for folder in folders], logs)


def finish(zygote: Any, data: Path, folder: Path, processes: int = 2, **settings: object) -> Path:
    """A run that is left in peace; returns its folder."""
    log = folder.with_suffix(".log")
    ranks = start_ranks(zygote, flags(data, folder, **settings), processes, log)
    assert [zygote.wait(pid) for pid in ranks] == [0] * processes, read(log)
    return folder


def read(log: Path) -> str:
    """The end of what was printed."""
    return log.read_text()[-4000:]


def tensors(folder: Path, step: int) -> dict:
    """Weights and optimizer state of a checkpoint."""
    saved = folder / f"checkpoint-{step}"
    optimizer = loaded(saved / "optimizer.safetensors")
    return weights(saved) | {f"optimizer: {key}": tensor for key, tensor in optimizer.items()}


def weights(folder: Path) -> dict:
    """The weights of a run's model, or of a checkpoint's."""
    return loaded(folder / "model.safetensors")


def loaded(file: Path) -> dict:
    """The tensors of a file, of which there are some."""
    from safetensors.torch import load_file

    found = load_file(file)
    assert found
    return found


def lines(folder: Path) -> list[dict]:
    """metrics.jsonl without what the clock decides."""
    text = (folder / "metrics.jsonl").read_text()
    found = [json.loads(line) for line in text.splitlines()]
    assert found
    return [{k: v for k, v in line.items() if k not in CLOCKED} for line in found]


def results(folder: Path) -> dict:
    """The figures at the end of a run."""
    return json.loads((folder / "all_results.json").read_text())


def step_logged(folder: Path) -> int:
    """The last step that metrics.jsonl has; 0 before there is one."""
    file = folder / "metrics.jsonl"
    return lines(folder)[-1]["step"] if file.exists() and file.stat().st_size else 0


def wait_for_checkpoint(zygote: Any, pid: int, folder: Path, step: int, log: Path) -> None:
    """Until a run, of which `pid` is a rank, has saved the checkpoint of a step or a later one."""

    def is_there() -> bool:
        assert not zygote.has_ended(pid), read(log)
        return newest_step(folder) >= step

    wait_until(is_there, longest_pause_s=0.001)


def newest_step(folder: Path) -> int:
    """The step of the newest checkpoint; 0 before there is one."""
    return max(checkpoint.steps_saved(folder), default=0)


@contextlib.contextmanager
def slowed(pid: int, share: float, period_s: float = 0.05) -> Iterator[None]:
    """Let the process run for only this share of the time, by stopping and continuing it."""
    over = threading.Event()

    def stop_and_go() -> None:
        while not over.is_set():
            os.kill(pid, signal.SIGSTOP)
            over.wait(period_s * (1 - share))
            os.kill(pid, signal.SIGCONT)
            over.wait(period_s * share)

    thread = threading.Thread(target=stop_and_go)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        os.kill(pid, signal.SIGCONT)
