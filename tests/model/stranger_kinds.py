"""Adapters of several kinds beside a base, by peft alone: nothing of this project is imported.

stranger_kinds.py BASE OUTPUT: a folder for each kind, and in logits.safetensors what peft computes.
"""

import sys
from pathlib import Path

import peft
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

base, output = sys.argv[1:]
LAYERS = ["q_proj", "down_proj"]
LM = {"task_type": "CAUSAL_LM"}
KINDS = {
    "dora": peft.LoraConfig(r=2, target_modules=LAYERS, use_dora=True, **LM),
    "head": peft.LoraConfig(r=2, target_modules=LAYERS, modules_to_save=["lm_head"], **LM),
    "loha": peft.LoHaConfig(r=2, target_modules=LAYERS, **LM),
    "ia3": peft.IA3Config(target_modules=LAYERS, feedforward_modules=["down_proj"], **LM),
    "prompt": peft.PromptTuningConfig(num_virtual_tokens=2, **LM),
}
tokens, logits = torch.arange(32).unsqueeze(0), {}
for kind, settings in KINDS.items():
    torch.manual_seed(1)
    lm = AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
    model = peft.get_peft_model(lm, settings).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn_like(parameter)
        logits[kind] = model(input_ids=tokens).logits
    model.save_pretrained(Path(output) / kind)
save_file(logits, Path(output) / "logits.safetensors")
