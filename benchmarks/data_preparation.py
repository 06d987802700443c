"""How fast prepare_data.py is, beside the usual way and beside its own tokenizer alone.

    python benchmarks/data_preparation.py --work-dir /tmp/data_preparation

The corpus is every distinct .py, .md, .txt and .rst file below this Python and its packages. Where
that is less than --megabytes, the files come again in another order until it is reached, and the
table says how much is distinct. Every figure is the median of --repeats runs, each in a fresh
process; the measurements take turns, so that a machine that others use too is as fair to each as it
can be. Imports are not timed, but in a row of its own: the whole command.
"""

from __future__ import annotations

import argparse
import hashlib
import itertools
import json
import os
import platform
import random
import shutil
import statistics
import subprocess
import sys
import sysconfig
import time
from collections.abc import Iterator
from datetime import date
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

FILE_BYTES = 64_000_000
VOCAB_SIZE = 32_768
SEQUENCE_LENGTH = 1024
# What a 13.8 M parameter GPT-2 takes on two cores (bf16, compiled): the need of the loader.
TRAINING_TOKENS_PER_SECOND = 2_975


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--megabytes", type=int, default=500)
    parser.add_argument("--usual-megabytes", type=int, default=20, help="for the slow usual way")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument(
        "--only",
        nargs="+",
        choices=MEASUREMENTS,
        help="measure just these and print their figures instead of the table, as for memory on a "
        "large corpus: --megabytes 2000 --repeats 1 --only text",
    )
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.work_dir
    if arguments.measure:
        print(json.dumps(MEASUREMENTS[arguments.measure](folder)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    facts = make_corpus(folder, arguments.megabytes * 10**6, arguments.usual_megabytes * 10**6)
    found = medians(folder, arguments.repeats, arguments.only or list(MEASUREMENTS))
    if arguments.only:
        print(json.dumps(facts | found, indent=2))
        return
    print(table(facts, found, arguments))


# --- the corpus -----------------------------------------------------------------------------------


def source_files() -> list[bytes]:
    """The distinct texts of the installed Python, in an order that does not change."""
    places = {sysconfig.get_path(name) for name in ("stdlib", "purelib", "platlib")}
    seen, texts = set(), []
    for place in sorted(places):
        for path in sorted(Path(place).rglob("*")):
            if path.suffix not in (".py", ".md", ".txt", ".rst") or not path.is_file():
                continue
            content = path.read_bytes()
            digest = hashlib.md5(content).digest()
            if digest not in seen and is_text(content):
                seen.add(digest)
                texts.append(content)
    return texts


def is_text(content: bytes) -> bool:
    try:
        return bool(content.decode())
    except UnicodeDecodeError:
        return False


def endless(texts: list[bytes]) -> Iterator[bytes]:
    """All texts, and all again in another order, and so on."""
    chosen = random.Random(0)
    while True:
        texts = list(texts)
        chosen.shuffle(texts)
        yield from texts


def make_corpus(folder: Path, target: int, usual: int) -> dict[str, float]:
    """Write the corpus as text, jsonl and parquet, the tokenizer, and a small part; once."""
    done = folder / "facts.json"
    if done.exists() and (facts := json.loads(done.read_text()))["target"] == target:
        return facts
    import pyarrow as pa
    import pyarrow.parquet as pq

    from p2p_llm_forge.data import text_files
    from p2p_llm_forge.data import tokenizer as tokenization
    from p2p_llm_forge.data.input_file import InputFile
    from p2p_llm_forge.data.parts import ReadOptions, Span

    for name in ("text", "jsonl", "parquet", "small"):
        (folder / name).mkdir(exist_ok=True)
    texts = source_files()
    stream, written, number = endless(texts), 0, 0
    while written < target:
        parts, size = [], 0
        while size < min(FILE_BYTES, target - written):
            parts.append(next(stream))
            size += len(parts[-1])
        raw = b"\n\n".join(parts)
        (folder / "text" / f"{number:03d}.txt").write_bytes(raw)
        column = text_files.text_column(raw, InputFile(Span("", 0, 0), ReadOptions()), 0).cast(
            pa.large_string()
        )
        pq.write_table(pa.table({"text": column}), folder / "parquet" / f"{number:03d}.parquet")
        with (folder / "jsonl" / f"{number:03d}.jsonl").open("w") as file:
            file.writelines(json.dumps({"text": text}) + "\n" for text in column.to_pylist())
        if not number:
            (folder / "small" / "part.txt").write_bytes(raw[:usual].rsplit(b"\n\n", 1)[0])
            documents = column.to_pylist()[: len(column) // 3]
            tokenization.train_tokenizer(documents, VOCAB_SIZE).save_pretrained(
                folder / "tokenizer"
            )
        written += len(raw)
        number += 1
    distinct = min(sum(map(len, texts)), written)
    facts = {"target": target, "bytes": written, "distinct": distinct, "files": len(texts)}
    done.write_text(json.dumps(facts))
    return facts


# --- what is measured, each in a process of its own -----------------------------------------------


def prepared(folder: Path, kind: str) -> dict[str, float]:
    """prepare_data.prepare of the corpus in one format."""
    import awkward  # noqa: F401  what is loaded before the clock starts
    import datasets  # noqa: F401
    import gigatoken  # noqa: F401
    import psutil  # noqa: F401
    import pyarrow.compute  # noqa: F401
    import xxhash  # noqa: F401
    from transformers import AutoTokenizer

    from p2p_llm_forge.config import PrepareConfig
    from prepare_data import prepare

    AutoTokenizer.from_pretrained(folder / "tokenizer")
    out = folder / "out" / kind
    shutil.rmtree(out, ignore_errors=True)  # a run that was interrupted would be gone on with
    config = PrepareConfig(
        [str(folder / kind)],
        str(out),
        tokenizer=str(folder / "tokenizer"),
        sequence_length=SEQUENCE_LENGTH,
    )
    started = clock()
    manifest = prepare(config)
    times = since(started)
    tokens = sum(facts.tokens for facts in manifest.splits.values())
    arrow = sum(path.stat().st_size for path in out.rglob("*.arrow"))
    return {
        "bytes": text_bytes(folder / "text"),
        **times,
        "disk_per_token": arrow / tokens,
        "tokens": tokens,
    }


def clock() -> tuple[float, float]:
    """Seconds on the wall, and of this process and its children on the cores."""
    return time.perf_counter(), sum(os.times()[:4])


def since(started: tuple[float, float]) -> dict[str, float]:
    wall, cores = (now - then for now, then in zip(clock(), started, strict=True))
    return {"seconds": wall, "core_seconds": cores}


def text_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.iterdir())


def whole_command(folder: Path) -> dict[str, float]:
    """The script as it is typed, from start to exit."""
    command = [
        sys.executable, str(ROOT / "prepare_data.py"), "--dataset-path", str(folder / "text"),
        "--output-dir", str(folder / "out" / "text"), "--tokenizer", str(folder / "tokenizer"),
        "--sequence-length", str(SEQUENCE_LENGTH), "--overwrite",
    ]  # fmt: skip
    started = clock()
    subprocess.run(command, check=True, capture_output=True)
    return {"bytes": text_bytes(folder / "text"), **since(started)}


def gigatoken_alone(folder: Path) -> dict[str, float]:
    """The fast tokenizer on the same files, its tokens kept in memory and thrown away."""
    import gigatoken
    from transformers import AutoTokenizer

    from p2p_llm_forge.data.fast_path import rules_of_text

    rules = rules_of_text(AutoTokenizer.from_pretrained(folder / "tokenizer"))
    encoder = gigatoken.Tokenizer.from_json(rules)
    files = sorted((folder / "text").iterdir())
    started = clock()
    for file in files:  # one by one, or all tokens would have to fit into memory
        encoder.encode_files([file])
    return {"bytes": text_bytes(folder / "text"), **since(started)}


def usual_way(folder: Path) -> dict[str, float]:
    """datasets.map with the tokenizer, then map with group_texts, as in run_clm.py."""
    import datasets
    from transformers import AutoTokenizer

    from p2p_llm_forge.data import text_files
    from p2p_llm_forge.data.input_file import InputFile
    from p2p_llm_forge.data.parts import ReadOptions, Span

    datasets.disable_caching()
    datasets.disable_progress_bars()
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    raw = (folder / "small" / "part.txt").read_bytes()
    documents = text_files.text_column(raw, InputFile(Span("", 0, 0), ReadOptions()), 0).to_pylist()
    rows = datasets.Dataset.from_dict({"text": [document.decode() for document in documents]})
    rows.save_to_disk(folder / "small" / "rows")
    rows = datasets.load_from_disk(str(folder / "small" / "rows"))

    def encode(batch):
        return tokenizer([text + tokenizer.eos_token for text in batch["text"]])

    def group_texts(batch):
        joined = {key: list(itertools.chain(*values)) for key, values in batch.items()}
        whole = len(joined["input_ids"]) // SEQUENCE_LENGTH * SEQUENCE_LENGTH
        result = {
            key: [values[i : i + SEQUENCE_LENGTH] for i in range(0, whole, SEQUENCE_LENGTH)]
            for key, values in joined.items()
            if key in ("input_ids", "attention_mask")
        }
        result["labels"] = result["input_ids"].copy()
        return result

    workers = len(os.sched_getaffinity(0))
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    started = clock()
    tokens = rows.map(encode, batched=True, num_proc=workers, remove_columns=["text"])
    blocks = tokens.map(
        group_texts, batched=True, num_proc=workers, remove_columns=tokens.column_names
    )
    blocks.save_to_disk(folder / "small" / "blocks")
    times = since(started)
    size = sum(path.stat().st_size for path in (folder / "small" / "blocks").rglob("*.arrow"))
    per_token = size / (len(blocks) * SEQUENCE_LENGTH)
    return {"bytes": len(raw), **times, "disk_per_token": per_token}


def reader(folder: Path) -> dict[str, float]:
    """Blocks a second that training reads, 8 at a time in a random order."""
    from p2p_llm_forge.data.dataset import open_prepared

    blocks = open_prepared(folder / "out" / "text").blocks("train")
    assert blocks is not None
    order = random.Random(0).choices(range(len(blocks)), k=20_000)
    started = time.perf_counter()
    for start in range(0, len(order), 8):
        blocks.inputs_and_targets(order[start : start + 8])
    return {"blocks_per_second": len(order) / (time.perf_counter() - started)}


MEASUREMENTS = {
    "usual": usual_way,
    "gigatoken": gigatoken_alone,
    "text": lambda folder: prepared(folder, "text"),
    "jsonl": lambda folder: prepared(folder, "jsonl"),
    "parquet": lambda folder: prepared(folder, "parquet"),
    "command": whole_command,
    "reader": reader,
}


def medians(folder: Path, repeats: int, names: list[str]) -> dict[str, dict[str, float]]:
    """The medians of every measurement's figures."""
    results: dict[str, list[dict[str, float]]] = {name: [] for name in names}
    for _ in range(repeats):
        for name, found in results.items():
            found.append(measured(name, folder))
            medians = {key: round(value, 3) for key, value in found[-1].items()}
            print(name, medians, file=sys.stderr, flush=True)
    return {
        name: {key: statistics.median(one[key] for one in found) for key in found[0]}
        for name, found in results.items()
    }


def measured(name: str, folder: Path) -> dict[str, float]:
    """One measurement in a fresh process, and the largest memory that the process took."""
    return measured_by(Path(__file__), name, folder)


def measured_by(script: Path, name: str, folder: Path) -> dict[str, float]:
    """One measurement of a script in a fresh process."""
    command = [sys.executable, str(script), "--work-dir", str(folder), "--measure", name]
    child = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)
    assert child.stdout
    output = child.stdout.read()
    _, status, usage = os.wait4(child.pid, 0)
    child.returncode = status
    assert status == 0, f"{name} failed"
    result = json.loads(output.splitlines()[-1])
    if "bytes" in result:
        result["mb_per_second"] = result["bytes"] / 1e6 / result["seconds"]
        result["mb_per_core_second"] = result["bytes"] / 1e6 / result["core_seconds"]
    return {**result, "rss_gb": usage.ru_maxrss / 1e6}


# --- the table ------------------------------------------------------------------------------------


def table(
    facts: dict[str, float], found: dict[str, dict[str, float]], arguments: argparse.Namespace
) -> str:
    """The figures as Markdown."""
    usual, alone = found["usual"]["mb_per_second"], found["gigatoken"]["mb_per_second"]
    rows = {
        f"the usual way (two `datasets.map`, on {arguments.usual_megabytes} MB)": "usual",
        "prepare_data.py from .txt": "text",
        "prepare_data.py from .jsonl": "jsonl",
        "prepare_data.py from .parquet": "parquet",
        "the same from .txt, the whole command with its start": "command",
        "gigatoken alone, tokens thrown away": "gigatoken",
    }
    lines = [
        f"{date.today()}, {describe_machine()}. Corpus: {facts['bytes'] / 1e6:.0f} MB, "
        f"{facts['distinct'] / 1e6:.0f} MB of it distinct ({facts['files']:.0f} files). "
        f"Byte-level BPE of {VOCAB_SIZE}, blocks of {SEQUENCE_LENGTH}. Medians of "
        f"{arguments.repeats} runs.",
        "",
        "| | MB/s | x the usual way | x gigatoken alone | MB per core-second | disk, bytes/token "
        "| peak RSS, GB |",
        "|---|---|---|---|---|---|---|",
    ]
    for label, name in rows.items():
        row = found[name]
        speed = row["mb_per_second"]
        disk = f"{row['disk_per_token']:.3f}" if "disk_per_token" in row else "-"
        lines.append(
            f"| {label} | {speed:.1f} | {speed / usual:.1f} | {speed / alone:.2f} | "
            f"{row['mb_per_core_second']:.1f} | {disk} | "
            f"{row['rss_gb']:.2f} |"
        )
    speed = found["reader"]["blocks_per_second"]
    need = TRAINING_TOKENS_PER_SECOND / SEQUENCE_LENGTH
    lines += [
        "",
        f"ReadOptions, one process: {speed:,.0f} blocks/s = {speed * SEQUENCE_LENGTH / 1e6:.0f} "
        f"Mtoken/s, {speed / need:,.0f} times what training takes on this machine "
        f"({TRAINING_TOKENS_PER_SECOND:,} tokens/s).",
    ]
    return "\n".join(lines)


def describe_machine() -> str:
    from importlib.metadata import version

    cores = len(os.sched_getaffinity(0))
    names = ("gigatoken", "datasets", "transformers", "tokenizers", "pyarrow")
    versions = ", ".join(f"{name} {version(name)}" for name in names)
    return f"{cores} cores, {platform.machine()}, Python {platform.python_version()}, {versions}"


if __name__ == "__main__":
    main()
