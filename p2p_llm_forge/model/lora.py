"""LoRA (arXiv 2106.09685): small matrices beside the weights of a model, by peft.

They are put into the model of transformers itself, which stays what it is: its class, base model,
head and configuration. Only they have a gradient.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from transformers.pytorch_utils import Conv1D

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.lora import BASE, CONFIG, INSTALL, WEIGHTS
from p2p_llm_forge.errors import ForgeError, in_one_line
from p2p_llm_forge.files import read_json, write_json
from p2p_llm_forge.model.low_rank import take_less_memory
from p2p_llm_forge.model.sizes import one_line

PREFIX = "base_model.model."  # of the keys in peft's files
ADAPTER = "default"  # peft's name for the only one
LAYERS = (torch.nn.Linear, Conv1D)  # that are adapted
MOST_NAMES = 40  # that a message lists
FACTS_SHAPE = {"name": str, "fingerprint": str}


# --- putting adapters in --------------------------------------------------------------------------


def add_adapters(lm: Any, config: TrainConfig) -> None:
    """Give the layers of `--lora-targets` adapters, and leave only these a gradient.

    Their first weights depend on the seed alone, and add nothing. Raises ForgeError where the
    targets name no layer.
    """
    from peft import LoraConfig

    targets: str | list[str] = config.lora_targets
    if targets in (["auto"], ["all-linear"]):
        targets = "all-linear"
    else:
        require_targets(lm, config.lora_targets)
    settings = LoraConfig(
        r=config.lora_rank or 1,
        lora_alpha=config.scaling or 1,
        lora_dropout=config.lora_dropout,
        target_modules=targets,
        task_type="CAUSAL_LM",
        base_model_name_or_path=name_of_base(config.model_name or ""),
    )
    inject(lm, settings, config.seed)


def require_peft(what: str) -> None:
    """Raise ForgeError where adapters cannot be had. what: needs them."""
    if importlib.util.find_spec("peft") is None:
        raise ForgeError(f"{what} needs the package peft, which is not installed", INSTALL)


def inject(lm: Any, settings: Any, seed: int = 0) -> None:
    """Put adapters of these settings (peft's) into the model. Raises ForgeError."""
    from peft import inject_adapter_in_model

    fingerprint, asked = base_fingerprint(lm), settings.target_modules  # peft replaces the words
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore")  # of GPT-2's layers, whose weights lie the other way round
        torch.manual_seed(seed)
        try:
            inject_adapter_in_model(settings, lm, ADAPTER)
        except Exception as error:  # whatever peft raises for layers that it does not know
            names = asked if isinstance(asked, str) else " ".join(sorted(asked or ["auto"]))
            found = f"--lora-targets {names}: peft cannot adapt these layers: {one_line(error)}"
            raise ForgeError(found, f"name others: {in_words(names_of_layers(lm))}") from error
    for parameter in adapter_parameters(lm).values():
        parameter.data = parameter.data.float()  # whatever the base's dtype
    take_less_memory(lm, ADAPTER)
    lm.fingerprint_of_base = fingerprint


def require_targets(lm: Any, targets: Iterable[str]) -> None:
    """Raise ForgeError, with the names that exist, unless each of the targets names a layer."""
    paths = layers_of(lm)
    bad = [one for one in targets if not any(f".{path}".endswith(f".{one}") for path in paths)]
    if bad:
        raise ForgeError(
            f"--lora-targets: this {lm.config.model_type} has no layer called {' or '.join(bad)}",
            f"name others: {in_words(names_of_layers(lm))}; or leave it out",
        )


def names_of_layers(lm: Any) -> list[str]:
    """The last parts of the names of layers that can have adapters, each once."""
    return list(dict.fromkeys(path.rpartition(".")[2] for path in layers_of(lm)))


def layers_of(lm: Any) -> list[str]:
    """The names of layers that can have adapters; not of a head whose weights are an embedding."""
    embeddings = {id(m.weight) for m in lm.modules() if isinstance(m, torch.nn.Embedding)}
    return [
        name
        for name, module in lm.named_modules()
        if isinstance(module, LAYERS) and id(module.weight) not in embeddings
    ]


def in_words(names: list[str]) -> str:
    """Names for a message."""
    more = f" and {len(names) - MOST_NAMES} more" if len(names) > MOST_NAMES else ""
    return in_one_line(" ".join(names[:MOST_NAMES]), 1000) + more


# --- what has adapters ----------------------------------------------------------------------------


def settings_of(lm: Any) -> Any | None:
    """peft's settings of the model's adapters; None where it has none."""
    return (getattr(lm, "peft_config", None) or {}).get(ADAPTER)


def adapter_parameters(lm: Any) -> dict[str, torch.nn.Parameter]:
    """The adapters' weights by their names in the model, also those that no text reaches."""
    return {name: p for name, p in lm.named_parameters() if ".lora_" in name}


def saved_parameters(lm: Any) -> dict[str, torch.Tensor]:
    """What a checkpoint holds of the model, by name: all of it, or its adapters alone."""
    return dict(adapter_parameters(lm)) if settings_of(lm) else lm.state_dict()


def lora_in_words(lm: Any) -> str:
    """What the adapters are, for a person."""
    settings, own = settings_of(lm), adapter_parameters(lm)
    assert settings is not None
    trained = sum(parameter.numel() for parameter in own.values())
    total = sum(parameter.numel() for parameter in lm.parameters()) - trained
    layers = ", ".join(sorted({name.split(".lora_")[0].rpartition(".")[2] for name in own}))
    return (
        f"rank {settings.r}, alpha {settings.lora_alpha}, in {layers}:"
        f" {trained:,} of {total + trained:,} parameters are trained"
    )


def base_fingerprint(lm: Any) -> str:
    """A SHA-256 of the weights without adapters, rounded to bfloat16: whatever they were loaded in.

    Names are not part of it, for adapters change them; the order of the weights is.
    """
    digest = hashlib.sha256()
    own = adapter_parameters(lm)
    for name, parameter in lm.named_parameters():
        if name not in own:
            digest.update(str(tuple(parameter.shape)).encode())
            rounded = parameter.detach().to("cpu", torch.bfloat16).contiguous()
            digest.update(rounded.reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()


def name_of_base(name: str) -> str:
    """A model's name as others find it from anywhere: a folder by its whole path."""
    return str(Path(name).expanduser().resolve()) if Path(name).expanduser().is_dir() else name


# --- files ----------------------------------------------------------------------------------------


def write_adapters(folder: Path, lm: Any, tensors: dict[str, torch.Tensor]) -> None:
    """Write adapters as peft reads them, and which base they belong to. tensors: by their names in
    the model."""
    settings = settings_of(lm)
    assert settings is not None
    renamed = {
        PREFIX + name.replace(f".{ADAPTER}", ""): tensor.contiguous()
        for name, tensor in tensors.items()
    }
    save_file(renamed, folder / WEIGHTS, metadata={"format": "pt"})
    values = {**settings.to_dict(), "inference_mode": True}
    values = {key: sorted(one) if isinstance(one, set) else one for key, one in values.items()}
    write_json(folder / CONFIG, json.loads(json.dumps(values, default=str)))
    write_json(folder / BASE, base_facts(lm))


def base_facts(lm: Any) -> dict[str, str]:
    """Which model the adapters belong to: its name, and the fingerprint of its weights."""
    settings = settings_of(lm)
    assert settings is not None
    return {
        "name": str(settings.base_model_name_or_path or ""),
        "fingerprint": lm.fingerprint_of_base,
    }


def is_adapter_folder(folder: Path) -> bool:
    """Whether adapters lie in the folder, and no model of their own."""
    return (folder / CONFIG).is_file()


def base_of(folder: Path) -> str:
    """The model that the adapters in a folder belong to. Raises ForgeError."""
    name = str(saved_settings(folder).base_model_name_or_path or "")
    is_path = name.startswith((".", "/", "~")) or name.count("/") > 1
    if not name or (is_path and not Path(name).is_dir()):
        raise ForgeError(
            f"{folder} holds adapters of {in_one_line(name) or 'a base without a name'}, and there"
            " is no such folder",
            f"put the base, or a link to it (ln -s), at {name}"
            if name
            else f"write the base's path into base_model_name_or_path of {folder / CONFIG}",
        )
    return name


def read_adapters(lm: Any, folder: Path) -> Any:
    """The base with the adapters of a folder in it. Raises ForgeError.

    Those of another program are of any kind that peft can add to weights, and are added.
    """
    settings = saved_settings(folder)
    if not (folder / BASE).exists():
        return merged_by_peft(lm, folder, settings)
    inject(lm, settings)
    load_adapters(lm, folder)
    return lm


def merged_by_peft(lm: Any, folder: Path, settings: Any) -> Any:
    """The model whose weights a folder of another program's adapters adds to. Raises ForgeError."""
    from peft import PeftModel

    weights_in(folder)
    if settings.is_prompt_learning:
        raise ForgeError(
            f"{folder} holds {settings.peft_type.value}, which adds nothing to a model's weights",
            "give adapters that do, such as LoRA's, or a whole model",
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            warnings.filterwarnings("error", message="Found missing adapter keys")
            whole = PeftModel.from_pretrained(lm, str(folder)).merge_and_unload()
    except Exception as error:  # whatever peft raises for kinds that cannot be added, and damage
        raise ForgeError(
            f"peft cannot add the adapters in {folder} to their base: {one_line(error)}",
            "copy the whole folder again, or save the whole model by the program that made them",
        ) from error
    whole.__dict__.pop("peft_config", None)  # else it would be taken for one with adapters
    return whole.requires_grad_(True)


def load_adapters(lm: Any, folder: Path) -> None:
    """Put the weights of a folder into the adapters that the model has.

    Raises ForgeError where they are of other settings, another base or damaged.
    """
    settings = settings_of(lm)
    assert settings is not None
    fix = "resume with the model and the LoRA flags that it was saved with, or in another folder"
    refuse_another_base(lm, folder)
    saved = saved_settings(folder)
    for name, now in (("r", settings.r), ("lora_alpha", settings.lora_alpha)):
        if (was := getattr(saved, name)) != now:
            flag = {"r": "--lora-rank"}.get(name, "--lora-alpha")
            raise ForgeError(f"{folder} holds adapters of {flag} {was}, asked was {now}", fix)
    own = {
        PREFIX + name.replace(f".{ADAPTER}", ""): one
        for name, one in adapter_parameters(lm).items()
    }
    tensors = weights_in(folder)
    if odd := sorted(tensors.keys() ^ own.keys()):
        what = "lacks" if odd[0] in own else "holds"
        found = f"{folder} {what} {in_one_line(odd[0])}: its adapters are in other layers"
        raise ForgeError(found, fix)
    for name, parameter in own.items():
        if tensors[name].shape != parameter.shape:
            raise ForgeError(f"{folder} holds {name} of another size than this model's", fix)
        parameter.data.copy_(tensors[name])


def refuse_another_base(lm: Any, folder: Path) -> None:
    """Raise ForgeError where the adapters in a folder were trained beside other weights."""
    if not (folder / BASE).exists():
        return  # of another program
    try:
        known = read_json(folder / BASE, FACTS_SHAPE)
    except (OSError, ValueError) as error:
        raise ForgeError(
            f"{folder / BASE} cannot be read: {one_line(error)}", "copy the whole folder again"
        ) from error
    now = getattr(lm, "fingerprint_of_base", None) or base_fingerprint(lm)
    if known["fingerprint"] != now:
        raise ForgeError(
            f"the adapters in {folder} belong to other weights than those of the base that was"
            f" loaded: they were trained beside {in_one_line(known['name'])} with the fingerprint"
            f" {known['fingerprint'][:12]}, this one's is {now[:12]}",
            "give the base as it was when the adapters were trained",
        )


def saved_settings(folder: Path) -> Any:
    """peft's settings in a folder. Raises ForgeError."""
    require_peft(f"what lies in {folder}")
    from peft import PeftConfig

    try:
        return PeftConfig.from_pretrained(str(folder))
    except Exception as error:  # whatever peft raises for damaged files
        found = f"{folder / CONFIG} cannot be read: {one_line(error)}"
        raise ForgeError(found, "copy the whole folder again") from error


def weights_in(folder: Path) -> dict[str, torch.Tensor]:
    """The adapters' weights in a folder, by peft's names. Raises ForgeError."""
    try:
        return load_file(folder / WEIGHTS)
    except (OSError, SafetensorError) as error:
        found = f"{folder / WEIGHTS} cannot be read: {one_line(error)}"
        raise ForgeError(found, "copy the whole folder again") from error


# --- the whole model ------------------------------------------------------------------------------


@torch.no_grad()
def merge(lm: Any) -> None:
    """Add the adapters to the weights that they lie beside, and take them out of the model."""
    from peft.tuners.tuners_utils import BaseTunerLayer

    adapted = [(name, m) for name, m in lm.named_modules() if isinstance(m, BaseTunerLayer)]
    for name, module in adapted:
        module.merge()
        parent, _, last = name.rpartition(".")
        setattr(lm.get_submodule(parent), last, module.get_base_layer())
    del lm.peft_config
    lm._hf_peft_config_loaded = False  # where transformers has put them in
    for parameter in lm.parameters():
        parameter.requires_grad_(True)
