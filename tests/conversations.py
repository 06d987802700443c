"""Conversations for tests: made up by a seed, written as datasets hold them, learnt by hand.

A conversation is a list of (token, whether it is trained); a block is a list of conversations, of
which the last may be padding. Nothing here knows how the project packs, masks or adds up.
"""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import datasets
import torch

from tests.texts import write_manifest

Block = list[list[tuple[int, bool]]]


def some_blocks(count: int, length: int, vocab_size: int, end: int, seed: int = 0) -> list[Block]:
    """Blocks of a few conversations each; some have much more to learn from than others.

    Every turn ends with `end`, as ChatML does it: also inside of a conversation.
    """
    draw = random.Random(seed)
    blocks = []
    for _ in range(count):
        share, left, block = draw.choice((0.0, 0.3, 1.0)), length, []
        while left >= 4:
            size = min(left, draw.randint(4, length // 2))
            tokens = [draw.choice([t for t in range(vocab_size) if t != end]) for _ in range(size)]
            tokens[size // 2 - 1] = tokens[-1] = end
            learnt = [False, *(draw.random() < share for _ in range(size - 2)), True]
            block.append(list(zip(tokens, learnt, strict=True)))
            left -= size
        blocks.append([*block, [(end, False)] * left] if left else block)
    return blocks


def tokens_of(block: Block) -> list[int]:
    return [token for conversation in block for token, _ in conversation]


def trained_of(block: Block) -> list[bool]:
    return [is_trained for conversation in block for _, is_trained in conversation]


def begins_of(block: Block) -> list[bool]:
    return [place == 0 for conversation in block for place in range(len(conversation))]


def bits(flags: list[bool]) -> list[int]:
    """Eight to a byte, the first the lowest."""
    found = [0] * ((len(flags) + 7) // 8)
    for place, flag in enumerate(flags):
        found[place // 8] |= flag << place % 8
    return found


def write_conversations(folder: Path, text: Path, splits: dict[str, list[Block]]) -> Path:
    """A prepared dataset of them, as `datasets` writes it, with the tokenizer of another one."""
    from transformers import AutoTokenizer

    content = json.loads((text / "manifest.json").read_text())
    tokenizer = AutoTokenizer.from_pretrained(text / "tokenizer")
    folder.mkdir()
    (folder / "tokenizer").symlink_to(text / "tokenizer")
    length, end, facts = content["sequence_length"], content["eos_token_id"], {}
    kinds = {"input_ids": (content["dtype"], length)}
    kinds |= dict.fromkeys(("trained", "begins"), ("uint8", (length + 7) // 8))
    features = datasets.Features(
        {name: datasets.List(datasets.Value(kind), length=n) for name, (kind, n) in kinds.items()}
    )
    for name, blocks in splits.items():
        columns = {
            "input_ids": list(map(tokens_of, blocks)),
            "trained": [bits(trained_of(block)) for block in blocks],
            "begins": [bits(begins_of(block)) for block in blocks],
        }
        rows = datasets.Dataset.from_dict(columns, features=features)
        rows.save_to_disk(str(folder / name))
        facts[name] = {
            "documents": sum(map(len, blocks)),
            "blocks": len(blocks),
            "tokens": len(blocks) * length,
            "bytes": sum(bytes_of(tokenizer, block, end) for block in blocks),
            "trained_tokens": sum(sum(trained_of(block)) for block in blocks),
            "dropped_tokens": 0,
            "left_out_tokens": 0,
        }
    content |= {"splits": facts, "conversations": {"train_on": "assistant"}}
    content["content_fingerprint"] = "of conversations"
    write_manifest(folder, content)
    return folder


def bytes_of(tokenizer: Any, block: Block, end: int) -> int:
    """Bytes of text of what is trained: in a byte-level vocabulary a letter is a byte."""
    learnt = [t for c in block for t, is_trained in c if is_trained and t != end]
    return sum(map(len, tokenizer.convert_ids_to_tokens(learnt)))


def nats_by_hand(lm: Any, block: Block, end: int, alone: bool) -> tuple[torch.Tensor, int]:
    """The summed loss of what is trained in a block, and of how many tokens, by a plain loop.

    alone: each conversation is read by itself; else the block as one text, after its `end`.
    """
    texts = block if alone else [[(end, False), *(pair for c in block for pair in c)]]
    nats, count = torch.zeros((), dtype=lm.dtype), 0
    for text in (text for text in texts if len(text) > 1):
        logits = lm(input_ids=torch.tensor([[token for token, _ in text[:-1]]])).logits[0]
        wanted = [(place - 1, token) for place, (token, learnt) in enumerate(text) if learnt]
        if wanted:
            places, tokens = zip(*wanted, strict=True)
            nats = nats - logits.log_softmax(-1)[list(places), list(tokens)].sum()
            count += len(wanted)
    return nats, count


def right_by_hand(lm: Any, block: Block, end: int, alone: bool) -> int:
    """How many of the trained tokens of a block are the most probable ones."""
    texts = block if alone else [[(end, False), *(pair for c in block for pair in c)]]
    right = 0
    for text in (text for text in texts if len(text) > 1):
        logits = lm(input_ids=torch.tensor([[token for token, _ in text[:-1]]])).logits[0]
        guesses = logits.argmax(-1).tolist()
        right += sum(is_trained and t == g for (t, is_trained), g in zip(text[1:], guesses))  # noqa: B905
    return right


def step_by_hand(lm: Any, blocks: list[Block], end: int, rate: float, alone: bool = False) -> int:
    """One step of plain SGD on the mean over what is trained in the blocks; returns how many."""
    found = [nats_by_hand(lm, block, end, alone) for block in blocks]
    count = sum(n for _, n in found)
    lm.zero_grad()
    (sum(nats for nats, _ in found) / count).backward()
    with torch.no_grad():
        for parameter in lm.parameters():
            if parameter.grad is not None:
                parameter -= rate * parameter.grad
    return count
