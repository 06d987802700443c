"""Does training work on this machine? One epoch of the sample text with a model of two layers.

    uv run python tests/smoke_single_node.py

The model is sshleifer/tiny-gpt2 of the Hub, or one of its shape where the Hub cannot be reached.
The run lies in artifacts/smoke/ then, or in the folder that is given.
"""

from __future__ import annotations

import math
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
NAME = "sshleifer/tiny-gpt2"
SHAPE = {"n_layer": 2, "n_head": 2, "n_embd": 2, "n_positions": 1024, "vocab_size": 50257}
VOCABULARY = 4096  # of a tokenizer made here
WAIT_S = 6.0  # for the Hub


def smoke(folder: Path) -> None:
    """Train one epoch into a folder, and load what it saved."""
    from p2p_llm_forge.config import TrainConfig
    from train import train

    reason = why_not_from_hub()
    if reason:
        print(f"{NAME} cannot be had from the Hub ({reason}): a model of its shape is made here")
    config = TrainConfig(
        model_name=made_here(folder.with_name(f"{folder.name}_model")) if reason else NAME,
        dataset_path=str(ROOT / "data" / "sample_corpus.txt"),
        output_dir=str(folder),
        epochs=1,
        batch_size=16,
        sequence_length=128,
        backend="gloo",
        cpu=True,
        compile="off",
        report_to="none",
        overwrite=True,
    )
    print(f"training for {train(config).steps} updates is over")
    require_works(folder)


def why_not_from_hub() -> str | None:
    """Why the model cannot be downloaded; None: it can."""
    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return "HF_HUB_OFFLINE is set"
    try:
        file = f"{constants.ENDPOINT}/{NAME}/resolve/main/config.json"
        urllib.request.urlopen(file, timeout=WAIT_S).close()
    except OSError as error:
        return str(error)
    return None


def made_here(folder: Path) -> str:
    """A model of the shape of tiny-gpt2, with random weights, and a tokenizer of the sample."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from p2p_llm_forge.data.tokenizer import train_tokenizer

    sample = (ROOT / "data" / "sample_corpus.txt").read_text(encoding="utf-8")
    tokenizer = train_tokenizer([sample], VOCABULARY)
    end = tokenizer.eos_token_id
    torch.manual_seed(0)
    GPT2LMHeadModel(GPT2Config(**SHAPE, bos_token_id=end, eos_token_id=end)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def require_works(folder: Path) -> None:
    """End with status 1 unless the saved model predicts the sample better than a guess."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model = AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    text = (ROOT / "data" / "sample_corpus.txt").read_text(encoding="utf-8")[:2000]
    tokens = tokenizer(text, return_tensors="pt").input_ids[:, :128]
    with torch.no_grad():
        loss = float(model(input_ids=tokens, labels=tokens).loss)
    guess = math.log(model.config.vocab_size)
    if not loss < guess:
        sys.exit(f"smoke test failed: loss {loss:.3f}, a guess has {guess:.3f}")
    print(f"smoke test passed: loss {loss:.3f}, a guess has {guess:.3f}; the model is in {folder}")


if __name__ == "__main__":
    sys.path[0] = str(ROOT)  # instead of tests/, whose folders are named as packages are
    smoke(Path(sys.argv[1]) if sys.argv[1:] else ROOT / "artifacts" / "smoke")
