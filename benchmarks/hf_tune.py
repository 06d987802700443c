"""LoRA by peft and Hugging Face's Trainer alone, for comparisons; imports nothing of this project.

    python benchmarks/hf_tune.py tune BASE SETTINGS.json ADAPTERS
    python benchmarks/hf_tune.py judge BASE SETTINGS.json ADAPTERS...

`tune` trains on the rows in SETTINGS in just their order and saves the adapters. `judge` prints, as
JSON, the mean loss of the base and with each folder of adapters, over the held-out rows, in nats
per token. A row is
the token before a block and the block's own tokens, so that the model's shifted labels predict all
tokens of the block.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch.utils.data import SequentialSampler
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments


class InOrder(Trainer):
    """Takes the rows as they stand."""

    def _get_train_sampler(self, *_: Any, **__: Any) -> SequentialSampler:
        return SequentialSampler(self.train_dataset)


def as_examples(rows: list[list[int]]) -> list[dict[str, torch.Tensor]]:
    """What Trainer's default collator takes."""
    tensors = [torch.tensor(row) for row in rows]
    return [{"input_ids": one, "labels": one} for one in tensors]


def tune(base: str, settings: dict[str, Any], adapters: str) -> None:
    """Train the adapters and save them."""
    torch.manual_seed(settings["seed"])
    lora = LoraConfig(
        task_type="CAUSAL_LM",
        r=settings["rank"],
        lora_alpha=settings["alpha"],
        target_modules=settings["targets"],
    )
    model = get_peft_model(AutoModelForCausalLM.from_pretrained(base, dtype="float32"), lora)
    arguments = TrainingArguments(
        output_dir=f"{adapters}-trainer",
        per_device_train_batch_size=settings["batch_size"],
        max_steps=settings["updates"],
        learning_rate=settings["rate"],
        warmup_steps=settings["warmup_steps"],
        lr_scheduler_type=settings["schedule"],
        adam_beta1=settings["betas"][0],
        adam_beta2=settings["betas"][1],
        weight_decay=settings["weight_decay"],
        max_grad_norm=settings["max_grad_norm"],
        seed=settings["seed"],
        use_cpu=True,
        save_strategy="no",
        report_to=[],
        disable_tqdm=True,
    )
    InOrder(model=model, args=arguments, train_dataset=as_examples(settings["rows"])).train()
    model.save_pretrained(adapters)


@torch.no_grad()
def judge(base: str, settings: dict[str, Any], adapters: str) -> float:
    """Nats per token of the held-out rows."""
    model: Any = AutoModelForCausalLM.from_pretrained(base, dtype="float32").eval()
    if adapters:
        model = PeftModel.from_pretrained(model, adapters).eval()
    rows, nats, tokens = torch.tensor(settings["held_out"]), 0.0, 0
    for batch in rows.split(32):
        logits = model(batch[:, :-1]).logits.double()
        losses = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch[:, 1:].flatten(), reduction="sum"
        )
        nats, tokens = nats + float(losses), tokens + batch[:, 1:].numel()
    return nats / tokens


def main() -> None:
    """The command line."""
    torch.set_num_threads(1)
    what, base, file, *folders = sys.argv[1:]
    settings = json.loads(Path(file).read_text())
    if what == "tune":
        tune(base, settings, folders[0])
    else:
        print(json.dumps([judge(base, settings, folder) for folder in ("", *folders)]))


if __name__ == "__main__":
    main()
