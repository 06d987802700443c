"""check_cluster.py on a machine with a GPU: it is found, used, and timed."""

from __future__ import annotations

import json

import pytest

from tests.gpu.devices import DEVICE, ON_A_GPU
from tests.runs import TINY_MODEL, by_hand, read

pytestmark = [*ON_A_GPU, pytest.mark.slow]
MODEL = ["--model-type=gpt2", f"--config-overrides={TINY_MODEL}", "--cpu-threads=1"]


def report(log) -> dict:
    """The JSON in what was printed, which other lines may stand before."""
    text = log.read_text()
    return json.loads(text[text.index("{\n") :])


def test_an_update_is_timed_on_the_card(zygote, generated, tmp_path):
    words, log = [f"--dataset-path={generated}", "--json", *MODEL], tmp_path / "log"
    assert zygote.wait(zygote.start(words, log, script="check_cluster")) in (0, 3), read(log)
    found = report(log)
    assert 0 < found["update_s"][0] < 60
    assert not [one for one in found["findings"] if one["level"] == "failure"]


def test_two_ranks_of_one_card_meet_on_gloo(zygote, generated, tmp_path):
    logs, ranks = [tmp_path / "rank0.log", tmp_path / "rank1.log"], []
    together = [f"--{name}={value}" for name, value in by_hand(2).items()]
    words = [f"--dataset-path={generated}", "--json", "--backend=gloo", *MODEL, *together]
    for rank, log in enumerate(logs):
        ranks.append(zygote.start([*words, f"--rank={rank}"], log, script="check_cluster"))
    statuses = [zygote.wait(pid) for pid in ranks]
    assert set(statuses) <= {0, 3}, read(logs[0]) + read(logs[1])
    found = report(logs[0])
    assert len(found["update_s"]) == 2 and all(seconds > 0 for seconds in found["update_s"])
    assert found["forecast"]
    assert DEVICE == "cpu" or "cuda" in json.dumps(found)
