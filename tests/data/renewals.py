"""Run by tests, in a process with no memory of others: how many encoders a text takes."""

from __future__ import annotations

import sys

import numpy as np

from p2p_llm_forge.data.encode import Encoders
from p2p_llm_forge.data.parts import column_of
from tests.data.tokenizers import byte_tokenizer

TEXT_BYTES = 16 << 20


def main() -> None:
    if sys.argv[1] == "known":
        text = np.tile(np.frombuffer(b"one of the same few words ", np.uint8), TEXT_BYTES // 26)
    else:
        draw = np.random.default_rng(0)
        text = draw.integers(ord("a"), ord("z") + 1, TEXT_BYTES, np.uint8)
        text[::8] = ord(" ")
    documents = [part.tobytes() for part in np.array_split(text, 4_000)]
    encoders, made = Encoders(byte_tokenizer(), "fast"), []
    make = encoders._new_encoder
    encoders._new_encoder = lambda: (made.append(1), make())[1]  # type: ignore[method-assign]
    encoders.encode(column_of(documents))
    print(len(made))


if __name__ == "__main__":
    main()
