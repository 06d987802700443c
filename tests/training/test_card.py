"""The model card: what the Hub reads of it, what a person does by it, and what it does not tell."""

from __future__ import annotations

import contextlib
import io
import re
from dataclasses import replace
from pathlib import Path

import pytest
import yaml
from huggingface_hub import ModelCard, ModelCardData

from p2p_llm_forge.config import TrainConfig, parse
from p2p_llm_forge.training.card import CardFacts, hub_name, model_card, title_of
from tests.runs import TINY
from tests.training.figures import BARE, FULL
from tests.training.hub_metadata import BLOCK, errors_in

FACTS = CardFacts(
    base_model="openai-community/gpt2",
    model={"family": "gpt2", "layers": 12},
    data={"name": "ferries.txt", "fingerprint": "ab" * 32},
    training={"machines": "2 machines, 2 processes: 2 x AMD EPYC (2 cores)"},
    recipe={"model_name": "openai-community/gpt2", "optimizer": "adamw", "mixed_precision": "no"},
    prompt='The "ferry"',
)
# Names that end a cell, a line, a block or the metadata, or are markup or YAML of their own.
HOSTILE = [
    *("a|b", "---", "a\n---\nlicense: mit", "x: [", "'", '"', "<img src=x>", "```", "[a](b)"),
    *("no", "1e5", "*", "\u202eabc", "a\x1b[31mb", "#", "{{x}}", "é" * 300, "&amp;", "\\"),
]


def test_the_hubs_own_library_reads_the_metadata(tmp_path):
    path = tmp_path / "README.md"
    path.write_text(model_card(FULL, FACTS))
    assert errors_in(path.read_text()) == []
    data = ModelCard.load(path).data
    assert isinstance(data, ModelCardData)
    assert data.base_model == "openai-community/gpt2" and data.base_model_relation == "finetune"
    assert data.library_name == "transformers" and data.pipeline_tag == "text-generation"
    assert data.tags == ["p2p-llm-forge"] and data.model_name == "mara"
    results = {one.metric_type: one for one in data.eval_results}
    values = {name: one.metric_value for name, one in results.items()}
    assert values == {"perplexity": 3.49, "bits_per_byte": 0.0, "accuracy": 0.5, "loss": 1.25}
    for one in results.values():
        assert one.task_type == "text-generation" and one.dataset_name == "ferries.txt"
        assert one.dataset_split == "validation" and one.dataset_args == {"fingerprint": "ab" * 32}


def test_an_estimate_is_called_one():
    card = model_card(replace(FULL, eval_blocks=512, eval_split_blocks=2000), FACTS)
    (index,) = yaml.safe_load(BLOCK.match(card)[2])["model-index"]
    names = [metric["name"] for metric in index["results"][0]["metrics"]]
    assert names and all(name.endswith(", of 512 blocks drawn out of 2,000") for name in names)
    whole = replace(FULL, eval_blocks=2000, eval_split_blocks=2000)
    assert "drawn" not in model_card(whole, FACTS)


def test_without_an_evaluation_there_is_no_index_and_without_a_base_none_is_named():
    card = model_card(BARE, replace(FACTS, base_model=None))
    assert errors_in(card) == []
    assert set(yaml.safe_load(BLOCK.match(card)[2])) == {"library_name", "pipeline_tag", "tags"}
    infinite = replace(FULL, perplexity=float("inf"))
    assert errors_in(model_card(infinite, FACTS)) == []


def test_the_card_tells_figures_sizes_data_machines_and_recipe():
    card = model_card(FULL, FACTS, ["loss.png", "peers.png"])
    for line in (
        *("# mara", "![loss](loss.png)", "![peers](peers.png)", "| layers | 12 |"),
        *("| eval_loss | 1.2500 |", "| steps | 1,200 |", "| seconds | 185.4000 (3 min 5 s) |"),
        *("| name | ferries.txt |", f"| fingerprint | {'ab' * 32} |"),
        "| machines | 2 machines, 2 processes: 2 x AMD EPYC (2 cores) |",
    ):
        assert f"\n{line}\n" in card, line
    assert "```text\nMara bakes\n```" in card
    assert ".png" not in model_card(FULL, FACTS)


@pytest.mark.parametrize("name", HOSTILE)
def test_a_name_or_a_sample_cannot_become_metadata_or_markup(name):
    facts = replace(FACTS, data={"name": name}, prompt=name, model={"family": name})
    odd = model_card(replace(FULL, output_dir=f"runs/{name}", sample=name), facts)
    plain = model_card(FULL, FACTS)
    assert errors_in(odd) == []
    keys = [set(yaml.safe_load(BLOCK.match(card)[2])) for card in (odd, plain)]
    assert keys[0] == keys[1]
    headings = [re.findall("^## .+$", card, re.MULTILINE) for card in (odd, plain)]
    assert headings[0] == headings[1]
    fences = [re.findall(r"^`{3,}\w+$", card, re.MULTILINE) for card in (odd, plain)]
    assert len(fences[0]) == len(fences[1])
    assert "\x1b" not in odd and "\u202e" not in odd
    assert not re.search(r"(?<!\\)[<\[]", odd.split("\n## Model")[1].split("\n## Training")[0])
    (code,) = re.findall(r"^```python\n(.*?)^```$", odd, re.MULTILINE | re.DOTALL)
    compile(code, "card", "exec")


