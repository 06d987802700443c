"""Logits of a saved model, by transformers alone: nothing of this project is imported."""

import sys

import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=False).eval()
with torch.no_grad():
    logits = model(input_ids=torch.arange(32).unsqueeze(0)).logits
save_file({"logits": logits}, sys.argv[2])
