"""The model card: a README.md with the metadata that the Hub reads, and what a person asks first.

It goes to strangers: it names no folder, host or user of this machine.
"""

from __future__ import annotations

import math
import platform
import re
import shlex
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import torch
import yaml

from p2p_llm_forge.config import TrainConfig, as_dict
from p2p_llm_forge.config.lora import LoraOptions
from p2p_llm_forge.config.sharing import hub_name
from p2p_llm_forge.config.train import ModelOptions, SyncOptions, UpdateOptions
from p2p_llm_forge.data.dataset import SplitFacts
from p2p_llm_forge.errors import counted, in_one_line, plain
from p2p_llm_forge.limits import cores
from p2p_llm_forge.model.chat import STORY
from p2p_llm_forge.model.lora import lora_in_words, settings_of
from p2p_llm_forge.peers.cluster import Cluster
from p2p_llm_forge.peers.machine import versions
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.numbers import duration
from p2p_llm_forge.training.results import TrainResult

PICTURES = ("loss.png", "peers.png")
# Figures that model-index has, with the names that people know them by.
EVALUATED = {
    "perplexity": "perplexity of a token",
    "bits_per_byte": "bits per byte of text",
    "token_accuracy": "tokens guessed right",
    "eval_loss": "nats per token",
}
METRICS_OF_HUB = {"token_accuracy": "accuracy", "eval_loss": "loss"}  # the others as they are
LONGEST_TITLE = 96

Table = Mapping[str, Any]


@dataclass(frozen=True)
class CardFacts:
    """What a card says beside the figures. Tables are read in order; None leaves a row out."""

    base_model: str | None  # on the Hub
    model: Table
    data: Table
    training: Table
    recipe: Table = field(default_factory=dict)  # what --config takes
    prompt: str = ""
    new_tokens: int = 60  # that the model is asked for: it may know no more positions
    is_adapter: bool = False  # what is published belongs to its base, and needs it
    is_chat: bool = False  # it has learnt from conversations


# --- gathering ------------------------------------------------------------------------------------


def machines_of(cluster: Cluster) -> str:
    """How many machines of which kind take part, without their names. All ranks must call."""
    own = {"host": platform.node(), "kind": _kind(cluster.device), "cores": cores()}
    facts = cluster.gather_facts(own)
    hosts = {str(fact["host"]): fact for fact in facts}
    kinds = Counter(
        f"{in_one_line(fact['kind'])} ({counted(int(fact['cores']), 'core')})"
        for fact in hosts.values()
    )
    named = ", ".join(f"{count} x {kind}" for kind, count in sorted(kinds.items()))
    processes = "1 process" if len(facts) == 1 else f"{len(facts):,} processes"
    return f"{counted(len(hosts), 'machine')}, {processes}: {named}"


def _kind(device: torch.device) -> str:
    """What computes on this machine."""
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    try:
        named = re.search(r"^model name\s*: (.+)$", Path("/proc/cpuinfo").read_text(), re.MULTILINE)
    except OSError:
        named = None
    return named[1] if named else platform.processor() or platform.machine() or device.type


