"""Results of runs that never were: one with every figure, one with none."""

from __future__ import annotations

from p2p_llm_forge.training.results import TrainResult

FULL = TrainResult(
    output_dir="artifacts/mara",
    steps=1200,
    tokens=2_457_600,
    train_loss=1.5,
    tokens_per_second=12_345.6,
    processes=2,
    communication=0.125,
    bytes_sent_per_update=2.5e6,
    eval_loss=1.25,
    perplexity=3.49,
    bits_per_byte=0.0,
    token_accuracy=0.5,
    sample="Mara bakes",
    mfu=0.4125,
    memory_peak_bytes=1_234_000_000,
    seconds=185.4,
)
BARE = TrainResult("artifacts/mara", 0, 0, None, None, 1)
