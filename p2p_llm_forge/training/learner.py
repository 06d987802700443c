"""What is trained: the model and its optimizer, the same on every rank."""

from __future__ import annotations

import contextlib
import secrets
import shutil
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import torch

from p2p_llm_forge.config.lora import BASE, CONFIG, WEIGHTS
from p2p_llm_forge.data.blocks import Blocks
from p2p_llm_forge.data.dataset import PreparedDataset
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import build_model, load_model, recompute_activations
from p2p_llm_forge.model.dropout import add_dropout
from p2p_llm_forge.model.fit import TextSpec
from p2p_llm_forge.model.lora import is_adapter_folder, load_adapters
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.model.optimizer import build_optimizer
from p2p_llm_forge.model.unreached import freeze_unreached
from p2p_llm_forge.sync.base import Sync
from p2p_llm_forge.sync.ddp import settle_ddp, share_first_weights
from p2p_llm_forge.sync.strategy import refuse_different_models
from p2p_llm_forge.training.compilation import settle_compile
from p2p_llm_forge.training.feeding import Batch, read
from p2p_llm_forge.training.job import Job
from p2p_llm_forge.training.micro_batch import settle_micro_batch
from p2p_llm_forge.training.orthogonalising import settle_orthogonalising


@dataclass(frozen=True)
class Learner:
    """The model and its optimizer, as Accelerate wraps them and without it."""

    model: Any  # NextTokenLoss, in DDP where there are several ranks
    bare_model: NextTokenLoss
    optimizer: Any
    bare_optimizer: torch.optim.Optimizer
    compile: Literal["on", "off"]  # what --compile has come to
    micro_batch_size: int  # what --micro-batch-size has come to

    @property
    def lm(self) -> Any:
        """The causal LM itself, a model of transformers."""
        return self.bare_model.lm


def build_learner(job: Job, checkpoint: Path | None) -> Learner:
    """The model, from scratch or as the checkpoint left it, and a new optimizer on the device.

    All ranks must call. Raises ForgeError where model, data and ranks do not fit together.
    """
    config, cluster = job.config, job.cluster
    lm = build_or_load(job, checkpoint)
    bare_model = NextTokenLoss(lm.to(cluster.device), job.document_end).train()
    freeze_unreached(bare_model, job.data.manifest.sequence_length)
    micro_batch_size = settle_micro_batch(job, bare_model, checkpoint)
    job = replace(job, plan=replace(job.plan, micro_batch_size=micro_batch_size))
    compiled = settle_compile(job, bare_model, checkpoint)
    bare_optimizer = build_optimizer(config, lm)
    settle_orthogonalising(config, bare_optimizer, cluster)
    settle_ddp(config, cluster, bare_model)
    share_first_weights(cluster, bare_model)
    model, optimizer = cluster.accelerator.prepare(bare_model, bare_optimizer)
    return Learner(
        model,
        bare_model,
        optimizer=optimizer,
        bare_optimizer=bare_optimizer,
        compile=compiled,
        micro_batch_size=micro_batch_size,
    )


def build_or_load(job: Job, checkpoint: Path | None) -> Any:
    """The causal LM of the run, the same on every rank, on the CPU."""
    config, cluster = job.config, job.cluster

    def of_this_rank() -> Any:
        if checkpoint is None:
            return new_model(job)
        if not checkpoint.is_dir():
            raise ForgeError(
                f"{checkpoint} is not seen from here; to resume, every machine must see the"
                " --output-dir of rank 0",
                "share the folder, or copy it to this machine",
            )
        if is_adapter_folder(checkpoint) != bool(config.lora_rank):
            raise other_kind(checkpoint)
        if config.lora_rank:
            lm = new_model(job)
            load_adapters(lm, checkpoint)
            return lm
        text, code = text_spec_of(job.data), config.trust_remote_code
        return load_model(str(checkpoint), text, code, is_ours=True)

    lm = cluster.together(of_this_rank)
    cluster.together(lambda: add_dropout(lm, config.dropout or 0))
    refuse_different_models(cluster, lm, is_loaded=bool(config.model_name or checkpoint))
    if config.gradient_checkpointing:
        recompute_activations(lm)
    return lm


def other_kind(checkpoint: Path) -> ForgeError:
    """What a checkpoint comes to that holds adapters where none are trained, or the reverse."""
    if is_adapter_folder(checkpoint):
        found = f"{checkpoint} holds adapters (LoRA), and this run trains all weights"
        return ForgeError(found, "add the --lora-rank that they were trained with")
    found = f"{checkpoint} holds a whole model, and this run trains adapters (LoRA)"
    return ForgeError(found, "leave --lora-rank out, or start in another --output-dir")


def new_model(job: Job) -> Any:
    """The causal LM that a run begins with, on the CPU: in float32, or as `base_dtype` says."""
    processes_here = job.cluster.launch.local_world_size
    config = replace(job.config, base_dtype=base_dtype(job))
    return build_model(config, text_spec_of(job.data), processes_here)


def base_dtype(job: Job) -> Literal["float32", "bfloat16"]:
    """What --base-dtype has come to, by what is computed in."""
    asked, accelerator = job.config.base_dtype, job.cluster.accelerator
    if asked != "auto":
        return asked
    is_bf16 = job.config.lora_rank and accelerator and accelerator.mixed_precision == "bf16"
    return "bfloat16" if is_bf16 else "float32"


def text_spec_of(data: PreparedDataset) -> TextSpec:
    """What a model must know of the text in `data`."""
    return TextSpec(
        vocab_size=data.manifest.vocab_size,
        eos_token_id=data.manifest.eos_token_id,
        sequence_length=data.manifest.sequence_length,
        tokenizer_dir=data.tokenizer_dir,
        is_chat=bool(data.manifest.conversations),
    )


@contextlib.contextmanager
def merged(saved: Path, text: TextSpec, trust_remote_code: bool) -> Iterator[Path]:
    """A folder, until it is left, with the whole model that a checkpoint's adapters make of their
    base, in float32, and all else that is published of it. Raises ForgeError."""
    step = saved.name.rpartition("-")[2]
    folder = saved.parent / f"tmp-merged-{step}-{secrets.token_hex(4)}"
    shutil.copytree(saved, folder)
    try:
        for name in (CONFIG, WEIGHTS, BASE):
            (folder / name).unlink()
        load_model(str(saved), text, trust_remote_code).save_pretrained(folder)
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def first_micro_batch(job: Job, blocks: Blocks, size: int | None = None) -> Batch:
    """The first blocks of the split, on the device: for trying the model. size: if not planned."""
    numbers = range(min(size or job.plan.micro_batch_size, len(blocks)))
    return read(blocks, numbers).each(lambda one: one.to(job.cluster.device))


def prime(job: Job, learner: Learner, sync: Sync, blocks: Blocks) -> None:
    """Take a forward and a backward before the first update, and throw their gradients away.

    DDP orders its buckets by it, and no rank compiles while others wait in an exchange.
    """
    batch = first_micro_batch(job, blocks)
    with sync.priming():
        nats, _ = learner.model(*batch)
        nats.backward()
    learner.model.zero_grad()
    job.cluster.barrier()
