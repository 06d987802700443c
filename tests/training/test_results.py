"""A run's figures, as a file keeps them and as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2p_llm_forge.files import write_json
from p2p_llm_forge.training.results import RESULTS, TrainResult

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


@pytest.mark.parametrize("result", [FULL, BARE])
def test_a_result_that_was_written_is_found_again(tmp_path, result):
    assert TrainResult.load(tmp_path) is None
    write_json(tmp_path / RESULTS, vars(result))
    assert TrainResult.load(tmp_path) == result


def test_the_summary_has_a_line_for_each_thing_that_is_known():
    assert FULL.summary().splitlines() == [
        "model     artifacts/mara after 1,200 updates (2,457,600 tokens)",
        "training  loss 1.5000 nats per token",
        "speed     12,346 tokens/s over 2 process(es), MFU 41.2%",
        "spent     3 min 5 s, at most 1.23 GB of memory in a process",
        "network   communication 12.5%, 2.50 MB/step from each peer",
        "held out  loss 1.2500 nats per token, perplexity 3.5, 0.000 bits per byte, 50.0% of tokens"
        " guessed right",
        "sample    'Mara bakes'",
    ]
    assert BARE.summary() == "model     artifacts/mara after 0 updates"
    assert "bits" not in replace(FULL, bits_per_byte=None).summary()
    unknown = replace(FULL, mfu=None, memory_peak_bytes=None).summary()
    assert "process(es), MFU unknown\nspent     3 min 5 s\n" in unknown


def test_the_model_card_is_read_by_the_hub_and_names_the_model_it_began_from():
    import yaml

    _, head, body = FULL.model_card("gpt2").split("---\n", 2)
    assert yaml.safe_load(head) == {
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "base_model": "gpt2",
        "tags": ["p2p-llm-forge"],
    }
    assert "# mara\n" in body
    assert "| eval_loss | 1.2500 |" in body and "| steps | 1200 |" in body
    assert "| mfu | 0.4125 |" in body and "| seconds | 185.4000 |" in body
    assert "sample" not in body
    made_with = {"model_type": "qwen3", "depth": None, "learning_rate": 0.0078}
    card = FULL.model_card(None, made_with)
    assert "| model_type | qwen3 |\n| learning_rate | 0.0078 |\n" in card and "depth" not in card
    card = BARE.model_card(None)
    assert "base_model" not in card and "eval_loss" not in card
