"""Shares adapt to measured speeds, alike on every rank, and only if asked to."""

from __future__ import annotations

from p2p_llm_forge.training.balance import FIRST_UPDATES, LATER_UPDATES, Balance


def simulate(balance: Balance, seconds_per_block: list[float], updates: int) -> None:
    for _ in range(updates):
        pairs = zip(balance.shares, seconds_per_block, strict=True)
        balance.measured([share * seconds for share, seconds in pairs])


def test_shares_become_proportional_to_speed():
    balance = Balance([16, 16], is_adaptive=True)
    simulate(balance, [0.01, 0.1], 1 + FIRST_UPDATES)
    assert balance.shares == [28, 4]  # one each, and the other 30 as 10 to 1
    simulate(balance, [0.1, 0.01], LATER_UPDATES)
    assert balance.shares == [4, 28]


def test_the_first_update_which_warms_up_does_not_count():
    balance = Balance([8, 8], is_adaptive=True)
    simulate(balance, [100.0, 0.01], 1)
    simulate(balance, [0.01, 0.01], FIRST_UPDATES)
    assert balance.shares == [8, 8]


def test_shares_stay_unless_adapting_was_asked_for():
    balance = Balance([16, 16], is_adaptive=False)
    simulate(balance, [0.01, 0.1], 100)
    assert balance.shares == [16, 16]
