"""How many near duplicates `--deduplicate near` finds, how many others it takes for one, its cost.

    python benchmarks/near_duplicates.py --work-dir /tmp/near_duplicates

Pairs of texts are made with a known Jaccard similarity of their runs of five words, from 0.5 to 1:
100 to 1,000 words drawn from the .py, .md, .txt and .rst files below this Python, and the same text
with single words replaced, or without its end. prepare_data.py gets all of them, and what is left
of the second texts is read back from its blocks.

The cost: the same files as documents of about 3 kB, prepared with each kind of `--deduplicate`,
each time in a fresh process, the kinds in turn; medians of --repeats runs. Imports are not timed.
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import shutil
import statistics
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data_preparation import measured_by, source_files  # noqa: E402

KINDS = ("none", "exact", "near")
DOCUMENT_BYTES = 3_000
BINS = [0.5, 0.55, 0.6, 0.65, 0.7, 0.75, 0.8, 0.85, 0.9, 0.95]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--work-dir", type=Path, required=True)
    parser.add_argument("--pairs", type=int, default=4_000)
    parser.add_argument("--megabytes", type=int, default=100)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--measure", choices=KINDS, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    folder: Path = arguments.work_dir
    if arguments.measure:
        print(json.dumps(cost(folder, arguments.measure)))
        return
    folder.mkdir(parents=True, exist_ok=True)
    texts = source_files()
    print(table_of_pairs(found_pairs(folder, texts, arguments.pairs)))
    write_corpus(folder, texts, arguments.megabytes * 10**6)
    print(cost_of_keys(folder, arguments.repeats))
    print(table_of_costs(folder, arguments.repeats))


# --- what is found --------------------------------------------------------------------------------


def found_pairs(folder: Path, texts: list[bytes], count: int) -> list[tuple[float, bool]]:
    """Of each pair its similarity, and whether the second text was left out."""
    chosen = random.Random(0)
    vocabulary = [word for text in chosen.sample(texts, 300) for word in text.decode().split()]
    pairs = [pair(chosen, vocabulary, number, 0.5 + number / count / 2) for number in range(count)]
    rows = [one for one, _ in pairs] + [other for _, other in pairs]
    chosen.shuffle(rows)
    rows.sort(key=lambda text: text[:1])  # all first texts before all others, else at random
    path = folder / "pairs.jsonl"
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in rows))
    # Of blocks so short that hardly a token is in none.
    there = documents_of(prepare(path, folder / "pairs", "near", 2), folder / "pairs")
    assert all(one.split()[0] in there for one, _ in pairs), "a first text was left out"
    return [(jaccard(*both), both[1].split()[0] not in there) for both in pairs]


def pair(
    chosen: random.Random, vocabulary: list[str], number: int, similarity: float
) -> tuple[str, str]:
    """Two texts of about this similarity; each begins with a word of its own."""
    words = chosen.choices(vocabulary, k=chosen.randint(100, 1000))
    other = list(words)
    runs = len(words) - 4
    if number % 2:
        other = other[: round(runs * similarity) + 4]
    else:  # a word that is replaced changes five runs of each text
        replaced = round(runs * (1 - similarity) / (1 + similarity) / 5)
        for place in range(replaced):
            other[round((place + 0.5) * len(words) / replaced)] = f"new{place}"
    return " ".join([f"a{number}", *words]), " ".join([f"b{number}", *other])


def jaccard(one: str, other: str) -> float:
    """The share of their runs of five words that two texts have in common."""
    of_one, of_other = (
        {tuple(words[at : at + 5]) for at in range(len(words) - 4)}
        for words in (one.split(), other.split())
    )
    return len(of_one & of_other) / len(of_one | of_other)


def documents_of(manifest, folder: Path) -> set[str]:
    """The first words of the documents in a prepared dataset."""
    from transformers import AutoTokenizer

    from p2p_llm_forge.data.dataset import open_prepared

    tokens = np.concatenate(
        [chunk.ravel() for chunk in open_prepared(folder).blocks("train").chunks]
    )
    begins = np.append(0, np.flatnonzero(tokens == manifest.eos_token_id) + 1)
    tokenizer = AutoTokenizer.from_pretrained(folder / "tokenizer")
    heads = tokenizer.batch_decode([tokens[at : at + 16] for at in begins[:-1]])
    return {head.split()[0] for head in heads}


def prepare(path: Path, out: Path, kind: str, sequence_length: int = 1024):
    """The manifest of a dataset made of a file, with the tokenizer of the first one made."""
    import prepare_data
    from p2p_llm_forge.config import PrepareConfig

    shutil.rmtree(out, ignore_errors=True)
    how = {"deduplicate": kind, "validation_fraction": 0.0, "sequence_length": sequence_length}
    tokenizer = out.parent / "tokenizer"
    if tokenizer.exists():
        how["tokenizer"] = str(tokenizer)
    manifest = prepare_data.prepare(PrepareConfig([str(path)], str(out), **how))
    if not tokenizer.exists():
        shutil.copytree(out / "tokenizer", tokenizer)
    return manifest


def table_of_pairs(found: list[tuple[float, bool]]) -> str:
    lines = ["| Jaccard of the pair | pairs | second text left out |", "|---|---|---|"]
    for low, high in zip(BINS, [*BINS[1:], 1.0], strict=True):
        of_bin = [left_out for similarity, left_out in found if low <= similarity < high]
        share = 100 * statistics.mean(of_bin)
        lines.append(f"| {low:.2f} to {high:.2f} | {len(of_bin)} | {share:.1f} % |")
    alike = [left_out for similarity, left_out in found if similarity >= 0.8]
    left_out = [similarity for similarity, is_out in found if is_out]
    lines += [
        "",
        f"Of pairs of 0.8 and more {100 * statistics.mean(alike):.1f} % are found. Of what is left"
        f" out {100 * statistics.mean(s >= 0.8 for s in left_out):.1f} % is of 0.8 and more,"
        f" {100 * statistics.mean(s >= 0.75 for s in left_out):.1f} % of 0.75 and more.",
    ]
    return "\n".join(lines)


# --- what it costs --------------------------------------------------------------------------------


def write_corpus(folder: Path, texts: list[bytes], target: int) -> None:
    """Files of the installed Python as documents of about DOCUMENT_BYTES."""
    written = 0
    with (folder / "corpus.jsonl").open("w") as file:
        for text in texts:
            document = ""
            for paragraph in text.decode().split("\n\n"):
                document += paragraph + "\n\n"
                if len(document) >= DOCUMENT_BYTES:
                    file.write(json.dumps({"text": document}) + "\n")
                    written += len(document)
                    document = ""
            if written >= target:
                return


def cost_of_keys(folder: Path, repeats: int) -> str:
    """What it takes of a core to tell documents apart, which is all that threads do more."""
    import pyarrow as pa

    from p2p_llm_forge.data.document_keys import document_keys

    with (folder / "corpus.jsonl").open() as file:
        texts = [json.loads(line)["text"].encode() for line in itertools.islice(file, 5000)]
    column = pa.array(texts, pa.large_binary())
    rates: dict[str, list[float]] = {kind: [] for kind in KINDS[1:]}
    for _ in range(repeats):
        for kind, of_kind in rates.items():
            started = time.process_time()
            document_keys(column, kind)
            of_kind.append(column.nbytes / 1e6 / (time.process_time() - started))
    return "Keys alone, MB per core-second: " + ", ".join(
        f"{kind} {statistics.median(of_kind):.0f}" for kind, of_kind in rates.items()
    )


def cost(folder: Path, kind: str) -> dict[str, float]:
    """prepare_data.prepare of the corpus, with the tokenizer that is there."""
    import awkward  # noqa: F401  what is loaded before the clock starts
    import datasets  # noqa: F401
    import gigatoken  # noqa: F401
    import rensa  # noqa: F401
    from data_preparation import clock, since

    out = folder / "out"
    shutil.rmtree(out, ignore_errors=True)
    started = clock()
    manifest = prepare(folder / "corpus.jsonl", out, kind)
    times = since(started)
    left_out = manifest.left_out.get("repeated")
    return {
        "bytes": (folder / "corpus.jsonl").stat().st_size,
        "left_out": left_out.documents if left_out else 0,
        "documents": manifest.splits["train"].documents,
        **times,
    }


def table_of_costs(folder: Path, repeats: int) -> str:
    found: dict[str, list[dict[str, float]]] = {kind: [] for kind in KINDS}
    for _ in range(repeats):
        for kind, of_kind in found.items():
            of_kind.append(measured_by(Path(__file__), kind, folder))
    lines = [
        "| `--deduplicate` | MB/s | seconds, of those without | MB per core-second "
        "| peak memory, GB | documents | left out |",
        "|---|---|---|---|---|---|---|",
    ]
    for kind, of_kind in found.items():
        pairs = zip(of_kind, found["none"], strict=True)
        longer = statistics.median(one["seconds"] / plain["seconds"] for one, plain in pairs)
        middle = {key: statistics.median(one[key] for one in of_kind) for key in of_kind[0]}
        lines.append(
            f"| {kind} | {middle['mb_per_second']:.1f} | {longer:.2f} |"
            f" {middle['mb_per_core_second']:.1f} | {middle['rss_gb']:.2f} |"
            f" {middle['documents']:.0f} | {middle['left_out']:.0f} |"
        )
    return "\n".join(lines)


if __name__ == "__main__":
    main()
