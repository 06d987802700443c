"""What the benchmarks of tuning say of figures that are known."""

from __future__ import annotations

from benchmarks.finetune import report
from benchmarks.finetune_quality import ARMS, table
from benchmarks.hf_tune import as_examples


def test_two_peers_are_compared_with_one_measured_beside_them():
    runs = [
        {"tokens_per_s": 190.0, "alone": 100.0, "bytes_per_update": 8e6},
        {"tokens_per_s": 150.0, "alone": 75.0, "bytes_per_update": 8e6},
        {"tokens_per_s": 180.0, "alone": 100.0, "bytes_per_update": 8e6},
    ]
    results = {"parameters": 60e6, "runs": {"lora": runs}}
    assert "| lora | 1.90 | 1.80 to 2.00 | 180 | 8.0 |  |" in report(results)
    results["memory"] = {"lora": 2**30, "full": 2**31}
    text = report(results)
    assert "| 8.0 | 1.00 |" in text and "Memory of LoRA: 0.50 of full tuning's." in text


def test_losses_are_shown_with_how_far_they_are_apart_seed_by_seed():
    losses = dict(zip(ARMS, ([2.0, 3.0], [2.0, 3.00001], [2.5, 2.5]), strict=True))
    lines = table(losses).splitlines()
    assert lines[3].endswith("| +0.00000, +0.00001 |") and lines[4].endswith(
        "| +0.50000, -0.50000 |"
    )
    assert lines[-1].endswith("0.70711")


def test_the_labels_of_a_row_are_the_row_which_transformers_shifts():
    (one,) = as_examples([[5, 6, 7]])
    assert one["labels"].tolist() == one["input_ids"].tolist() == [5, 6, 7]
