"""A prepared dataset of random tokens, made in a second: for speed, which no text decides.

    python -m benchmarks.generated_blocks --output-dir /tmp/blocks --vocab-size 50257

Frequencies of tokens follow Zipf's law, as those of words do. The files are those that
prepare_data.py writes, by the same writer, without its readers and its fast tokenizer.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path
from typing import Any

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))  # the project's own modules


def generate(
    folder: Path, vocab_size: int, length: int = 1024, blocks: int = 512, held_out: int = 0
) -> Path:
    """Write a dataset of `blocks` blocks of `length` tokens into a new folder; return the folder.

    held_out: blocks of a validation split; 0: none. Token 0 ends documents.
    """
    from p2p_llm_forge.data.blocks import BlockWriter
    from p2p_llm_forge.data.dataset import Manifest, SplitFacts
    from p2p_llm_forge.data.tokenizer import token_dtype, tokenizer_fingerprint
    from p2p_llm_forge.files import write_json

    tokenizer, dtype = word_tokenizer(vocab_size), token_dtype(vocab_size)
    draw, splits, writers = np.random.default_rng(0), {}, {}
    for name, count in {"train": blocks, "validation": held_out}.items():
        if not count:
            continue
        tokens = zipf(draw, vocab_size, count * length).astype(dtype)
        writers[name] = writer = BlockWriter(folder / name, length, dtype)
        writer.append(tokens)
        writer.finish()
        documents = int((tokens == 0).sum())
        splits[name] = SplitFacts(documents, count, len(tokens), 4 * len(tokens), dropped_tokens=0)
    manifest = Manifest(
        sequence_length=length,
        vocab_size=vocab_size,
        eos_token_id=0,
        dtype=dtype,
        tokenizer_fingerprint=tokenizer_fingerprint(tokenizer),
        arguments={"generated": "tokens by Zipf's law"},
        splits=splits,
        content_fingerprint=f"generated-{vocab_size}-{length}-{blocks}-{held_out}",
    )
    for name, writer in writers.items():
        writer.describe(name, f"generated-{name}")
    write_json(folder / "dataset_dict.json", {"splits": [*splits]})
    tokenizer.save_pretrained(folder / "tokenizer")
    manifest.save(folder)
    return folder


def zipf(draw: np.random.Generator, vocab_size: int, count: int) -> np.ndarray:
    """`count` tokens, of which number r comes about as often as 1 / (r + 1)."""
    cumulated = np.cumsum(1 / np.arange(1, vocab_size + 1))
    return np.searchsorted(cumulated, draw.random(count) * cumulated[-1])


def word_tokenizer(vocab_size: int) -> Any:
    """A tokenizer of so many made-up words; number 0 ends documents."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = {"</s>": 0} | {f"w{number}": number for number in range(1, vocab_size)}
    backend = Tokenizer(models.WordLevel(words, unk_token="</s>"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output-dir", type=Path, required=True)
    parser.add_argument("--vocab-size", type=int, default=50_257)
    parser.add_argument("--sequence-length", type=int, default=1024)
    parser.add_argument("--blocks", type=int, default=512)
    asked = parser.parse_args()
    generate(asked.output_dir, asked.vocab_size, asked.sequence_length, asked.blocks)


if __name__ == "__main__":
    main()
