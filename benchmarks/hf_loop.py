"""The loop of Hugging Face's run_clm_no_trainer.py, for comparisons: blocks in, seconds out.

    python -m benchmarks.hf_loop --data PREPARED --model-type gpt2 --micro-batch-size 8 --json OUT

Written after examples/pytorch/language-modeling/run_clm_no_trainer.py of transformers, with what
that script does in its loop and as it does it: `datasets` rows through a DataLoader with the
default collator, labels that the model shifts itself, the model's own loss over all logits, AdamW
as torch builds it, its groups of decay, a prepared scheduler, `accelerator.accumulate`. It imports
nothing of this project. Afterwards it writes how long its segments of updates took, each timed
alone with the device waited for, and the peak of memory.
"""

from __future__ import annotations

import argparse
import json
import resource
import time
from pathlib import Path
from typing import Any


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="a prepared dataset")
    parser.add_argument("--model-type", default="gpt2")
    parser.add_argument("--config-overrides", default="", metavar="KEY=VALUE,...")
    parser.add_argument("--micro-batch-size", type=int, default=8)
    parser.add_argument("--gradient-accumulation-steps", type=int, default=1)
    parser.add_argument("--warm-up", type=int, default=3, help="updates before the first segment")
    parser.add_argument("--updates", type=int, default=5, help="updates of a segment")
    parser.add_argument("--segments", type=int, default=3)
    parser.add_argument("--mixed-precision", default="no", choices=("no", "bf16", "fp16"))
    parser.add_argument("--compile", nargs="?", const="inductor", metavar="BACKEND")
    parser.add_argument("--cpu", action="store_true")
    parser.add_argument("--threads", type=int, help="of the CPU")
    parser.add_argument("--learning-rate", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path, help="file for the figures")
    return parser.parse_args()


def build_model(asked: argparse.Namespace, vocab_size: int, length: int) -> Any:
    """The model from scratch, with the sizes that were asked for."""
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM

    config = CONFIG_MAPPING[asked.model_type]()
    # As the text and its length decide them for a model of train.py.
    config.update({"vocab_size": vocab_size, "bos_token_id": 0, "eos_token_id": 0})
    name = "n_positions" if hasattr(config, "n_positions") else "max_position_embeddings"
    config.update({name: length})
    if asked.config_overrides:
        config.update_from_string(asked.config_overrides)
    return AutoModelForCausalLM.from_config(config).float()


def groups_of(model: Any, weight_decay: float) -> list[dict[str, Any]]:
    """The script's two groups: vectors are not decayed."""
    no_decay = ["bias", "layer_norm.weight"]
    named = list(model.named_parameters())
    return [
        {
            "params": [p for n, p in named if not any(nd in n for nd in no_decay)],
            "weight_decay": weight_decay,
        },
        {"params": [p for n, p in named if any(nd in n for nd in no_decay)], "weight_decay": 0.0},
    ]


def train(asked: argparse.Namespace) -> dict[str, Any]:
    """Take the updates; returns seconds of each segment, tokens of an update and peak memory."""
    import datasets
    import torch
    from accelerate import Accelerator
    from accelerate.utils import set_seed
    from torch.utils.data import DataLoader
    from transformers import default_data_collator, get_scheduler

    if asked.threads:
        torch.set_num_threads(asked.threads)
    accelerator = Accelerator(
        gradient_accumulation_steps=asked.gradient_accumulation_steps,
        mixed_precision=asked.mixed_precision,
        cpu=asked.cpu,
        dynamo_backend=asked.compile,
    )
    set_seed(asked.seed)
    rows = datasets.load_from_disk(str(asked.data / "train"))
    rows = rows.map(lambda row: {"labels": row["input_ids"]}, keep_in_memory=True)
    vocab_size = json.loads((asked.data / "manifest.json").read_text())["vocab_size"]
    length = len(rows[0]["input_ids"])
    model = build_model(asked, vocab_size, length)
    loader = DataLoader(
        rows, shuffle=True, collate_fn=default_data_collator, batch_size=asked.micro_batch_size
    )
    groups = groups_of(model, asked.weight_decay)
    optimizer = torch.optim.AdamW(groups, lr=asked.learning_rate)
    total = asked.warm_up + asked.segments * asked.updates
    scheduler = get_scheduler("linear", optimizer, num_warmup_steps=0, num_training_steps=total)
    model, optimizer, loader, scheduler = accelerator.prepare(model, optimizer, loader, scheduler)

    on_gpu = accelerator.device.type == "cuda"
    marks, losses, done = [], [], 0
    model.train()
    while done < total:
        for batch in loader:
            with accelerator.accumulate(model):
                outputs = model(**batch)
                loss = outputs.loss
                losses.append(loss.detach().float())  # the script sums them up, for its trackers
                accelerator.backward(loss)
                optimizer.step()
                scheduler.step()
                optimizer.zero_grad()
            if not accelerator.sync_gradients:
                continue
            done += 1
            if done >= asked.warm_up and (done - asked.warm_up) % asked.updates == 0:
                if on_gpu:
                    torch.cuda.synchronize()
                marks.append(time.perf_counter())
            if done == total:
                break
    peak = torch.cuda.max_memory_allocated() if on_gpu else peak_rss()
    blocks = asked.micro_batch_size * asked.gradient_accumulation_steps
    return {
        "segments_s": [end - start for start, end in zip(marks, marks[1:], strict=False)],
        "updates": asked.updates,
        "tokens_per_update": blocks * length,
        "parameters": sum(p.numel() for p in model.parameters()),
        "first_loss": float(losses[0]),
        "last_loss": float(losses[-1]),
        "peak_bytes": peak,
        "device": accelerator.device.type,
    }


def peak_rss() -> int:
    """The most memory that this process has held, in bytes."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024


def main() -> None:
    asked = parse()
    figures = train(asked)
    if asked.json:
        asked.json.write_text(json.dumps(figures, indent=1) + "\n")
    print(json.dumps(figures))


if __name__ == "__main__":
    main()
