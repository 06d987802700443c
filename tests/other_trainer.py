"""A program of somebody else: transformers' own trainer, which leaves its folder as it does."""

from __future__ import annotations

import sys

import torch
from transformers import GPT2Config, GPT2LMHeadModel, Trainer, TrainingArguments


def main(folder: str) -> None:
    """Train two steps, save after each, and leave figures, a model and logs."""
    sizes = {"n_layer": 1, "n_head": 1, "n_embd": 8, "n_positions": 8, "vocab_size": 16}
    model = GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0))
    arguments = TrainingArguments(
        output_dir=folder, max_steps=2, save_steps=1, logging_steps=1, report_to="tensorboard",
        per_device_train_batch_size=2, use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    block = torch.arange(8)
    blocks = [{"input_ids": block, "labels": block}] * 4
    trainer = Trainer(model, arguments, train_dataset=blocks)
    result = trainer.train()
    trainer.save_metrics("train", result.metrics)
    trainer.save_state()
    trainer.save_model()


if __name__ == "__main__":
    main(sys.argv[1])