def facts_of(job: Job, lm: Any, machines: str, is_resumed: bool = False) -> CardFacts:
    """What a card says of a run. lm: the causal LM, a model of transformers."""
    config, manifest = job.config, job.data.manifest
    base, architecture = hub_name(config.model_name), lm.config.get_text_config()
    splits = {f"{name} text": _split_in_words(split) for name, split in manifest.splits.items()}
    return CardFacts(
        base_model=base,
        model={
            "family": lm.config.model_type,
            "parameters": f"{sum(one.numel() for one in lm.parameters()):,}",
            "layers": getattr(architecture, "num_hidden_layers", None),
            "width": getattr(architecture, "hidden_size", None),
            "attention heads": getattr(architecture, "num_attention_heads", None),
            "vocabulary": f"{manifest.vocab_size:,}",
            "tokens in a block": f"{manifest.sequence_length:,}",
            "LoRA": lora_in_words(lm) if settings_of(lm) else None,
            "began from": base or ("a model in a folder" if config.model_name else "scratch"),
        },
        data={
            "name": ", ".join(source.name for source in manifest.sources),
            **splits,
            "fingerprint": manifest.fingerprint,
            "tokenizer's fingerprint": manifest.tokenizer_fingerprint,
        },
        training={
            "machines": machines,
            "session": "the last of several: seconds and speed are its own" if is_resumed else None,
            **versions(),
            "Python": platform.python_version(),
        },
        recipe=recipe_of(config, base) | {"batch_size": job.plan.batch_size},
        prompt=config.prompts()[0],
        new_tokens=min(60, manifest.sequence_length // 2),
        is_adapter=bool(config.lora_rank) and not config.merge_lora,
        is_chat=bool(manifest.conversations),
    )


def _split_in_words(split: SplitFacts) -> str:
    counts = f"{split.documents:,} documents, {split.tokens:,} tokens"
    if split.trained_tokens is None:
        return f"{split.bytes:,} bytes, {counts}"
    counts = counts.replace("documents", "conversations")
    learnt = f"{split.trained_tokens:,} ({split.bytes:,} bytes of text)"
    return f"{counts}, of which {learnt} count in losses and bits per byte"


def recipe_of(config: TrainConfig, base_model: str | None) -> dict[str, Any]:
    """The settings that decide what is computed, as `--config` reads them, without the usual."""
    groups = (ModelOptions, LoraOptions, UpdateOptions, SyncOptions)
    given, usual = as_dict(config), as_dict(TrainConfig())
    recipe = {"model_name": base_model} if base_model else {}
    for group in groups:
        for one in fields(group):
            if one.name not in group.PER_RANK and given[one.name] != usual[one.name]:
                recipe[one.name] = given[one.name]
    return recipe


# --- writing --------------------------------------------------------------------------------------


def model_card(result: TrainResult, facts: CardFacts, pictures: Iterable[str] = ()) -> str:
    """The card. pictures: names of files beside it."""
    name = title_of(result.output_dir)
    figures = {
        key: f"{value:.4f}" if isinstance(value, float) else f"{value:,}"
        for key, value in vars(result).items()
        if isinstance(value, int | float) and not isinstance(value, bool)
    }
    if result.seconds is not None:
        figures["seconds"] += f" ({duration(result.seconds)})"
    shown = "".join(f"![{one.split('.')[0]}]({one})\n\n" for one in pictures)
    recipe = yaml.safe_dump(dict(facts.recipe), sort_keys=False, allow_unicode=True)
    parts = [
        f"---\n{_metadata(name, result, facts)}---\n\n# {_cell(name)}\n\n"
        "A causal language model that was trained data-parallel by P2P-LLM-Forge.\n\n",
        shown,
        _use(facts),
        f"## Results\n\n{_table(figures)}",
        f"A sample:\n\n{_fenced(plain(result.sample))}" if result.sample else "",
        f"## Model\n\n{_table(facts.model)}",
        f"## Data\n\n{_table(facts.data)}",
        f"## Training\n\n{_table(facts.training)}",
        "The recipe, as a file for `--config`:\n\n" + _fenced(recipe, "yaml"),
    ]
    return "".join(parts).rstrip("\n") + "\n"


def title_of(output_dir: str) -> str:
    """What a model is called: the last part of its folder's path."""
    return in_one_line(Path(output_dir).resolve().name, LONGEST_TITLE) or "model"


def _metadata(name: str, result: TrainResult, facts: CardFacts) -> str:
    """The YAML that the Hub reads. Source: github.com/huggingface/hub-docs, modelcard.md."""
    metadata: dict[str, Any] = {
        "library_name": "peft" if facts.is_adapter else "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["p2p-llm-forge"],
    }
    if facts.base_model:
        relation = "adapter" if facts.is_adapter else "finetune"
        metadata |= {"base_model": facts.base_model, "base_model_relation": relation}
    drawn, of = result.eval_blocks, result.eval_split_blocks
    sampled = f", of {drawn:,} blocks drawn out of {of:,}" if drawn and of and drawn < of else ""
    metrics = [
        {"type": METRICS_OF_HUB.get(key, key), "name": words + sampled, "value": value}
        for key, words in EVALUATED.items()
        if (value := getattr(result, key)) is not None and math.isfinite(value)
    ]
    if metrics:
        data = in_one_line(facts.data.get("name") or "text", LONGEST_TITLE)
        # The Hub links `type` to a data set of its own; a text of this machine is none of them.
        of_split: dict[str, Any] = {"type": "text", "name": data, "split": "validation"}
        if fingerprint := facts.data.get("fingerprint"):
            of_split["args"] = {"fingerprint": fingerprint}
        task = {"type": "text-generation", "name": "Text Generation"}
        results = [{"task": task, "dataset": of_split, "metrics": metrics}]
        metadata["model-index"] = [{"name": name, "results": results}]
    return yaml.safe_dump(metadata, sort_keys=False, allow_unicode=True)


def _use(facts: CardFacts) -> str:
    """How the model is loaded, asked and trained on."""
    usual = STORY if facts.is_chat else "The"
    prompt = in_one_line(facts.prompt) or usual
    ask = f'inputs = tokenizer({prompt!r}, return_tensors="pt")\n'
    if facts.is_chat:
        ask = (
            f'asked = [{{"role": "user", "content": {prompt!r}}}]\n'
            "inputs = tokenizer.apply_chat_template(asked, add_generation_prompt=True,"
            ' return_dict=True, return_tensors="pt")\n'
        )
    needs = (
        "These are adapters (LoRA): peft must be installed, and their base is loaded with them;"
        " `base_model_name_or_path` in adapter_config.json says where it lies.\n\n"
    )
    return (
        f"## Use\n\n{needs * facts.is_adapter}"
        "```python\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n\n"
        'folder = "."  # where this file lies, or the name of this model on the Hub\n'
        "model = AutoModelForCausalLM.from_pretrained(folder)\n"
        "tokenizer = AutoTokenizer.from_pretrained(folder)\n"
        f"{ask}"
        f"written = model.generate(**inputs, max_new_tokens={facts.new_tokens}, do_sample=True)\n"
        "print(tokenizer.decode(written[0], skip_special_tokens=True))\n```\n\n"
        "In a clone of P2P-LLM-Forge, where `MODEL` is this folder or that name, `generate.py`"
        " writes as you watch, and `train.py` continues with your text:\n\n"
        f"```bash\npython generate.py MODEL --prompt {shlex.quote(usual)}\n"
        "python train.py --model-name MODEL --dataset-path my_text.txt --output-dir"
        " artifacts/next\n```\n\n"
    )


def _table(rows: Table) -> str:
    known = {key: value for key, value in rows.items() if value is not None}
    lines = [f"| {_cell(key)} | {_cell(value)} |\n" for key, value in known.items()]
    return "".join(["| | |\n|---|---|\n", *lines, "\n"])


def _cell(value: object) -> str:
    """A text of somebody else, such as the name of a file, that ends no cell and is no markup."""
    return re.sub(r"([\\|`*<>\[\]])", r"\\\1", in_one_line(value, 300))


def _fenced(text: str, language: str = "text") -> str:
    """A block that nothing in the text can end."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text.rstrip()}\n{fence}\n\n"
