"""A run of adapters from its first update to what is made of it, by all scripts."""

from __future__ import annotations

import re
import shutil

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoModelForCausalLM

from tests.multiprocess.adapters import LORA, prepare_other_text, train_base
from tests.runs import finish, flags, loaded, read, results
from tests.training.hub_metadata import errors_in

pytestmark = pytest.mark.slow
OFFLINE = {"HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}


@pytest.fixture(scope="module")
def adapted(one_zygote, prepared, tmp_path_factory):
    """A trained model, another text, and a run of adapters."""
    folder = tmp_path_factory.mktemp("adapted")
    base = train_base(one_zygote, prepared, folder / "base")
    data = prepare_other_text(folder / "other", prepared / "tokenizer")
    return base, data, finish(one_zygote, data, folder / "run", 1, **asked(base))


def asked(base, **settings):
    return {**LORA, "model_name": base, "max_steps": 20, "save_every": 10, **settings}


@pytest.fixture
def done(zygote, tmp_path):
    """The status of a script, and what it prints."""
    log = tmp_path / "printed.log"

    def run(script, *words):
        log.unlink(missing_ok=True)
        pid = zygote.start([str(word) for word in words], log, OFFLINE, script=script)
        return zygote.wait(pid), log.read_text()

    return run


@pytest.fixture
def own(adapted, tmp_path):
    """A copy of the run, to be changed."""
    return shutil.copytree(adapted[2], tmp_path / "run")


def logits_of(folder):
    """By transformers, with peft where it asks for it."""
    lm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return lm(input_ids=torch.arange(24).unsqueeze(0)).logits


def test_the_folder_is_used_by_every_script_as_by_transformers(adapted, done, tmp_path):
    base, data, folder = adapted
    assert not (folder / "model.safetensors").exists()
    assert (logits_of(folder) - logits_of(base)).abs().max() > 0.1
    lm = AutoModelForCausalLM.from_pretrained(folder).eval()
    shown = ("--prompt", "Ines reads", "--temperature", 0, "--max-new-tokens", 12)
    status, text = done("generate", folder, *shown, "--chat", "off")
    assert status == 0, text
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    end = tokenizer.eos_token_id
    tokens = [end, *tokenizer.encode("Ines reads")]
    with torch.no_grad():
        for _ in range(12):
            tokens.append(int(lm(torch.tensor([tokens])).logits[0, -1].argmax()))
    expected = tokenizer.decode(tokens[1:]).split("<|endoftext|>")[0]
    assert text.strip() == expected.strip()

    same = ("--dataset-path", data, "--eval-only", "--cpu-threads", 1, "--report-to", "none")
    for words in (("--output-dir", folder), ("--model-name", folder)):
        status, text = done("train", *same, *words)
        assert status == 0, text
        figure = float(re.search(r"held out +loss ([\d.]+)", text)[1])
        assert figure == pytest.approx(results(folder)["eval_loss"], abs=1e-4)
    status, text = done("export", folder, "--output-file", tmp_path / "adapters.gguf")
    assert status == 0 and (tmp_path / "adapters.gguf").read_bytes()[:4] == b"GGUF", text
    # All weights of what base and adapters make are trained on as those of any model.
    words = flags(data, tmp_path / "on", **asked(folder, lora_rank=None, lora_targets=None))
    status, text = done("train", *words)
    assert status == 0 and (tmp_path / "on" / "model.safetensors").exists(), text


def test_merging_publishes_the_whole_model_and_can_be_undone(adapted, own, done, tmp_path):
    base, data, _ = adapted
    before = logits_of(own)
    words = flags(data, own, **asked(base))
    status, text = done("train", *words, "--merge-lora")
    assert status == 0, text
    assert not [path.name for path in own.glob("*") if "adapter" in path.name]
    assert not list(own.glob("tmp-*")) and not (own / "base_model.json").exists()
    assert torch.allclose(logits_of(own), before, rtol=0, atol=1e-5)
    assert {*loaded(own / "model.safetensors")} == {*loaded(base / "model.safetensors")}
    assert results(own)["is_published"]
    assert errors_in((own / "README.md").read_text()) == []
    assert "peft" not in (own / "README.md").read_text().split("## Model")[0]

    status, text = done("train", *words, "--merge-lora")
    assert status == 0 and "finished already" in text
    status, text = done("train", *words)
    assert status == 0 and (own / "adapter_config.json").exists(), text
    assert not (own / "model.safetensors").exists() and not (own / "config.json").exists()
    assert torch.equal(logits_of(own), before)


def test_the_card_says_that_it_needs_its_base(adapted):
    base, _, folder = adapted
    card = (folder / "README.md").read_text()
    assert errors_in(card) == [] and "library_name: peft" in card
    assert "peft must be installed, and their base is loaded with them" in card
    assert "rank 4, alpha 8, in c\\_attn" in card or "rank 4, alpha 8, in c_attn" in card
    assert "lora_rank: 4" in card and str(base) not in card


def test_another_run_is_refused_and_the_fixes_are_true(adapted, own, done, tmp_path):
    base, data, _ = adapted
    for changed, found in (
        ({"lora_rank": 8, "lora_alpha": 8}, "lora_rank: the run has 4, asked was 8"),
        ({"lora_rank": None, "lora_targets": None}, "lora_rank: the run has 4, asked was none"),
        ({"lora_targets": "auto"}, "lora_targets: the run has"),
    ):
        words = flags(data, own, **asked(base, **changed))
        status, text = done("train", *words)
        assert status == 2 and "Traceback" not in text
        assert found.lower() in text.lower().replace("null", "none"), text
    # Checkpoints that are named, of the other kind.
    other = {"resume": own / "checkpoint-10", "max_steps": 12}
    words = flags(data, tmp_path / "new", **asked(base, lora_rank=None, lora_targets=None, **other))
    status, text = done("train", *words)
    assert status == 2 and "holds adapters (LoRA), and this run trains all weights" in text
    assert "add the --lora-rank that they were trained with" in text
    status, text = done("train", *flags(data, tmp_path / "new", **asked(base, **other)))
    assert status == 0, text
    whole = {"resume": base / "checkpoint-60", "max_steps": 70}
    status, text = done("train", *flags(data, tmp_path / "next", **asked(base, **whole)))
    assert status == 2 and "holds a whole model, and this run trains adapters" in text


def test_a_base_that_has_changed_is_refused_at_a_resume_and_by_every_script(
    adapted, done, tmp_path
):
    base, data, folder = adapted
    own = shutil.copytree(base, tmp_path / "base")
    first = finish_by(done, data, tmp_path / "run", asked(own, max_steps=4))
    kept = (own / "model.safetensors").read_bytes()
    changed = loaded(own / "model.safetensors")
    name = min(changed)
    changed[name] = changed[name] + 1
    save_file(changed, own / "model.safetensors", metadata={"format": "pt"})
    words = flags(data, first, **asked(own, max_steps=8, lr_scheduler="constant"))
    for script, given in (("train", words), ("generate", [first]), ("export", [first])):
        status, text = done(script, *given)
        assert status == 2 and "belong to other weights than those of the base" in text, text
        assert "Traceback" not in text
    (own / "model.safetensors").write_bytes(kept)  # as the fix says
    status, text = done("train", *words)
    assert status == 0, text


def finish_by(done, data, folder, settings):
    status, text = done("train", *flags(data, folder, **settings))
    assert status == 0, text
    return folder


def test_a_dry_run_says_what_is_trained_and_writes_nothing(adapted, done, tmp_path):
    base, data, _ = adapted
    words = flags(data, tmp_path / "dry", **asked(base))
    status, text = done("train", *words, "--dry-run")
    assert status == 0 and "no text reaches" not in text, text
    assert re.search(r"LoRA +of rank 4, alpha 8, in .*: 4,096 of 40,192 parameters", text), text
    assert not (tmp_path / "dry").exists()


def test_a_run_by_the_clock_trains_adapters(zygote, adapted, tmp_path):
    base, data, _ = adapted
    settings = {"max_steps": None, "minutes": 0.3, "learning_rate": None, "merge_lora": True}
    settings |= {"warmup_steps": None, "lr_scheduler": None, "batch_size": None}
    folder = finish(zygote, data, tmp_path / "run", 1, **asked(base, **settings))
    assert (folder / "model.safetensors").exists() and results(folder)["steps"] > 3
    assert "adapters" not in read(folder.with_suffix(".log"))
