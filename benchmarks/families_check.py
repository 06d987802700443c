"""Load the model that a run has saved with transformers alone, and hold it against the run.

    python -m benchmarks.families_check --dataset data/prepared/x --folder artifacts/x

Exits with status 1 and a line for each difference: layers that the folder lacks, another evaluation
loss than the run's, and, in float64, another loss or gradient than that of the model's own forward.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

# Relative. Some forwards compute a part in float32, also where the model is in float64; where that
# fails, all is compared in float32.
SAME_LOSS, SAME_IN_FLOAT64, SAME_IN_FLOAT32 = 1e-5, 1e-6, 1e-4
LOUDER = 50.0  # times the head's weights, so that a cap of the logits would show


def main() -> int:
    """Print what differs; the exit status says whether anything does."""
    import torch

    from p2p_llm_forge.data.dataset import open_prepared

    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("--folder", type=Path, required=True)
    args = parser.parse_args()
    torch.set_num_threads(1)
    blocks = open_prepared(args.dataset).blocks("validation")
    inputs, targets = map(torch.from_numpy, blocks.inputs_and_targets(range(len(blocks))))
    expected = json.loads((args.folder / "all_results.json").read_text())["eval_loss"]
    differences = compare(args.folder, inputs, targets, expected)
    for line in differences:
        print(f"differs: {line}", flush=True)
    return int(bool(differences))


def compare(folder: Path, inputs, targets, expected: float) -> list[str]:
    """A line for each difference. expected: the evaluation loss that the run has reported."""
    import torch
    from transformers import AutoModelForCausalLM

    from p2p_llm_forge.model.loss import NextTokenLoss

    lm, loading = AutoModelForCausalLM.from_pretrained(
        # The grouped products of experts are not there in float64 (torch 2.13).
        folder,
        dtype=torch.float32,
        output_loading_info=True,
        experts_implementation="eager",
    )
    lines = [
        f"{kind}: {sorted(loading[kind])[:3]}"
        for kind in ("missing_keys", "mismatched_keys", "unexpected_keys")
        if loading[kind]
    ]
    lm = lm.eval()
    with torch.no_grad():
        loss = (
            sum(
                own_nats(lm, i, t).item()
                for i, t in zip(inputs.split(8), targets.split(8), strict=True)
            )
            / targets.numel()
        )
    if abs(loss - expected) > SAME_LOSS * abs(expected):
        lines.append(f"the run's loss {expected}, the saved model's {loss}")
    module, few = NextTokenLoss(lm), (inputs[:2], targets[:2])
    with torch.no_grad():
        lm.get_output_embeddings().weight *= LOUDER
    if lm.config.model_type == "reformer":  # has no gradients in evaluation
        lm.train()
        for part in lm.modules():
            part.dropout = 0.0  # its own seeds: drawn otherwise in each call
    try:
        same = SAME_IN_FLOAT64
        own, own_gradients = nats_and_gradients(lm.double(), lambda: own_nats(lm, *few))
    except RuntimeError:
        same = SAME_IN_FLOAT32
        own, own_gradients = nats_and_gradients(lm.float(), lambda: own_nats(lm, *few))
    ours, gradients = nats_and_gradients(lm, lambda: module(*few)[0])
    if abs(own - ours) > same * abs(own):
        lines.append(f"loss {ours} instead of {own}, head={module.head}")
    largest = max(gradient.abs().max() for gradient in own_gradients.values())
    for name, gradient in own_gradients.items():
        if name not in gradients:
            lines.append(f"{name} gets no gradient")
        elif (distance := (gradients[name] - gradient).abs().max()) > same * largest:
            lines.append(f"the gradient of {name} is {distance} off (the largest: {largest})")
    return lines[:6]


def own_nats(lm, inputs, targets):
    """The summed loss of the model's own forward."""
    import torch

    logits = lm(input_ids=inputs, use_cache=False).logits
    return torch.nn.functional.cross_entropy(
        logits.flatten(0, 1), targets.flatten(), reduction="sum"
    )


def nats_and_gradients(lm, nats_of):
    """A loss, and the gradient of every parameter that it reaches."""
    import torch

    lm.zero_grad()
    torch.manual_seed(0)
    nats = nats_of()
    nats.backward()
    return nats.item(), {n: p.grad.clone() for n, p in lm.named_parameters() if p.grad is not None}


if __name__ == "__main__":
    sys.exit(main())
