"""Logits of a model with adapters, by peft alone: nothing of this project is imported.

stranger_peft.py BASE ADAPTERS OUTPUT: logits of the base, of PeftModel, of it merged.
"""

import sys

import torch
from peft import PeftModel
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, adapters, output = sys.argv[1:]
tokens = torch.arange(32).unsqueeze(0)
with torch.no_grad():
    model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32).eval()
    logits = {"base": model(input_ids=tokens).logits}
    model = PeftModel.from_pretrained(model, adapters).eval()
    logits["adapted"] = model(input_ids=tokens).logits
    logits["merged"] = model.merge_and_unload()(input_ids=tokens).logits
    alone = AutoModelForCausalLM.from_pretrained(adapters).eval()
    logits["by_transformers"] = alone(input_ids=tokens).logits
save_file(logits, output)