def test_only_what_the_hub_has_is_named_as_the_model_that_it_began_from(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert hub_name(None) is None and hub_name("") is None
    assert hub_name("gpt2") == "gpt2" and hub_name("Qwen/Qwen3-0.6B") == "Qwen/Qwen3-0.6B"
    (tmp_path / "gpt2").mkdir()
    (tmp_path / "artifacts" / "demo").mkdir(parents=True)
    for path in ("gpt2", "artifacts/demo", "./gpt2", str(tmp_path), "..", "~/models/x", "C:\\x"):
        assert hub_name(path) is None, path
    cached = "/home/anna/.cache/huggingface/hub/models--openai-community--gpt2/snapshots/"
    assert hub_name(f"{cached}{'0' * 40}") == "openai-community/gpt2"
    assert hub_name(f"{cached}{'0' * 40}/") == "openai-community/gpt2"


def test_a_model_is_called_as_its_folder():
    assert title_of("artifacts/mara") == title_of("artifacts/mara/") == "mara"
    assert title_of(".") == Path.cwd().name
    assert title_of("/") == "model"


@pytest.fixture(scope="module")
def trained(prepared, tmp_path_factory):
    """A run that began from a folder of this machine."""
    from train import train

    where = tmp_path_factory.mktemp("of somebody")
    first = {**TINY, "batch_size": 8, "max_steps": 1, "report_to": "none", "cpu_threads": 1}
    train(TrainConfig(str(prepared), str(where / "first"), **first))
    second = {"model_name": str(where / "first"), "optimizer": "muon", "mixed_precision": "no"}
    second |= {"max_steps": 2, "batch_size": 4, "report_to": "none", "cpu_threads": 1}
    train(TrainConfig(str(prepared), str(where / "second"), **second))
    return where / "second"


def test_the_card_of_a_run_names_no_place_on_this_machine(trained):
    import platform

    card = (trained / "README.md").read_text()
    assert errors_in(card) == [] and "base_model" not in card
    assert "| began from | a model in a folder |" in card
    assert str(trained.parent) not in card and trained.parent.name not in card
    assert platform.node() not in card
    from safetensors.torch import load_file

    count = sum(one.numel() for one in load_file(trained / "model.safetensors").values())
    assert f"| parameters | {count:,} |" in card and "| width | 32 |" in card
    assert "1 machine, 1 process: 1 x " in card and "| torch | " in card


def test_its_python_block_loads_the_model_and_writes(trained, monkeypatch):
    card = (trained / "README.md").read_text()
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    monkeypatch.chdir(trained)
    with contextlib.redirect_stdout(io.StringIO()) as written:
        exec(code, {})
    assert written.getvalue().startswith("The")


def test_a_chat_models_card_asks_by_the_template():
    card = model_card(FULL, replace(FACTS, is_chat=True, prompt=""))
    (code,) = re.findall(r"^```python\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    asked = {}

    class Stub:
        def from_pretrained(self, folder):
            return self

        def apply_chat_template(self, messages, **how):
            asked.update(how, messages=messages)
            return {"input_ids": [[1]]}

        def generate(self, input_ids, **how):
            return input_ids

        def decode(self, tokens, skip_special_tokens):
            return "An answer."

    code = code.partition("\n\n")[2]  # without its import
    exec(code, {"AutoModelForCausalLM": Stub(), "AutoTokenizer": Stub()})
    assert asked["messages"] == [{"role": "user", "content": "Tell me a short story."}]
    assert asked["add_generation_prompt"] and asked["return_tensors"] == "pt"
    assert "generate.py MODEL --prompt 'Tell me a short story.'" in card


def test_its_recipe_is_one_for_train(trained, tmp_path):
    card = (trained / "README.md").read_text()
    (recipe,) = re.findall(r"^```yaml\n(.*?)^```$", card, re.MULTILINE | re.DOTALL)
    (tmp_path / "recipe.yaml").write_text(recipe)
    words = ["--config", str(tmp_path / "recipe.yaml"), "--dataset-path", "x", "--output-dir", "y"]
    config = parse(TrainConfig, words, "train.py")
    assert (config.optimizer, config.max_steps, config.batch_size) == ("muon", 2, 4)
    assert config.mixed_precision == "no" and config.model_name is None
