"""What a checkpoint holds of a strategy, and what updates have cost."""

from __future__ import annotations

from types import SimpleNamespace

import pytest

from p2p_llm_forge.sync.base import SavedSync, SyncReport


def saved(**facts) -> SavedSync:
    return SavedSync(facts, {}, lambda rank: {})


def test_a_checkpoint_is_of_a_strategy_only_where_ranks_kept_something_by_it():
    diloco, ddp = (SimpleNamespace(settings=lambda s=s: {"sync": s}) for s in ("diloco", "ddp"))
    of_rounds = saved(settings={"sync": "diloco", "sync_every": 5}, ranks=3)
    assert of_rounds.is_of(diloco) and not of_rounds.is_of(ddp)
    assert of_rounds.world_size == 3
    plain = saved(settings={"sync": "ddp"})
    assert plain.world_size == 0 and not plain.is_of(ddp)


def test_weights_are_agreed_on_unless_a_strategy_denies_it():
    assert saved(settings={"sync": "ddp"}).is_agreed
    assert saved(is_agreed=True).is_agreed and not saved(is_agreed=False).is_agreed


def test_reports_add_up_and_divide_by_time_and_updates():
    meter = SyncReport()
    for sent, seconds in ((100, 0.5), (0, 0.0), (300, 1.5)):
        meter.add(SyncReport(sent, seconds))
    figures = meter.figures(spent_s=8.0, updates=4)
    assert figures == {"communication": pytest.approx(0.25), "bytes_sent_per_update": 100}
