"""Trains adapters by peft and a plain loop: nothing of this project is imported.

stranger_lora.py JSON: base, data (prepared), order (blocks of each update), rank, alpha,
learning_rate, warmup, output (the adapters as peft names them).
"""

import json
import sys

import datasets
import torch
from peft import LoraConfig, get_peft_model, get_peft_model_state_dict
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM, get_scheduler

asked = json.loads(sys.argv[1])
model = AutoModelForCausalLM.from_pretrained(asked["base"], dtype=torch.float32)
torch.manual_seed(0)
model = get_peft_model(
    model,
    LoraConfig(
        r=asked["rank"],
        lora_alpha=asked["alpha"],
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    ),
).train()
trained = [p for p in model.parameters() if p.requires_grad]
optimizer = torch.optim.SGD(trained, lr=asked["learning_rate"], weight_decay=0.1)
schedule = get_scheduler("cosine", optimizer, asked["warmup"], len(asked["order"]))
blocks = datasets.load_from_disk(asked["data"] + "/train").with_format("numpy")["input_ids"][:]
blocks = torch.tensor(blocks.astype("int64"))
with open(asked["data"] + "/manifest.json") as file:
    end = json.load(file)["eos_token_id"]
stream = torch.cat([torch.tensor([end]), blocks.flatten()])
length = blocks.shape[1]
for numbers in asked["order"]:
    inputs = torch.stack([stream[n * length : (n + 1) * length] for n in numbers])
    logits = model(input_ids=inputs, use_cache=False).logits
    loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), blocks[numbers].flatten())
    loss.backward()
    torch.nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()
    schedule.step()
    optimizer.zero_grad()
save_file(get_peft_model_state_dict(model, save_embedding_layers=False), asked["output"])
