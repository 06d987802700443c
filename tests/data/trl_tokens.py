"""What TRL makes of conversations: a stranger's script, without a line of this project.

python -m tests.data.trl_tokens TASKS OUT: a JSON list of {"rows", "tokenizer", and arguments of
SFTConfig}; writes for each the tokens and labels of TRL's collator, row by row, without padding.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from datasets import Dataset
from transformers import AutoTokenizer, GPT2Config, GPT2LMHeadModel
from trl import SFTConfig, SFTTrainer


def tokens_and_labels(rows, tokenizer, **options):
    """By the trainer's own preparation and collator."""
    words = AutoTokenizer.from_pretrained(tokenizer)
    sizes = GPT2Config(n_layer=1, n_head=1, n_embd=8, vocab_size=len(words), n_positions=16)
    with tempfile.TemporaryDirectory() as folder:
        arguments = SFTConfig(
            output_dir=folder, max_length=None, report_to="none", use_cpu=True, bf16=False,
            shuffle_dataset=False, **options,
        )  # fmt: skip
        trainer = SFTTrainer(
            GPT2LMHeadModel(sizes), arguments,
            train_dataset=Dataset.from_list(rows), processing_class=words,
        )  # fmt: skip
    found = []
    for row in trainer.train_dataset:
        batch = trainer.data_collator([row])
        size = len(row["input_ids"])
        found.append((batch["input_ids"][0][:size].tolist(), batch["labels"][0][:size].tolist()))
    return found


if __name__ == "__main__":
    tasks = json.loads(Path(sys.argv[1]).read_text("utf-8"))
    Path(sys.argv[2]).write_text(json.dumps([tokens_and_labels(**task) for task in tasks]))
