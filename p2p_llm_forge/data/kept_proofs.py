"""Outcomes of the fast path's proof, kept for the next run with the same tokenizer.

They lie in $XDG_CACHE_HOME/p2p-llm-forge/proofs, or else below ~/.cache. What cannot be read there
does not exist, and where nothing can be written the proof is made each time.
"""

from __future__ import annotations

import contextlib
import os
import platform
import unicodedata
from importlib.metadata import version
from pathlib import Path
from typing import Any

from p2p_llm_forge.data.tokenizer import control_tokens, tokenizer_fingerprint
from p2p_llm_forge.files import fingerprint, read_json, write_json

# What makes a proof besides the tokenizer: the code of this folder that it is written in.
SOURCES = ("fast_path.py", "fast_path_limits.py", "hard_texts.py", "tokenizer.py")


class KeptProof:
    """The outcome of the proof for one tokenizer, by these versions of all that it depends on."""

    def __init__(self, tokenizer: Any) -> None:
        folder = Path(__file__).parent
        self._of = fingerprint(
            [
                *(tokenizer_fingerprint(tokenizer), sorted(control_tokens(tokenizer))),
                *(version("gigatoken"), version("tokenizers"), unicodedata.unidata_version),
                *(platform.machine(), [(folder / name).read_text("utf-8") for name in SOURCES]),
            ]
        )

    def reason(self) -> str | None:
        """Why the fast path is not to be taken, empty if it may be; None: nothing is known."""
        with contextlib.suppress(OSError, ValueError, RuntimeError):
            kept = read_json(self._path(), {"of": str, "reason": str, "digest": str})
            if kept["of"] == self._of and kept["digest"] == self._digest(kept["reason"]):
                return str(kept["reason"])
        return None

    def keep(self, reason: str) -> None:
        """Keep it for later runs, where that is possible."""
        with contextlib.suppress(OSError, RuntimeError):
            path = self._path()
            path.parent.mkdir(parents=True, exist_ok=True)
            what = {"of": self._of, "reason": reason, "digest": self._digest(reason)}
            write_json(path, what, durable=False)

    def _digest(self, reason: str) -> str:
        return fingerprint([self._of, reason])

    def _path(self) -> Path:
        """Raises RuntimeError where nobody has a home."""
        folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
        if not folder.is_absolute():  # the specification: then it counts as not set
            folder = Path.home() / ".cache"
        return folder / "p2p-llm-forge" / "proofs" / f"{self._of}.json"
