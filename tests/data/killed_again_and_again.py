"""Preparations that are killed: half of them by themselves, at a random one of the operations on
files (so that every kind of moment comes), half from outside, at a random time.

Its arguments are TEXTS FOLDER KILLS DEDUPLICATE (commas between texts); it prints how many were
killed, how many finished (in FOLDER/0, FOLDER/1, ...), and how many were killed after some pieces
were done.
"""

from __future__ import annotations

import os
import random
import signal
import sys
import time

from p2p_llm_forge.data.prepare import prepare
from tests.data.preparations import config, make_pieces_small

OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}


def kill_self_at(operation: int, folder: str) -> None:
    """Kill this process at its so manieth operation on a file in `folder`."""
    left = [operation]

    def count(event, arguments):
        if event in OPERATIONS and folder in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(count)


def work(text: str, folder: str, deduplicate: str, dies_at: int) -> None:
    """What a child does."""
    sys.stdout = open(os.devnull, "w")  # noqa: SIM115
    try:
        if dies_at:
            kill_self_at(dies_at, folder)
        asked = {"num_workers": 2, "deduplicate": deduplicate, "dataset_path": text.split(",")}
        prepare(config(text, folder, **asked))
        os._exit(0)
    except BaseException as error:
        print("failed:", repr(error), file=sys.stderr, flush=True)
        os._exit(1)


def main() -> None:
    """Kill so many preparations."""
    text, folder, kills, deduplicate = sys.argv[1], sys.argv[2], int(sys.argv[3]), sys.argv[4]
    make_pieces_small()
    chosen = random.Random(7)
    killed = finished = after_some_pieces = 0
    while killed < kills or not finished:
        # More than it takes to finish what was killed late: some always come to the end.
        dies_at = chosen.randint(1, 400) if killed % 2 else 0
        child = os.fork()
        if child == 0:
            work(text, f"{folder}/{finished}", deduplicate, dies_at)
        if not dies_at:
            time.sleep(chosen.uniform(0.02, 0.25))
            os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        pieces = f"{folder}/{finished}/unfinished/pieces"
        if os.WIFSIGNALED(status):
            killed += 1
            after_some_pieces += os.path.isdir(pieces) and len(os.listdir(pieces)) > 0
        elif os.WEXITSTATUS(status) != 0:
            sys.exit(1)
        else:
            finished += 1
        if killed > kills + 40:
            sys.exit("it never finishes")
    print(killed, finished, after_some_pieces)
