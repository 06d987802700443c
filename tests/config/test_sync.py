"""Options of agreeing on weights: what goes together, and what is refused with a fix."""

from __future__ import annotations

import pytest

from p2p_llm_forge.config import TrainConfig


def test_streaming_runs_may_be_evaluated_at_any_update():
    asked = {"sync": "diloco", "sync_every": 30, "eval_every": 100}
    assert not TrainConfig("data", "run", **asked, fragments=2).problems().found
    assert TrainConfig("data", "run", **asked, fragments=1).problems().found


@pytest.mark.parametrize(
    ("asked", "found", "fix"),
    [
        (
            {"sync_every": 20},
            "--sync-every belongs to --sync diloco, this run is --sync ddp",
            "add",
        ),
        ({"fragments": 2, "outer_lr": 0.6}, "--outer-lr, --fragments belong to", "leave them out"),
        ({"sync": "diloco", "compress": "powersgd"}, "goes with --sync ddp", "int8 or int4"),
        (
            {"compress": "powersgd", "cluster_secret_file": "secret"},
            "does not cover",
            "use --compress int8 or int4",
        ),
        ({"sync": "diloco", "sync_every": 4, "overlap_steps": 4}, "not below", "use 3 or fewer"),
        (
            {"sync": "diloco", "sync_every": 4, "fragments": 5},
            "moments",
            "use 4 fragments or fewer",
        ),
        ({"sync": "diloco", "sync_every": 0}, "--sync-every is 0", "use 1 or more"),
        ({"sync": "diloco", "outer_momentum": 1.0}, "--outer-momentum is 1.0", "0 to below 1"),
        ({"sync": "diloco", "outer_lr": 0.0}, "--outer-lr is 0.0", "use a finite number above 0"),
        ({"sync": "auto", "compress": "int8"}, "--compress int8 was given", "leave out"),
        ({"compress": "int8", "powersgd_rank": 2}, "belongs to --compress powersgd", "leave the"),
        ({"compress": "fp16"}, "--compress is 'fp16'", "did you mean bf16?"),
        ({"compress": "int4,powersgd"}, "--compress is 'int4,powersgd'", "did you mean powersgd?"),
    ],
)
def test_settings_of_sync_that_do_not_fit_are_refused_with_a_fix(asked, found, fix):
    (problem,) = TrainConfig("data", "run", **asked).problems().found
    assert found in problem.found and fix in problem.fix
