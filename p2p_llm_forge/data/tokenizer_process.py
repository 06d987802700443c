"""A tokenizer written in Python, in a process of its own: threads of one process would take turns.

The child is a new process, not a fork, and talks in Arrow streams: documents go in, lists of
tokens come out. When its parent is gone, however that ended, its input ends and so does it.
"""

from __future__ import annotations

import contextlib
import functools
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa

from p2p_llm_forge.data.tokenizer import load_tokenizer, reference_encoder
from p2p_llm_forge.errors import ForgeError, run_script

QUESTION = pa.schema([("documents", pa.large_binary())])
ANSWER = pa.schema([("tokens", pa.large_list(pa.uint32()))])


class TokenizerProcess:
    """One child with one tokenizer. loaded_from: the arguments of `load_tokenizer`."""

    def __init__(self, loaded_from: dict[str, Any]) -> None:
        self._name = loaded_from["name"]
        self._child = subprocess.Popen(
            [sys.executable, "-m", __name__, json.dumps(loaded_from)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            env=os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)},
            start_new_session=True,  # an interrupt from the keyboard is its parent's to handle
        )
        self._questions = pa.ipc.new_stream(self._child.stdin, QUESTION)

    @functools.cached_property
    def _answers(self) -> Any:
        return pa.ipc.open_stream(self._child.stdout)  # waits for the first answer

    def encode(self, documents: pa.LargeBinaryArray) -> tuple[np.ndarray, np.ndarray]:
        """Tokens and lengths, as every encoder; for one thread. Raises ForgeError."""
        try:
            self._questions.write_batch(pa.record_batch([documents], schema=QUESTION))
            self._child.stdin.flush()  # type: ignore[union-attr]
            answer = self._answers.read_next_batch()
        except (OSError, ValueError, StopIteration, pa.ArrowException) as error:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._child.wait(5)
            raise ForgeError(
                f"--tokenizer {self._name}: its process ended early (status "
                f"{self._child.returncode}; -9 is often a lack of memory)",
                "run the same command again, perhaps with fewer --num-workers; what is tokenized "
                "so far is kept",
            ) from error
        column = answer.column(0)
        lengths = np.diff(column.offsets.to_numpy())
        return column.flatten().to_numpy(), np.where(column.is_valid(), lengths, -1)

    def close(self) -> None:
        """End the child, whatever it is doing. Any thread may call this."""
        self._child.kill()
        self._child.wait()
        for pipe in (self._child.stdin, self._child.stdout):
            with contextlib.suppress(OSError):  # what was not sent yet
                pipe.close()  # type: ignore[union-attr]


def _asked(questions: BinaryIO) -> Iterator[pa.RecordBatch]:
    """Batches until their stream ends, or is cut off because the parent was killed."""
    try:
        yield from pa.ipc.open_stream(questions)
    except (pa.ArrowInvalid, OSError):
        if questions.read(1):  # not cut off, but wrong
            raise


def main() -> None:
    """Answer on standard output until the questions on standard input end."""
    answers = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)  # what a tokenizer prints must not come among the answers
    encode = reference_encoder(load_tokenizer(**json.loads(sys.argv[1])))
    stream = pa.ipc.new_stream(answers, ANSWER)
    for batch in _asked(sys.stdin.buffer):
        tokens, lengths = encode(batch.column(0))
        offsets, failed = np.append(0, np.cumsum(lengths.clip(0))), pa.array(lengths < 0)
        column = pa.LargeListArray.from_arrays(offsets, tokens, mask=failed)
        stream.write_batch(pa.record_batch([column], schema=ANSWER))
        answers.flush()


if __name__ == "__main__":
    with contextlib.suppress(BrokenPipeError):  # the parent is gone
        run_script(main)
