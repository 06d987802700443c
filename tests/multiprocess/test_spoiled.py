"""What is not finite on any rank is not saved, and costs no good checkpoint."""

from __future__ import annotations

import json
import re

import pytest

from p2p_llm_forge.training import checkpoint
from tests.runs import DILOCO, flags, lines, read, results, start_ranks, weights

pytestmark = pytest.mark.slow


def spoiled(zygote, data, folder, log, order, **settings):
    """The statuses of two ranks, one of which is spoiled as `order` says."""
    words = [json.dumps(order), *flags(data, folder, **settings)]
    ranks = start_ranks(zygote, words, 2, log, script="tests.multiprocess.spoiled")
    return [zygote.wait(pid) for pid in ranks]


def goes_on(zygote, data, folder, log, **settings):
    """Start it again as the message says, from the newest good checkpoint to the end."""
    ranks = start_ranks(zygote, flags(data, folder, **settings), 2, log)
    assert [zygote.wait(pid) for pid in ranks] == [0, 0], read(log)
    assert all(tensor.isfinite().all() for tensor in weights(folder).values())


@pytest.mark.parametrize("what", ["gradient", "weight", "moment"])
def test_ddp_ends_before_anything_bad_is_saved(zygote, prepared, tmp_path, what):
    """Only rank 1 is bad, and rank 0 writes. By a save that is due, the last one, and SIGTERM's."""
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = {"save_every": 2, "keep_checkpoints": 1, "log_every": 100, "max_steps": 6}
    step = {"gradient": 3, "weight": 5, "moment": 4}[what]
    order = {"what": what, "rank": 1, "step": step, "is_asked_to_stop": what == "moment"}
    assert spoiled(zygote, prepared, folder, log, order, **settings) == [2, 2], read(log)
    printed = read(log)
    expected = f"step {step + 1} is not saved: rank 1 has NaN or infinite values in transformer.wte"
    assert expected in printed and "Traceback" not in printed, printed
    assert "lower --learning-rate and use --resume auto" in printed
    assert checkpoint.newest_good(folder) == (folder / f"checkpoint-{step // 2 * 2}", [])
    assert not (folder / "model.safetensors").exists() and not list(folder.glob("tmp-*"))
    goes_on(zygote, prepared, folder, log, **settings, learning_rate=1e-4)


def test_a_save_in_the_middle_of_a_spoiled_round_undoes_the_round(zygote, prepared, tmp_path):
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = {**DILOCO, "sync_every": 6, "save_every": 4, "max_steps": 18, "log_every": 6}
    order = {"what": "weight", "rank": 1, "step": 6}
    assert spoiled(zygote, prepared, folder, log, order, **settings) == [0, 0], read(log)
    expected = (
        "round 2 is discarded: weights became NaN or infinite on rank 1; .* updates 7 to 8 do"
    )
    assert len(re.findall(expected, read(log))) == 1, read(log)
    assert (results(folder)["steps"], results(folder)["discarded_updates"]) == (16, 2)
    for step in checkpoint.steps_saved(folder):
        assert checkpoint.damage(folder / f"checkpoint-{step}") is None


def test_a_discarded_round_is_reported_and_counts_nowhere(zygote, prepared, tmp_path):
    """Also where the run is resumed after it: the count is kept."""
    folder, log = tmp_path / "run", tmp_path / "log"
    settings = {**DILOCO, "sync_every": 4, "save_every": 8, "log_every": 4}
    settings |= {"lr_scheduler": "constant"}
    order = {"what": "gradient", "rank": 1, "step": 5}
    statuses = spoiled(zygote, prepared, folder, log, order, **settings, max_steps=12)
    assert statuses == [0, 0], read(log)
    printed = log.read_text()
    warning = "warning: round 2 is discarded: weights became NaN or infinite on rank 1;"
    assert printed.count(warning) == 1 and "updates 5 to 8 do not count" in printed
    assert printed.index(warning) < printed.index("after 8 updates (2,048 tokens)"), "at the end"
    assert "discarded 4 more updates" in printed
    found = results(folder)
    assert (found["steps"], found["tokens"], found["discarded_updates"]) == (8, 8 * 8 * 32, 4)
    assert [line.get("discarded_updates") for line in lines(folder) if "loss" in line] == [
        *(None, 4, 4)
    ]
    assert [line["loss"] is None for line in lines(folder) if "loss" in line] == [
        False,
        True,
        False,
    ]
    goes_on(zygote, prepared, folder, log, **settings, max_steps=16)
    found = results(folder)
    assert (found["steps"], found["tokens"], found["discarded_updates"]) == (12, 12 * 8 * 32, 4)
