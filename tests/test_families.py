"""The benchmark of all families takes no failure for a success, and gives sizes that exist."""

from __future__ import annotations

import pytest

from benchmarks.families import MORE, families, judge, sizes_of, table
from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.model.sizes import sizes_asked_for

REFUSED = "note\nerror: a bert sees too much\n  fix: choose another\n"


@pytest.mark.parametrize(
    ("status", "said", "expected"),
    [
        (0, "sample 'error: '", ("trained", "")),
        (2, REFUSED, ("refused", "a bert sees too much")),
        (2, f"Traceback (most recent call last):\nKeyError: 1\n{REFUSED}", ("failed", None)),
        (0, "Traceback (most recent call last):\nKeyError: 1\n", ("failed", "KeyError: 1")),
        (1, "differs: a layer\n", ("failed", "status 1: differs: a layer")),
        (2, "", ("failed", "status 2: ")),
        (-9, "step 1", ("failed", "took too long")),
    ],
)
def test_only_a_run_that_ended_well_has_trained(status, said, expected):
    outcome, why = judge(status, said)
    assert outcome == expected[0] and expected[1] in (why, None)


@pytest.mark.parametrize("family", ["gpt2", "gemma3", "bart", *MORE])
def test_the_sizes_that_a_family_is_given_are_its_own(family):
    assert family in families()
    _, asked = sizes_asked_for(TrainConfig(model_type=family, config_overrides=sizes_of(family)))
    assert asked


def test_the_table_counts_every_outcome():
    outcomes = {"gpt2": ("trained", ""), "gemma3": ("trained", "as a gemma3_text")}
    outcomes |= {"xlnet": ("refused", "sees | more"), "x": ("failed", "status 1")}
    shown = table({name: {"outcome": how, "why": why} for name, (how, why) in outcomes.items()})
    assert "of 4 types 2 trained, 1 were refused, 1 failed." in shown
    assert "Trained: gpt2.\n" in shown
    assert "| gemma3 | trained | as a gemma3_text |" in shown
    assert "| xlnet | refused | sees / more |" in shown and "| x | failed | status 1 |" in shown
