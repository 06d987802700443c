"""How much is evaluated is a number of blocks, and none means all."""

from __future__ import annotations

from p2p_llm_forge.config.evaluation import EvaluationOptions, require_evaluations
from p2p_llm_forge.errors import Problems


def problems_of(**settings):
    problems = Problems()
    EvaluationOptions(**settings).check(problems)
    return [(one.found, one.fix) for one in problems.found]


def test_blocks_to_evaluate_on_are_a_number_of_them_or_all():
    for count in (None, 0, 1, 10**6):
        assert problems_of(eval_blocks=count) == []
    assert problems_of(eval_blocks=-1) == [("--eval-blocks is -1", "use 0 or more")]


def test_the_best_checkpoint_needs_an_evaluation_of_each():
    assert not require_evaluations(True, save_every=8, eval_every=4).found
    assert not require_evaluations(False, save_every=8, eval_every=3).found
    (problem,) = require_evaluations(True, save_every=8, eval_every=3).found
    assert problem.fix == "use --save-every 6 or 9"
