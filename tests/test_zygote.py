"""The zygote's own promise: the status of a run is that of this run."""

from __future__ import annotations

from pathlib import Path

from tests.zygote import Zygote


def test_a_run_may_get_the_number_of_one_that_has_ended(tmp_path):
    zygote = Zygote()
    most = int(Path("/proc/sys/kernel/pid_max").read_text())
    zygote._statuses.update(dict.fromkeys(range(1, most + 1), 7))
    run = zygote.start(["--no-such-flag"], tmp_path / "log")
    assert zygote.wait(run) == 2
