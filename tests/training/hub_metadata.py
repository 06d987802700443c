"""What the Hub asks of a model card's metadata, after its documentation, without any of our code.

Sources: huggingface.co/docs/hub/model-cards (metadata, base_model, base_model_relation), and the
specification in github.com/huggingface/hub-docs, modelcard.md (model-index: required and optional
keys). Names of models as huggingface_hub validates them.
"""

from __future__ import annotations

import math
import re
from typing import Any

import yaml
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

# As in the Hub's server: see REGEX_YAML_BLOCK of huggingface_hub's repocard.py.
BLOCK = re.compile(r"^(\s*---(?:\r\n|\r|\n))([\S\s]*?)((?:\r\n|\r|\n)---[ \t]*(\r\n|\n|$))")
TEXTS = ("library_name", "pipeline_tag", "license", "base_model_relation")
RELATIONS = ("adapter", "merge", "quantized", "finetune")
REQUIRED = {"task": ("type",), "dataset": ("type", "name"), "metrics": ("type", "value")}
OPTIONAL = {
    "task": ("name",),
    "dataset": ("config", "split", "revision", "args"),
    "metrics": ("name", "config", "args", "verified"),
}


def errors_in(card: str) -> list[str]:
    """What the Hub would refuse or not understand; empty for a good card."""
    block = BLOCK.match(card)
    if block is None:
        return ["no metadata at the beginning"]
    try:
        data = yaml.safe_load(block[2])
    except yaml.YAMLError as error:
        return [f"no YAML: {error}"]
    if not isinstance(data, dict):
        return ["the metadata is no mapping"]
    errors = [f"{key} is no text" for key in TEXTS if not isinstance(data.get(key, ""), str)]
    tags = data.get("tags", [])
    if not isinstance(tags, list) or not all(isinstance(tag, str) for tag in tags):
        errors.append("tags is no list of texts")
    bases = data.get("base_model", [])
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            validate_repo_id(base)
        except HFValidationError as error:
            errors.append(f"base_model: {error}")
    if data.get("base_model_relation", "finetune") not in RELATIONS:
        errors.append("base_model_relation is unknown")
    for model in data.get("model-index", []):
        errors += errors_in_model(model)
    return errors


def errors_in_model(model: dict[str, Any]) -> list[str]:
    """What is wrong with one entry of model-index."""
    if not isinstance(model.get("name"), str) or not model.get("results"):
        return ["model-index: no name or no results"]
    errors = []
    for result in model["results"]:
        for part, required in REQUIRED.items():
            entries = result.get(part)
            for entry in entries if isinstance(entries, list) else [entries or {}]:
                missing = [key for key in required if key not in entry]
                unknown = sorted(set(entry) - {*required, *OPTIONAL[part]})
                errors += [f"model-index, {part}: {key} is missing" for key in missing]
                errors += [f"model-index, {part}: {key} is unknown" for key in unknown]
                value = entry.get("value", 0.0)
                if isinstance(value, float) and not math.isfinite(value):
                    errors.append("model-index: a value is not finite")
        if not isinstance(result.get("metrics"), list) or not result["metrics"]:
            errors.append("model-index: no metrics")
    return errors
