"""What loss to expect of a model's size and of what it reads: a law fitted on small runs.

    bits per byte = c^k (E + A / size^a + B / bytes^b) (1 + HARM size / text again^h)

size: parameters that a token is multiplied by (of the layers and of the head). bytes: of text that
is read, of which repetitions count less and less (arXiv 2305.16264: a text's worth is bounded by
1 + REPEATS times it). c^k: how many bits per byte a compressor needs, to a power: the kind of
text. The form is that of Chinchilla (arXiv 2203.15556); its last factor is ours: a model that is
large for its text learns it by heart. text: its bytes; again: how often it is read after the first
time. Fitted by benchmarks/loss_law.py.
"""

from __future__ import annotations

import bz2
import math

# Fitted on 23 November 2026 to 20 runs of 100,000 to 3,200,000 tokens, depths 1 to 4, which it
# misses by 4.8 % (root mean square; benchmarks/README.md). Beyond, it is a guess by published
# exponents.
E, A, SIZE_POWER, B, BYTES_POWER = 0.7673, 15.4, 0.3336, 38.12, 0.297
HARM, HARM_POWER, KIND = 0.0008293, 1.162, 0.2745
REPEATS = 15.4  # of the paper
SAMPLE_BYTES = 200_000  # of a text, that are compressed


def worth(read: float, unique: float) -> float:
    """How many bytes of new text are worth as much as `read` bytes of a text of `unique` bytes."""
    if read <= unique:
        return read
    return unique * (1 + REPEATS * -math.expm1(-(read / unique - 1) / REPEATS))


def bits_per_byte(size: float, read: float, unique: float, compressed: float) -> float:
    """The loss to expect at the end, on unseen text. read, unique: bytes; compressed: see below."""
    learnt = E + A / size**SIZE_POWER + B / worth(read, unique) ** BYTES_POWER
    again = max(0.0, read / unique - 1)
    return compressed**KIND * learnt * (1 + HARM * size / unique * again**HARM_POWER)


def compressed_bits(text: bytes) -> float:
    """Bits that bzip2 needs for a byte of (the first SAMPLE_BYTES of) a text."""
    sample = text[:SAMPLE_BYTES]
    return 8 * len(bz2.compress(sample)) / max(1, len(sample))
