"""The workers of one machine in one round of an elastic launch."""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from typing import Any

from p2p_llm_forge.errors import QUIET
from p2p_llm_forge.peers.elastic_rounds import TO_EXPLAIN_S

Start = dict[str, Any]  # as `Rounds` sends it


def environ_of(start: Start, processes: int, local_rank: int) -> dict[str, str]:
    """What torch, Accelerate and train.py read, as torchrun names it, for one worker."""
    most = start.get("most_processes")
    known = {"P2P_LLM_FORGE_MOST_PROCESSES": str(most)} if most else {}
    return {
        **known,
        "RANK": str(start["first_rank"] + local_rank),
        "WORLD_SIZE": str(start["world_size"]),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(processes),
        "GROUP_RANK": str(start["machine"]),
        "MASTER_ADDR": str(start["main_address"]),
        "MASTER_PORT": str(start["main_port"]),
        "TORCHELASTIC_RUN_ID": str(start["token"]),
        "TORCHELASTIC_RESTART_COUNT": str(start["round"] - 1),
        "TORCHELASTIC_MAX_RESTARTS": "1",  # not 0: the workers are started again
        "TORCHELASTIC_USE_AGENT_STORE": "False",
        "P2P_LLM_FORGE_LAUNCHER": str(os.getpid()),
    }


class Workers:
    """Processes of this machine that run a Python script, each in a session of its own.

    So Ctrl-C in the terminal reaches them once, from the launcher. Make them with `start`.
    """

    def __init__(self, running: list[asyncio.subprocess.Process]) -> None:
        self._running = running
        self._is_asked = False

    @classmethod
    async def start(cls, script: list[str], processes: int, start: Start) -> Workers:
        """Start a script and its arguments in so many processes."""
        return cls(
            [
                await asyncio.create_subprocess_exec(
                    sys.executable,
                    *script,
                    env={**QUIET, **os.environ, **environ_of(start, processes, local_rank)},
                    stdin=asyncio.subprocess.DEVNULL,
                    start_new_session=True,
                )
                for local_rank in range(processes)
            ]
        )

    async def ended(self) -> int:
        """The status of the first that failed, or 0, once all have ended.

        When one fails, the others get a few seconds to say why they end too.
        """
        waiting = {asyncio.ensure_future(process.wait()) for process in self._running}
        status = 0
        while waiting and not status:
            done, waiting = await asyncio.wait(waiting, return_when=asyncio.FIRST_COMPLETED)
            status = next((one.result() for one in done if one.result()), 0)
        if waiting:
            await asyncio.wait(waiting, timeout=TO_EXPLAIN_S)
            self.send_signal(signal.SIGKILL)
            await asyncio.wait(waiting)
        return status

    def send_signal(self, number: int) -> None:
        """Send a signal to those that still run; SIGKILL also to what they have started."""
        for process in self._running:
            if process.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    if number == signal.SIGKILL:
                        os.killpg(process.pid, number)
                    else:
                        process.send_signal(number)

    def ask_to_stop(self, number: int = signal.SIGTERM) -> None:
        """Ask all to save and stop, once: train.py ends at once when it is asked again."""
        if not self._is_asked:
            self._is_asked = True
            self.send_signal(number)

    async def stop(self, patience_s: float) -> None:
        """Ask all to stop, and end them when they take longer than `patience_s`."""
        self.ask_to_stop()
        waiting = [asyncio.ensure_future(process.wait()) for process in self._running]
        _, late = await asyncio.wait(waiting, timeout=patience_s)
        if late:
            self.send_signal(signal.SIGKILL)
            await asyncio.wait(late)
