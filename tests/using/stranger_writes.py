"""How transformers alone writes: knows nothing of this project. Its figures are JSON.

python stranger_writes.py MODEL '[{"prompt": "A", "new": 20, "sampling": {...}, "seed": 1}, ...]'
"""

import json
import sys

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

folder, cases = sys.argv[1], json.loads(sys.argv[2])
torch.set_num_threads(1)
model = AutoModelForCausalLM.from_pretrained(folder).eval()
tokenizer = AutoTokenizer.from_pretrained(folder)


def drawn(tokens, new, sampling, seed):
    """New tokens by `generate`."""
    inputs = torch.tensor([tokens])
    torch.manual_seed(seed)
    written = model.generate(
        inputs,
        attention_mask=torch.ones_like(inputs),
        max_new_tokens=new,
        pad_token_id=0,
        **sampling,
    )
    return written[0, len(tokens) :].tolist()


@torch.no_grad()
def greedy_in_windows(tokens, new, context):
    """The most probable tokens; of a full context, the last half is kept."""
    seen, written = list(tokens), []
    while len(written) < new:
        if len(seen) >= context:
            seen = seen[-(context // 2) :]
        following = int(model(torch.tensor([seen]), use_cache=False).logits[0, -1].argmax())
        seen.append(following)
        written.append(following)
        if following == tokenizer.eos_token_id:
            break
    return written


texts = []
for case in cases:
    if "messages" in case:
        tokens = tokenizer.apply_chat_template(
            case["messages"], add_generation_prompt=True, return_dict=False
        )
    else:
        tokens = tokenizer(case["prompt"])["input_ids"] or [tokenizer.bos_token_id]
    if case.get("windows"):
        new = greedy_in_windows(tokens, case["new"], case["windows"])
    else:
        new = drawn(tokens, case["new"], case["sampling"], case.get("seed", 0))
    texts.append(tokenizer.decode(new, skip_special_tokens=True))
print(json.dumps(texts))
