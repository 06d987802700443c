"""A model that was trained before, with its tokenizer: loaded whole, or refused."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils import logging

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.fit import positions_of, require_all_weights
from p2p_llm_forge.model.lora import base_of, is_adapter_folder, merge, read_adapters, settings_of
from p2p_llm_forge.model.sizes import one_line

OF_FOLDER = "copy or download the whole model again: config.json, every file of weights, tokenizer"
OF_HUB = (
    "check the path, or the name and the connection to the Hub; without one, download the model on"
    " another machine and give its folder"
)


@dataclass(frozen=True)
class LanguageModel:
    """A causal language model that only reads and writes."""

    name: str
    lm: Any
    tokenizer: Any
    context: int | None  # tokens that it can read at once; None where its family sets no limit
    ends: list[int]  # tokens after which nothing follows


def load(name: str, device: torch.device, dtype: torch.dtype | str = "auto") -> LanguageModel:
    """The model `name`: a folder, or a name of the Hub. dtype: "auto" is that of the file.

    Adapters (LoRA) are loaded with their base, and in float32 become part of its weights. Raises
    ForgeError where it cannot be read, lacks weights, or has no tokenizer of its own.
    """
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    is_file = Path(name).is_file()
    if is_file or (is_path and not Path(name).is_dir()):
        found = f"{name}: no such folder"
        found = f"{name} is a file, and a model is a folder" if is_file else found
        fix = "give a folder that is there: what a run writes is in its --output-dir"
        raise ForgeError(found, fix)
    logging.disable_progress_bar()
    logging.set_verbosity_error()  # what it warns of is refused here
    fix = OF_FOLDER if Path(name).is_dir() else OF_HUB
    is_adapter = is_adapter_folder(Path(name))
    base = base_of(Path(name)) if is_adapter else name
    try:
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            base, dtype=dtype, output_loading_info=True
        )
        has_own = not is_adapter or (Path(name) / "tokenizer_config.json").exists()
        tokenizer: Any = AutoTokenizer.from_pretrained(name if has_own else base)
    except Exception as error:  # whatever transformers and safetensors raise for damaged files
        found = f"could not be loaded: {one_line(error)}"
        if not Path(name).is_dir():
            found = f"is no folder here, and from the Hub it {found}"
        raise ForgeError(f"{name} {found}", fix) from error
    lm, facts = loaded
    require_all_weights(lm, name, facts["missing_keys"])
    if is_adapter:
        lm = read_adapters(lm, Path(name))
    if settings_of(lm) and lm.dtype == torch.float32:
        merge(lm)  # coarser weights would lose what adapters add
    bad = next((key for key, one in lm.named_parameters() if not one.isfinite().all()), None)
    if bad is not None:
        raise ForgeError(f"{name} holds values in {bad} that are not finite", fix)
    words, rows = tokenizer.get_vocab(), lm.get_input_embeddings().num_embeddings
    if {*words} <= {*tokenizer.all_special_tokens}:  # what transformers 5.23 makes up for none
        raise ForgeError(f"{name} has no tokenizer beside it", fix)
    if max(words.values()) >= rows:
        raise ForgeError(
            f"{name} knows {rows} tokens, the tokenizer beside it has"
            f" {max(words.values()) + 1}: it belongs to another model",
            fix,
        )
    context = positions_of(lm.config)
    return LanguageModel(name, lm.to(device).eval(), tokenizer, context, _ends(lm, tokenizer))


def _ends(lm: Any, tokenizer: Any) -> list[int]:
    """What the model was published to stop at, else what ends the tokenizer's documents."""
    known = getattr(lm.generation_config, "eos_token_id", None)
    known = tokenizer.eos_token_id if known is None else known
    if isinstance(known, list):
        return known
    return [] if known is None else [known]
