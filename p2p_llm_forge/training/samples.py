"""Samples of text: how the model continues the same prompts, by the same seed, while it learns."""

from __future__ import annotations

import contextlib
import json
from typing import Any

import torch
from transformers import AutoTokenizer

from p2p_llm_forge.files import write_file
from p2p_llm_forge.model.chat import STORY, ends_of_answers, tokens_of_conversation
from p2p_llm_forge.model.compiling import uncompiled
from p2p_llm_forge.model.fit import TextSpec, in_evaluation
from p2p_llm_forge.sync.base import Sync
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.learner import text_spec_of
from p2p_llm_forge.training.run_folder import RunFolder
from p2p_llm_forge.training.run_record import SAMPLES
from p2p_llm_forge.training.tracking import Silent, lines_until

NEW_TOKENS, TOP_K, TEMPERATURE = 60, 40, 0.8


class Samples:
    """Lets the model continue every prompt, on the main process: shown, and kept in samples.jsonl.

    What fails, costs the samples and never the run.
    """

    def __init__(self, job: Job, folder: RunFolder, lm: Any, sync: Sync, tracking: Silent) -> None:
        self._folder, self._lm, self._sync, self._tracking = folder, lm, sync, tracking
        self._prompts, self._seed = job.config.prompts(), job.config.seed
        self._text = text_spec_of(job.data)
        self._step, self._texts = -1, list[str]()  # the last ones
        self._is_broken = False

    def start(self, first_step: int) -> None:
        """Drop the samples after `first_step`: they come again."""
        with contextlib.suppress(OSError):
            self._write(first_step, [])

    def take(self, step: int) -> list[str]:
        """The samples after `step` updates, of each prompt; made once, and empty if that fails."""
        if self._step == step or self._is_broken:
            return self._texts
        try:
            with self._sync.agreed_weights():
                self._texts = [
                    sample_text(self._lm, self._text, prompt, self._seed)
                    for prompt in self._prompts
                ]
            self._step = step
        except Exception as error:  # generate fails in many ways, and is not what the run is for
            self._is_broken, self._texts = True, []
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            self._tracking.say(
                f"warning: no sample of text ({type(error).__name__}: {reason}); figures and model"
                " are written"
            )
        self._show(step)
        return self._texts

    def _show(self, step: int) -> None:
        pairs = list(zip(self._prompts, self._texts, strict=False))
        for _, text in pairs:
            self._tracking.say(f"sample    {text!r}")
        self._tracking.texts(step, {f"samples/{n}": text for n, (_, text) in enumerate(pairs, 1)})
        settings = {"seed": self._seed, "temperature": TEMPERATURE, "top_k": TOP_K}
        new = [{"step": step, "prompt": prompt, "text": text, **settings} for prompt, text in pairs]
        try:
            self._write(step - 1, new)
        except OSError as error:
            self._tracking.say(f"warning: {SAMPLES} could not be written ({error.strerror})")

    def _write(self, kept_until: int, new: list[dict[str, Any]]) -> None:
        """Replace samples.jsonl by its lines up to a step, and new ones. Raises OSError."""
        path = self._folder.path / SAMPLES
        if not self._folder.may_write(SAMPLES) or not (new or path.exists()):
            return
        lines = [json.dumps(one, ensure_ascii=False) + "\n" for one in new]
        write_file(path, "".join([*lines_until(path, kept_until), *lines]))


def sample_text(
    lm: Any, text: TextSpec, prompt: str, seed: int, new_tokens: int = NEW_TOKENS
) -> str:
    """The prompt (or the start of a document) and how the model continues it, drawn by `seed`.

    Of a prompt that is longer than half a block, the model sees only the end. Where it learns from
    conversations, the prompt is what a user says, and the sample is the answer alone.
    """
    tokenizer, ends = AutoTokenizer.from_pretrained(text.tokenizer_dir), [text.eos_token_id]
    if text.is_chat:
        asked = [{"role": "user", "content": prompt or STORY}]
        tokens = tokens_of_conversation(tokenizer, asked, "the data's tokenizer")
        ends = ends_of_answers(tokenizer, ends)
    else:
        tokens = [text.eos_token_id, *tokenizer.encode(prompt, add_special_tokens=False)]
    tokens = tokens[-(text.sequence_length // 2) :]
    inputs = torch.tensor([tokens], device=lm.device)
    torch.manual_seed(seed)
    # Every length would be compiled again for a few tokens.
    with in_evaluation(lm), uncompiled():
        drawn = lm.generate(
            inputs,
            attention_mask=torch.ones_like(inputs),
            max_new_tokens=min(new_tokens, text.sequence_length - len(tokens)),
            do_sample=True,
            top_k=TOP_K,
            temperature=TEMPERATURE,
            use_cache=True,
            eos_token_id=ends,
            pad_token_id=text.eos_token_id,
        )
    shown = drawn[0, len(tokens) if text.is_chat else 0 :]
    return str(tokenizer.decode(shown, skip_special_tokens=True))
