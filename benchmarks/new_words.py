"""How much memory prepare_data.py takes for text of ever new words, which no cache of words helps.

    python benchmarks/new_words.py --work-dir /tmp/new_words --gigabytes 1 5

Each size is a text of random words in documents of 2 kB, prepared by two workers with a tokenizer
that was trained on other such words; and, the first row, with one that is trained on the text. With
--known, this part of each size is source code of the installed Python, again and again, before the
random words begin, and the tokenizer is trained on such code. The figure is the largest resident
memory of the process (of any, where --seconds interrupts a run and starts it again, which resumes
it). Texts and datasets are removed.
"""

from __future__ import annotations

import argparse
import itertools
import os
import shutil
import signal
import subprocess
import sys
import sysconfig
import threading
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
CHUNK_BYTES = 16 << 20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--gigabytes", type=float, nargs="+", default=[1, 5])
    parser.add_argument("--known", type=float, default=0, help="this part of the text comes first")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--seconds", type=int, default=0, help="after which a run is interrupted")
    arguments = parser.parse_args()
    folder: Path = arguments.work_dir
    folder.mkdir(parents=True, exist_ok=True)
    print(
        "| text | tokenizer | seconds | starts | peak RSS, GB |\n|---|---|---|---|---|", flush=True
    )
    try:
        if arguments.known:
            known_words(folder / "small.txt", 50_000_000)
        else:
            random_words(folder / "small.txt", 50_000_000, seed=1)
        row(folder, "small", "trained on it", arguments, [])
        tokenizer = folder / "out-small" / "tokenizer"
        for gigabytes in arguments.gigabytes:
            name = f"{gigabytes:g}GB"
            size, text = int(gigabytes * 1e9), folder / f"{name}.txt"
            known = int(size * arguments.known)
            known_words(text, known)
            random_words(text, size - known, seed=2)
            row(folder, name, "given", arguments, ["--tokenizer", str(tokenizer)])
            (folder / f"{name}.txt").unlink()
            shutil.rmtree(folder / f"out-{name}")
    finally:
        shutil.rmtree(folder)


def known_words(path: Path, size: int) -> None:
    """Text of which the words come again and again."""
    files = sorted(Path(sysconfig.get_path("stdlib")).rglob("*.py"))
    with path.open("wb") as file:
        for source in itertools.cycle(files) if size else ():
            text = source.read_bytes().decode(errors="ignore").encode() + b"\n\n"
            file.write(text[: size - file.tell()].decode(errors="ignore").encode())
            if size - file.tell() < len("é".encode()):
                break


def random_words(path: Path, size: int, seed: int) -> None:
    """Words of 3 to 12 random letters, 300 in a document, at the end of a file."""
    draw = np.random.default_rng(seed)
    with path.open("ab") as file:
        for start in range(0, size, CHUNK_BYTES):
            text = draw.integers(ord("a"), ord("z") + 1, CHUNK_BYTES, np.uint8)
            spaces = np.cumsum(draw.integers(4, 14, CHUNK_BYTES // 8))
            spaces = spaces[spaces < CHUNK_BYTES - 1]
            text[spaces] = ord(" ")
            text[spaces[::300]] = text[spaces[::300] + 1] = ord("\n")
            file.write(text[: size - start].tobytes())


def row(
    folder: Path, name: str, tokenizer: str, arguments: argparse.Namespace, more: list[str]
) -> None:
    """Prepare a text, starting again as often as it is interrupted, and print its row."""
    command = [
        sys.executable, str(ROOT / "prepare_data.py"),
        "--dataset-path", str(folder / f"{name}.txt"),
        "--output-dir", str(folder / f"out-{name}"), "--sequence-length", "1024",
        "--num-workers", str(arguments.workers), *more,
    ]  # fmt: skip
    begun, peaks, status = time.monotonic(), [], 1
    while status:
        status, peak = run(command, arguments.seconds)
        assert status in (0, 130), f"the preparation ended with {status}"
        peaks.append(peak)
    seconds = time.monotonic() - begun
    size = (folder / f"{name}.txt").stat().st_size / 1e9
    print(
        f"| {size:g} GB | {tokenizer} | {seconds:.0f} | {len(peaks)} | {max(peaks):.2f} |",
        flush=True,
    )


def run(command: list[str], seconds: int) -> tuple[int, float]:
    """The exit status of a command that is interrupted after some seconds, and its peak, in GB."""
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    clock = threading.Timer(seconds, child.send_signal, [signal.SIGINT]) if seconds else None
    if clock:
        clock.start()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = os.waitstatus_to_exitcode(status)
    if clock:
        clock.cancel()
    return child.returncode, usage.ru_maxrss / 1e6


if __name__ == "__main__":
    main()
