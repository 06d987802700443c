"""A tokenizer written in Python, in a process of its own: threads of one process would take turns.

The child is a new process, not a fork, and talks in Arrow streams: documents go in, lists of
tokens come out. When its parent is gone, however that ended, its input ends and so does it.
"""

from __future__ import annotations

import contextlib
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any, BinaryIO

import numpy as np
import pyarrow as pa

from p2p_llm_forge.errors import ForgeError, run_script

if TYPE_CHECKING:
    from collections.abc import Iterator


class TokenizerProcess:
    """One child with one tokenizer. loaded_from: the arguments of `load_tokenizer`."""

    def __init__(self, loaded_from: dict[str, Any]) -> None:
        root = str(Path(__file__).resolve().parents[2])
        paths = [root, *filter(None, [os.environ.get("PYTHONPATH")])]
        self._name = loaded_from["name"]
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(loaded_from)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(paths)},
            start_new_session=True,  # an interrupt from the keyboard is its parent's to handle
        )
        self._questions: Any = None
        self._answers: Any = None

    def encode(self, documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and lengths, as every encoder; for one thread. Raises ForgeError."""
        batch = pa.record_batch([documents], ["documents"])
        try:
            if self._questions is None:
                self._questions = pa.ipc.new_stream(self._child.stdin, batch.schema)
            self._questions.write_batch(batch)
            self._child.stdin.flush()  # type: ignore[union-attr]
            if self._answers is None:
                self._answers = pa.ipc.open_stream(self._child.stdout)
            answer, notes = self._answers.read_next_batch_with_custom_metadata()
        except (OSError, ValueError, StopIteration, pa.ArrowException) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
            raise ForgeError(
                f"--tokenizer {self._name}: its process ended early (status "
                f"{self._child.returncode}; -9 is often a lack of memory)",
                "run the same command again, perhaps with fewer --num-workers; what is tokenized "
                "so far is kept",
            ) from error
        if notes:
            raise ForgeError(notes["found"].decode(), notes["fix"].decode())
        column = answer.column(0)
        return column.flatten().to_numpy(), np.diff(column.offsets.to_numpy())

    def close(self) -> None:
        """End the child, whatever it is doing. Any thread may call this."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):  # what was not sent yet
                pipe.close()  # type: ignore[union-attr]


def serve(loaded_from: dict[str, Any], questions: BinaryIO, answers: BinaryIO) -> None:
    """Answer until the questions end."""
    from p2p_llm_forge.data.tokenizer import load_tokenizer, reference_encoder

    encode = reference_encoder(load_tokenizer(**loaded_from))
    schema = pa.schema([("tokens", pa.large_list(pa.uint32()))])
    stream = pa.ipc.new_stream(answers, schema)
    for batch in _asked(questions):
        tokens, lengths, notes = np.empty(0, np.uint32), np.empty(0, np.int64), None
        try:
            tokens, lengths = encode(batch.column(0))
        except ForgeError as error:
            [problem] = error.problems
            notes = {"found": problem.found, "fix": problem.fix}
        column = pa.LargeListArray.from_arrays(np.append(0, np.cumsum(lengths)), tokens)
        stream.write_batch(pa.record_batch([column], schema=schema), custom_metadata=notes)
        answers.flush()


def _asked(questions: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Batches until their stream ends, or is cut off because the parent was killed."""
    try:
        yield from pa.ipc.open_stream(questions)
    except (pa.ArrowInvalid, OSError):
        if questions.read(1):  # not cut off, but wrong
            raise


def main() -> None:
    """Serve on standard input and output."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a tokenizer prints must not come among the answers
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        serve(json.loads(sys.argv[1]), sys.stdin.buffer, answers)


if __name__ == "__main__":
    run_script(main)
