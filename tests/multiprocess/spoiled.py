"""A program for tests: train.py, but one rank's gradient, weight or moment is spoiled in a step.

Its first argument is JSON: what to spoil (gradient, weight or moment), on which rank, in which
step (from 0), and whether that rank is asked to stop then. The others are train.py's.
"""

from __future__ import annotations

import json
import os
import signal
import sys


def main() -> int:
    import torch

    import train

    order, sys.argv = json.loads(sys.argv[1]), [sys.argv[0], *sys.argv[2:]]
    take_update = train.take_update

    def spoil(run, step):
        """As a bug, a broken memory or an overflow would."""
        is_now = [run.job.cluster.rank, step] == [order["rank"], order["step"]]
        parameter = next(run.learner.lm.parameters())

        def spoil_gradient(*_):  # after clipping, just before the update
            if is_now and order["what"] == "gradient":
                parameter.grad.fill_(float("nan"))

        if is_now and order.get("is_asked_to_stop"):
            os.kill(os.getpid(), signal.SIGTERM)
        hook = run.learner.bare_optimizer.register_step_pre_hook(spoil_gradient)
        update = take_update(run, step)
        hook.remove()
        if is_now and order["what"] == "weight":
            with torch.no_grad():
                parameter.view(-1)[7] = float("inf")
        if is_now and order["what"] == "moment":
            state = run.learner.bare_optimizer.state[parameter]
            state["exp_avg_sq"].view(-1)[7] = float("inf")
        return update

    train.take_update = spoil
    return train.main()
