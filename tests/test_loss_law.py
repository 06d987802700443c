"""The fit of the law of losses finds a law again that made the losses."""

from __future__ import annotations

import numpy as np

from benchmarks import loss_law
from p2p_llm_forge.training import law


def test_a_law_is_found_again_from_its_losses():
    before = {name: getattr(law, name) for name in loss_law.NAMES}
    # What size is worth is not fitted.
    made_by = np.array([0.8, 15.4, 0.3333, 9.0, 0.25, 0.02, 1.3, 0.4])
    runs = [
        {
            **{"text": "made up", "depth": depth, "width": 128 * depth, "vocab": 1024},
            **{"bytes": read, "unique_bytes": unique, "compressed": kind},
        }
        for depth in (1, 2, 4)
        for read, unique in ((1e5, 1e6), (1e6, 1e6), (4e6, 1e6), (1e6, 1e8), (1e7, 1e8))
        for kind in (1.7, 2.5)
    ]
    for one, loss in zip(runs, loss_law.expected(made_by, runs), strict=True):
        one["bits_per_byte"] = float(loss)
    found = loss_law.fitted(runs, tries=3)
    seen = np.array([one["bits_per_byte"] for one in runs])
    misses = loss_law.expected(found, runs) / seen - 1
    assert np.sqrt(np.mean(misses**2)) < 0.01
    assert {name: getattr(law, name) for name in loss_law.NAMES} == before
    assert len(loss_law.table(runs, found).splitlines()) == 2 + len(runs)
