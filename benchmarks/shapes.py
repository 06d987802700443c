"""Which shape and settings learn most in a time: a plain loop over stock classes of transformers.

    python benchmarks/shapes.py --text FILE --base "layers=3 width=128" \\
        --arm "" --arm "lr=0.005" --seeds 0 1 2

trains every arm (the base with its own settings on top) with every seed on the first 90 % of the
text, and prints bits per byte over the last 10 %, every token predicted once. Loss and time are
measured apart, because machines are shared: the loss is that of fixed updates, and `--time` lets
short bursts of the arms take turns and prints medians of their ratios to the first, in processor
time where `--threads` is 1.

Every finished run is a line of the file `--results` and is never repeated.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import math
import os
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from benchmarks.noise import against  # noqa: E402


@dataclass(frozen=True)
class Arm:
    """The settings of a run."""

    type: str = "qwen3"
    layers: int = 3
    mix: str = ""  # of lfm2, a letter a layer: c is a short convolution, a is attention
    kernel: int = 3  # of lfm2's convolutions, tokens
    width: int = 128
    head: int = 64  # size of an attention head
    kv: int = 1  # query heads to a head of keys and values
    ff: float = 3.0  # feed-forward size to width
    tie: int = 0  # 1: embedding and head are one matrix
    zero: int = 1  # 1: layers' output projections start at zero
    zero_head: int = 0
    std: float = 0.02  # of the other matrices at the start
    embed_std: float = 0.0  # of the embedding, if not std
    theta: float = 10_000.0  # base of the rotary frequencies
    dropout: float = 0.0  # of attention weights
    residual: float = 0.0  # dropout of the embedding, and of what a layer adds to the stream
    vocab: int = 1024  # 256: bytes
    block: int = 128
    batch: int = 2048  # tokens of an update
    tokens: int = 1_000_000  # of the whole training
    shift: int = 0  # 1: blocks are cut elsewhere in every epoch
    optimizer: str = "muon"
    lr: float = 0.01
    adam: float = 1.0  # what is not Muon's: rate to lr
    head_lr: float = 1.0  # the head's rate to AdamW's others
    momentum: float = 0.95
    beta1: float = 0.9
    beta2: float = 0.95
    decay: float = 0.0  # weight decay
    warmup: float = 0.0  # share of the updates
    cooldown: float = 1.0  # share of the updates in which the rate falls
    cosine: int = 0
    floor: float = 0.0  # the last rate to the peak
    clip: float = 1.0
    ns: int = 5  # Newton-Schulz iterations
    dtype: str = "float32"  # of forward and backward: bfloat16 is autocast
    ns_dtype: str = "float32"
    compile: int = 0  # 1: each layer
    ema: float = 0.0  # decay of an average of the weights, which is evaluated

    @property
    def updates(self) -> int:
        return max(1, self.tokens // self.batch)

    @classmethod
    def parse(cls, base: Arm, words: str) -> Arm:
        """base with the settings of words like "width=192 lr=0.02"."""
        kinds = {field.name: type(getattr(base, field.name)) for field in fields(base)}
        pairs = dict(word.split("=", 1) for word in words.split())
        return replace(base, **{name: kinds[name](value) for name, value in pairs.items()})


def encoded(text: bytes, vocab: int, folder: Path) -> tuple[Tensor, Tensor, int]:
    """Tokens of the first 90 % and the last 10 % of a text, and the bytes of the latter.

    The byte-level BPE is trained on the first part alone.
    """
    name = hashlib.sha256(text).hexdigest()[:12]
    cache = folder / f"{name}-{vocab}.npz"
    cut = len(text) * 9 // 10
    if vocab == 256:
        parts = [np.frombuffer(part, np.uint8) for part in (text[:cut], text[cut:])]
    elif cache.exists():
        with np.load(cache) as kept:
            parts = [kept["train"], kept["validation"]]
    else:
        from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        alphabet = pre_tokenizers.ByteLevel.alphabet()
        trainer = trainers.BpeTrainer(
            vocab_size=vocab, initial_alphabet=alphabet, show_progress=False
        )
        train, validation = (part.decode(errors="replace") for part in (text[:cut], text[cut:]))
        tokenizer.train_from_iterator(train.splitlines(keepends=True), trainer)
        parts = [np.array(tokenizer.encode(part).ids, np.uint16) for part in (train, validation)]
        folder.mkdir(parents=True, exist_ok=True)
        partial = cache.with_suffix(f".{os.getpid()}.npz")
        np.savez(partial, train=parts[0], validation=parts[1])
        partial.replace(cache)
    train, validation = (torch.from_numpy(part.astype(np.int64)) for part in parts)
    return train, validation, len(text) - cut


def build(arm: Arm) -> nn.Module:
    """A stock class of the arm's shape, initialised as the arm says."""
    heads = max(1, arm.width // arm.head)
    options = {"head_dim": arm.head} if arm.type != "nanochat" else {}
    if arm.type == "qwen3":
        options["max_window_layers"] = arm.layers
    if arm.type == "lfm2":
        kinds = {"a": "full_attention", "c": "conv"}
        options["layer_types"] = [kinds[letter] for letter in arm.mix]
        options |= {"conv_L_cache": arm.kernel, "block_auto_adjust_ff_dim": False}
    config = AutoConfig.for_model(
        arm.type,
        vocab_size=arm.vocab,
        hidden_size=arm.width,
        intermediate_size=max(32, round(arm.ff * arm.width / 32) * 32),
        num_hidden_layers=arm.layers,
        num_attention_heads=heads,
        num_key_value_heads=max(1, heads // arm.kv),
        max_position_embeddings=arm.block,
        tie_word_embeddings=bool(arm.tie),
        initializer_range=arm.std,
        attention_dropout=arm.dropout,
        rope_parameters={"rope_type": "default", "rope_theta": arm.theta},
        use_cache=False,
        **options,
    )
    model = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa")
    outputs = ("o_proj.weight", "down_proj.weight", "fc2.weight", "out_proj.weight", "w2.weight")
    with torch.no_grad():
        if arm.embed_std:
            model.get_input_embeddings().weight.normal_(0.0, arm.embed_std)
        if arm.zero_head and not arm.tie:
            model.get_output_embeddings().weight.zero_()
        for name, parameter in model.named_parameters():
            if arm.zero and name.endswith(outputs):
                parameter.zero_()
    dropped = [*model.model.layers.named_modules()]
    dropped = [one for name, one in dropped if name.endswith(("o_proj", "down_proj", "fc2"))]
    for module in [model.get_input_embeddings(), *dropped] if arm.residual else []:
        module.register_forward_hook(
            lambda self, _, out: F.dropout(out, arm.residual, self.training)
        )
    for layer in model.model.layers if arm.compile else []:
        layer.compile(dynamic=False)
    return model


def orthogonal(matrices: Tensor, iterations: int, dtype: torch.dtype) -> Tensor:
    """The nearest matrices with singular values near 1. matrices: [count, rows, columns].

    Source: Newton-Schulz with the coefficients of https://kellerjordan.github.io/posts/muon/
    """
    found = matrices.to(dtype)
    tall = found.shape[1] > found.shape[2]
    found = found.mT if tall else found
    found = found / found.norm(dim=(1, 2), keepdim=True).clamp(min=1e-7)
    for _ in range(iterations):
        gram = found @ found.mT
        found = torch.baddbmm(
            found, torch.baddbmm(gram, gram, gram, beta=-4.775, alpha=2.0315), found, beta=3.4445
        )
    return (found.mT if tall else found).to(matrices.dtype)


class Muon:
    """Nesterov momentum, orthogonalised, at AdamW's usual RMS of 0.2; equal shapes as one stack."""

    def __init__(self, parameters: list[nn.Parameter], arm: Arm) -> None:
        stacks: dict[torch.Size, list[nn.Parameter]] = {}
        for parameter in parameters:
            stacks.setdefault(parameter.shape, []).append(parameter)
        self._stacks = [(group, torch.zeros(len(group), *shape)) for shape, group in stacks.items()]
        self._arm = arm

    @torch.no_grad()
    def step(self, rate: float) -> None:
        arm = self._arm
        for group, buffer in self._stacks:
            gradients = torch.stack([parameter.grad for parameter in group])
            buffer.lerp_(gradients, 1 - arm.momentum)
            update = gradients.lerp_(buffer, arm.momentum)
            update = orthogonal(update, arm.ns, getattr(torch, arm.ns_dtype))
            size = 0.2 * math.sqrt(max(update.shape[1:]))
            torch._foreach_mul_(group, 1 - rate * arm.decay)
            torch._foreach_add_(group, list(update.unbind()), alpha=-rate * size)


def optimizers(arm: Arm, model: nn.Module) -> Callable[[float], None]:
    """A function that takes an update at a learning rate."""
    head = model.get_output_embeddings().weight
    inside = {id(p) for p in model.model.layers.parameters() if p.dim() == 2}
    others = [p for p in model.parameters() if id(p) not in inside and p is not head]
    matrices = [p for p in model.parameters() if id(p) in inside]
    muon = Muon(matrices, arm) if arm.optimizer == "muon" else None
    parts = [
        ([p for p in others if p.dim() > 1], arm.adam, arm.decay),
        ([p for p in others if p.dim() < 2], arm.adam, 0.0),
        ([head], arm.adam * arm.head_lr, arm.decay),
        ([] if muon else matrices, 1.0, arm.decay),
    ]
    groups = [
        {"params": params, "scale": scale, "weight_decay": decay}
        for params, scale, decay in parts
        if params
    ]
    adamw = torch.optim.AdamW(groups, lr=arm.lr, betas=(arm.beta1, arm.beta2), fused=True)

    def step(rate: float) -> None:
        if arm.clip:
            nn.utils.clip_grad_norm_(model.parameters(), arm.clip)
        for group in adamw.param_groups:
            group["lr"] = rate * group["scale"]
        adamw.step()
        if muon:
            muon.step(rate)
        model.zero_grad()

    return step


def rate_factor(arm: Arm, update: int) -> float:
    """The learning rate at an update, counted from 0, to the peak."""
    done = (update + 0.5) / arm.updates
    left = min(1.0, (1 - done) / arm.cooldown) if arm.cooldown else 1.0
    if arm.cosine:
        left = (1 - math.cos(math.pi * left)) / 2
    rising = min(1.0, done / arm.warmup) if arm.warmup else 1.0
    return min(rising, arm.floor + (1 - arm.floor) * left)


def batches(arm: Arm, tokens: Tensor, seed: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Inputs and targets, each [blocks, block], without end: every block once in an epoch."""
    generator = torch.Generator().manual_seed(seed)
    size = max(1, arm.batch // arm.block)
    waiting = torch.zeros(0, dtype=torch.int64)
    span = torch.arange(arm.block + 1)
    while True:
        while len(waiting) < size:
            first = int(torch.randint(arm.block, (), generator=generator)) if arm.shift else 0
            starts = torch.arange(first, len(tokens) - arm.block, arm.block)
            waiting = torch.cat([waiting, starts[torch.randperm(len(starts), generator=generator)]])
        now, waiting = waiting[:size], waiting[size:]
        rows = tokens[now[:, None] + span]
        yield rows[:, :-1], rows[:, 1:]


def loss_of(arm: Arm, model: nn.Module, inputs: Tensor, targets: Tensor, **options) -> Tensor:
    with torch.autocast("cpu", torch.bfloat16, enabled=arm.dtype == "bfloat16"):
        logits = model(input_ids=inputs).logits
    return F.cross_entropy(logits.float().flatten(0, 1), targets.flatten(), **options)


@torch.no_grad()
def bits_per_byte(arm: Arm, model: nn.Module, tokens: Tensor, size_bytes: int) -> float:
    """Of a whole text: block after block, every token but the very first predicted once."""
    model.eval()
    whole = (len(tokens) - 1) // arm.block * arm.block
    inputs, targets = tokens[:-1], tokens[1:]
    pieces = [
        *zip(
            inputs[:whole].view(-1, arm.block).split(32),
            targets[:whole].view(-1, arm.block).split(32),
            strict=True,
        ),
        *([(inputs[whole:][None], targets[whole:][None])] if whole < len(inputs) else []),
    ]
    nats = sum(float(loss_of(arm, model, *piece, reduction="sum")) for piece in pieces)
    model.train()
    return nats / math.log(2) / size_bytes


class Training:
    """A run that can be advanced update by update."""

    def __init__(self, arm: Arm, seed: int, train: Tensor) -> None:
        torch.manual_seed(seed)
        self.arm, self.update = arm, 0
        self.model = build(arm)
        self._step = optimizers(arm, self.model)
        self._batches = batches(arm, train, seed)
        self._average: dict[str, Tensor] = {}

    def advance(self) -> float:
        """One update; its loss in nats per token."""
        loss = loss_of(self.arm, self.model, *next(self._batches))
        loss.backward()
        self._step(self.arm.lr * rate_factor(self.arm, self.update))
        self.update += 1
        if self.arm.ema:
            own = self.model.state_dict()
            if not self._average:
                self._average = {name: value.clone() for name, value in own.items()}
            kept = min(self.arm.ema, self.update / (self.update + 10))
            for name, value in self._average.items():
                value.lerp_(own[name], 1 - kept)
        return loss.item()

    def finish(self) -> nn.Module:
        if self._average:
            self.model.load_state_dict(self._average)
        return self.model


def run(arm: Arm, seed: int, text: bytes, folder: Path) -> dict:
    """Train an arm to its end. Returns bits per byte, epochs, parameters, processor time."""
    train, validation, size_bytes = encoded(text, arm.vocab, folder)
    training = Training(arm, seed, train)
    seconds, losses = [], []
    for _ in range(arm.updates):
        before = time.process_time()
        losses.append(training.advance())
        seconds.append(time.process_time() - before)
    last = losses[-max(1, len(losses) // 10) :]
    parameters = sum(p.numel() for p in training.model.parameters())
    return {
        "bits_per_byte": bits_per_byte(arm, training.finish(), validation, size_bytes),
        "train_bits_per_byte": statistics.fmean(last) / math.log(2) * len(train) / (9 * size_bytes),
        "epochs": arm.updates * arm.batch / len(train),
        "parameters": parameters,
        "cpu_ms": statistics.median(seconds) * 1e3,
        "cpu_s": sum(seconds),
    }


def step_times(
    arms: list[Arm], text: bytes, folder: Path, bursts: int, long: int
) -> list[list[float]]:
    """Seconds an update of each arm takes in each of some bursts, the arms taking turns.

    With one thread it is processor time, which others on the machine disturb less.
    """
    clock = time.process_time if torch.get_num_threads() == 1 else time.perf_counter
    trainings = [Training(arm, 0, encoded(text, arm.vocab, folder)[0]) for arm in arms]
    for training in trainings:
        training.advance()
    found: list[list[float]] = [[] for _ in arms]
    for _ in range(bursts):
        for training, times in zip(trainings, found, strict=True):
            training.advance()
            begun = clock()
            for _ in range(long):
                training.advance()
            times.append((clock() - begun) / long)
    return found


def differing(arm: Arm) -> str:
    usual = asdict(Arm())
    return " ".join(f"{key}={value}" for key, value in asdict(arm).items() if value != usual[key])


def finished(results: Path, key: dict) -> dict | None:
    """The run of a file of results that has an arm, a seed and a text."""
    lines = results.read_text().splitlines() if results.exists() else []
    for line in map(json.loads, lines):
        if all(line[name] == value for name, value in key.items()):
            return line
    return None


def measure_time(options: argparse.Namespace, arms: list[Arm], text: bytes) -> None:
    times = step_times(arms, text, options.work_dir, options.time, options.burst)
    for arm, own in zip(arms, times, strict=True):
        ratio = statistics.median(a / b for a, b in zip(own, times[0], strict=True))
        print(
            f"{statistics.median(own) * 1e3:8.1f} ms {ratio:6.3f} x the first,"
            f" {ratio * arms[0].batch / arm.batch:6.3f} a token: {differing(arm)}",
            flush=True,
        )


def measure_loss(options: argparse.Namespace, arm: Arm, seed: int, text: bytes) -> float:
    """Bits per byte of one run, which is printed; a finished one is not repeated."""
    key = {"arm": asdict(arm), "seed": seed, "text": options.text.name}
    found = finished(options.results, key)
    if found is None:
        found = {**key, **run(arm, seed, text, options.work_dir)}
        with options.results.open("a") as file:
            file.write(json.dumps(found) + "\n")
    print(
        f"{found['bits_per_byte']:.4f} (train {found['train_bits_per_byte']:.3f},"
        f" {found['epochs']:.1f} epochs, {found['parameters'] / 1e6:.2f} M parameters,"
        f" {found['cpu_ms']:.0f} ms, {found['cpu_s']:.0f} s) seed {seed}: {differing(arm)}",
        flush=True,
    )
    return float(found["bits_per_byte"])


def main(words: list[str] | None = None) -> None:
    settings = " ".join(f"{field.name}={field.default}" for field in fields(Arm))
    parser = argparse.ArgumentParser(
        description=__doc__,
        epilog=f"settings and their defaults:\n{settings}",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--text", type=Path, required=True)
    parser.add_argument("--base", default="", help="settings that all arms share")
    parser.add_argument("--arm", action="append", help="settings of one arm; repeatable")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--results", type=Path, default=Path("shapes.jsonl"))
    parser.add_argument("--work-dir", type=Path, default=Path("/tmp/shapes"), help="of tokens")
    parser.add_argument("--time", type=int, default=0, metavar="BURSTS", help="measure only time")
    parser.add_argument("--burst", type=int, default=5, help="updates in a burst")
    options = parser.parse_args(words)
    torch.set_num_threads(options.threads)
    base = Arm.parse(Arm(), options.base)
    arms = [Arm.parse(base, words) for words in options.arm or [""]]
    text = options.text.read_bytes()
    if options.time:
        measure_time(options, arms, text)
        return
    losses = [[measure_loss(options, arm, seed, text) for arm in arms] for seed in options.seeds]
    first, *others = zip(*losses, strict=True)
    for arm, of_arm in zip(arms[1:], others, strict=True):
        print(f"{differing(arm) or 'the same'}: {against(of_arm, first)}")


if __name__ == "__main__":
    main()
