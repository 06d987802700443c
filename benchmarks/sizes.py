"""How long, how large: what `train.py --minutes M --dry-run` chooses on this machine, as tables.

    python benchmarks/sizes.py --work-dir /tmp/sizes

Each text is prepared once, with the vocabulary and the blocks that `--minutes` chooses for a text
of its size. Then the dry run measures this machine and plans, for each text and time. Nothing is
trained: what is expected comes from the law in training/law.py, fitted on short runs.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import subprocess
import sys
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from benchmarks.data_preparation import endless, source_files  # noqa: E402
from p2p_llm_forge.training.planner import text_settings  # noqa: E402

MINUTES = (5, 30, 120, 480)
SAMPLE = ROOT / "data" / "sample_corpus.txt"
HEAD = ["text", "time", "depth", "parameters", "the text", "bits per byte", "with one more peer"]
PLANNED = re.compile(
    r"model     \w+, (?P<parameters>[\d.]+) M parameters.*"
    r"plan      (?:depth (?P<depth>\d+)|the model as given), about (?P<updates>[\d,]+) updates"
    r" of (?P<tokens>[\d,]+) tokens, the text (?P<epochs>[\d.]+) times(?P<why>[^\n]*)\n"
    r"expected  about (?P<bits>[\d.]+) bits per byte[^\n]*one more peer (?P<with_peer>[\d.]+)",
    re.DOTALL,
)


@dataclass(frozen=True)
class Row:
    """What one dry run says."""

    text: str
    minutes: int
    depth: str
    parameters_m: float
    updates: str
    tokens_per_update: str
    epochs: float
    bits_per_byte: float
    with_peer: float
    ends_early: bool


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--work-dir", type=Path, required=True, help="texts and data are kept here")
    parser.add_argument("--megabytes", type=int, nargs="*", default=[10, 100], help="further texts")
    parser.add_argument("--minutes", type=int, nargs="+", default=list(MINUTES))
    options = parser.parse_args()
    options.work_dir.mkdir(parents=True, exist_ok=True)
    texts = {f"{SAMPLE.stat().st_size / 1e6:.2g} MB": SAMPLE}
    for megabytes in options.megabytes:
        texts[f"{megabytes} MB"] = gathered(options.work_dir / f"{megabytes}.txt", megabytes)
    rows = []
    for name, path in texts.items():
        folder = prepared(path, options.work_dir)
        rows += [planned(dry_run(folder, minutes), name, minutes) for minutes in options.minutes]
    print(f"{machine()}\n\n{short_table(rows)}\n\n{table(rows)}")


def gathered(path: Path, megabytes: int) -> Path:
    """A text of that size, of the sources and documentation of the installed Python; made once."""
    if not path.exists():
        part = path.with_suffix(".part")
        with part.open("wb") as file:
            for text in endless(source_files()):
                file.write(re.sub(rb"\n\s*\n", b"\n", text).strip() + b"\n\n")
                if file.tell() >= megabytes * 10**6:
                    break
        part.rename(path)
    return path


def prepared(text: Path, work_dir: Path) -> Path:
    """The text as blocks, as `train.py --minutes` would prepare it; made once."""
    folder = work_dir / f"prepared-{text.stem}"
    vocabulary, length = text_settings(text.stat().st_size)
    if not (folder / "manifest.json").exists():
        words = ["prepare_data.py", f"--dataset-path={text}", f"--output-dir={folder}"]
        run([*words, f"--vocab-size={vocabulary}", f"--sequence-length={length}"])
    return folder


def dry_run(folder: Path, minutes: float) -> str:
    """What train.py prints that it would do in that time."""
    words = ["train.py", f"--dataset-path={folder}", f"--output-dir={folder}-run"]
    return run([*words, f"--minutes={minutes}", "--dry-run"])


def run(words: list[str]) -> str:
    """What a script of the project prints."""
    done = subprocess.run(
        [sys.executable, *words],
        cwd=ROOT, env=os.environ | {"HF_HUB_OFFLINE": "1"}, stdout=subprocess.PIPE, text=True,
        check=True,
    )  # fmt: skip
    return done.stdout


def planned(printed: str, text: str, minutes: int) -> Row:
    """The plan that a dry run has printed. Raises ValueError where there is none."""
    found = PLANNED.search(printed)
    if not found:
        raise ValueError(f"no plan in\n{printed}")
    return Row(
        text,
        minutes,
        found["depth"] or "given",
        float(found["parameters"]),
        found["updates"],
        found["tokens"],
        float(found["epochs"]),
        float(found["bits"]),
        float(found["with_peer"]),
        "ends before the time is over" in found["why"],
    )


def table(rows: list[Row]) -> str:
    """The plans as Markdown, one a row."""
    return markdown(
        HEAD,
        [
            [
                row.text,
                time_of(row.minutes) + (", ends early" if row.ends_early else ""),
                row.depth,
                f"{row.parameters_m:.1f} M",
                f"{row.epochs:.1f} times",
                f"{row.bits_per_byte:.2f}",
                f"{row.with_peer:.2f}",
            ]
            for row in rows
        ],
    )


def short_table(rows: list[Row]) -> str:
    """The same: texts one below the other, times side by side; parameters and bits per byte."""
    minutes = sorted({row.minutes for row in rows})
    body = []
    for text in dict.fromkeys(row.text for row in rows):
        cells = {row.minutes: row for row in rows if row.text == text}
        body.append([text, *(cell_of(cells[one]) for one in minutes)])
    return markdown(["text", *map(time_of, minutes)], body)


def cell_of(row: Row) -> str:
    return f"{row.parameters_m:.1f} M, {row.bits_per_byte:.2f}" + " (early)" * row.ends_early


def markdown(head: list[str], body: list[list[str]]) -> str:
    rule = ["---"] * len(head)
    return "\n".join(f"| {' | '.join(cells)} |" for cells in [head, rule, *body])


def machine() -> str:
    """This machine, as far as the system says: its processor, its cores, its memory."""
    import psutil

    about = Path("/proc/cpuinfo")
    names = re.findall(r"model name\s*: (.*)", about.read_text()) if about.exists() else []
    name = names[0] if names else platform.processor() or platform.machine()
    memory = psutil.virtual_memory().total / 2**30
    return f"{os.cpu_count()} cores of {name}, {memory:.0f} GiB, torch {version('torch')}"


def time_of(minutes: int) -> str:
    """Such as 5 min or 2 h."""
    return f"{minutes} min" if minutes % 60 else f"{minutes // 60} h"


if __name__ == "__main__":
    main()
