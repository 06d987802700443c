"""What all strategies share: where peers may come and go."""

from __future__ import annotations

from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.sync.strategy import refuse_elastic


@pytest.mark.parametrize(
    ("settings", "expected"),
    [
        ({"sync_every": 20, "overlap_steps": 5, "save_every": 40}, None),
        ({"sync_every": 20, "save_every": 50}, "use 40 or 60"),
        ({"sync_every": 20, "fragments": 2, "save_every": 40}, "--fragments 2 leaves no moment"),
    ],
)
def test_peers_can_come_and_go_only_where_a_round_ends_for_the_whole_model(settings, expected):
    elastic = SimpleNamespace(launch=Launch(world_size=2, is_elastic=True))
    config = TrainConfig(sync="diloco", **settings)
    with pytest.raises(ForgeError, match=expected) if expected else nullcontext():
        refuse_elastic(config, elastic)
