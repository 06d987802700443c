"""A run's figures, as a file keeps them and as people read them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from p2p_llm_forge.files import write_json
from p2p_llm_forge.training.results import RESULTS, TrainResult
from tests import ROOT
from tests.training.figures import BARE, FULL


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


def test_a_model_that_lies_there_has_a_picture_and_a_line_that_lets_it_write(tmp_path, monkeypatch):
    folder = tmp_path / "a run"
    folder.mkdir()
    result = replace(FULL, output_dir=str(folder))
    assert result.summary().splitlines()[-1] == "sample    'Mara bakes'"
    for name in ("loss.png", "config.json"):
        (folder / name).touch()
    monkeypatch.chdir(ROOT)
    picture, write = result.summary().splitlines()[-2:]
    assert picture == f"picture   {folder}/loss.png"
    assert write == f"write     python generate.py '{folder}'"
    monkeypatch.chdir(tmp_path)
    assert result.summary().endswith(f"python {ROOT}/generate.py '{folder}'")
    assert "python" not in replace(result, is_published=False).summary()
