"""Whether an arm differs from another by more than its seeds do: Student's paired t-test."""

from __future__ import annotations

import math
import statistics
from collections.abc import Sequence

BEYOND_NOISE = 0.05  # probability of such a difference, or a greater one, if there were none


def against(losses: Sequence[float], first: Sequence[float]) -> str:
    """How the losses of an arm differ from the first's of the same seeds, in words."""
    more = [one / other - 1 for one, other in zip(losses, first, strict=True)]
    mean = f"{statistics.mean(more):+.2%}"
    if len(more) < 2:
        return f"{mean}, one seed: noise is not known"
    t = paired_t(more)
    p = two_sided(t, len(more) - 1)
    verdict = "beyond noise" if p < BEYOND_NOISE else "within noise"
    return f"{mean}, t {t:+.1f}, p {p:.3f} of {len(more)} seeds: {verdict}"


def paired_t(differences: Sequence[float]) -> float:
    """Their mean in its own standard errors; 0 where there are none, infinite without spread."""
    mean, spread = statistics.mean(differences), statistics.stdev(differences)
    if spread == 0:
        return math.copysign(math.inf, mean) if mean else 0.0
    return mean / (spread / math.sqrt(len(differences)))


def two_sided(t: float, freedom: int, steps: int = 2000) -> float:
    """The probability of |t| or more by chance: Student's distribution, by Simpson's rule.

    With t = sqrt(freedom) tan(angle) its density is a power of the cosine.
    """

    def area(angle: float) -> float:
        width = angle / steps
        heights = [math.cos(width * i) ** (freedom - 1) for i in range(steps + 1)]
        inner = 4 * sum(heights[1:-1:2]) + 2 * sum(heights[2:-1:2])
        return width / 3 * (heights[0] + inner + heights[-1])

    return 1 - area(math.atan(abs(t) / math.sqrt(freedom))) / area(math.pi / 2)
