"""Options of check_cluster.py beside those of a training."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import CheckConfig


def test_a_check_needs_neither_data_nor_a_folder_and_finds_other_problems():
    assert not CheckConfig().problems().found
    (problem,) = CheckConfig(batch_size=0).problems().found
    assert problem.found == "--batch-size is 0"


@pytest.mark.parametrize(
    ("asked", "found"),
    [
        ({"write_configs": "folder"}, "--write-configs and --hosts belong together"),
        ({"hosts": ["a"]}, "--write-configs and --hosts belong together"),
        ({"gpus_per_host": 0}, "--gpus-per-host is 0"),
        ({"gpus_per_host": 1, "cpu": True}, "contradict each other"),
        ({"meet": True}, "--meet needs the file"),
    ],
)
def test_what_does_not_go_together_is_refused(asked, found):
    (problem,) = CheckConfig(**asked).problems().found
    assert found in problem.found and problem.fix


def test_how_a_launch_is_looked_at_may_differ_between_ranks():
    one, other = CheckConfig(json=True, config_file=["a"]), CheckConfig(config_file=["b"])
    assert one.shared_settings() == other.shared_settings()
