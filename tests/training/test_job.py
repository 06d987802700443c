"""What a run is asked for is settled once: its data, and the plan of its updates."""

from __future__ import annotations

import gzip
import re
import shlex
from dataclasses import replace

import pytest

import prepare_data
from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import job as jobs
from p2p_llm_forge.training.identity import claim
from p2p_llm_forge.training.job import make_plan, open_job
from p2p_llm_forge.training.planner import LEAST_BYTES
from prepare_data import prepare
from tests import ROOT
from tests.data.talks import rows, saved, talking_tokenizer, write
from tests.memory_channel import clusters, run_ranks


def test_by_the_clock_a_vocabulary_that_is_given_is_kept_and_a_packed_text_is_not_short(
    config, alone, tmp_path
):
    text = (ROOT / "data" / "sample_corpus.txt").read_bytes()[:18_000]
    (tmp_path / "text.txt.gz").write_bytes(packed := gzip.compress(text))
    assert len(packed) < LEAST_BYTES
    given = {"dataset_path": str(tmp_path / "text.txt.gz"), "sequence_length": None}
    config = replace(config, minutes=1.0, max_steps=None, **given)
    job = open_job(replace(config, vocab_size=300, output_dir=str(tmp_path / "a")), alone)
    assert job.data.manifest.arguments["vocab_size"] == 300
    job = open_job(replace(config, output_dir=str(tmp_path / "b")), alone)
    assert job.data.manifest.arguments["vocab_size"] == 512


def test_a_text_that_is_prepared_already_keeps_what_was_chosen_for_it(open_small_job, text_file):
    text = {"dataset_path": str(text_file), "sequence_length": 48}
    assert open_small_job(**text, vocab_size=290).data.manifest.sequence_length == 48
    again = open_small_job(**{**text, "sequence_length": None}, eval_only=True).data.manifest
    assert (again.sequence_length, again.arguments["vocab_size"]) == (48, 290)
    with pytest.raises(ForgeError, match="sequence_length: 48 there, 24 asked"):
        open_small_job(**{**text, "sequence_length": 24})


def test_a_text_that_is_prepared_already_keeps_what_an_older_version_held_out(
    open_small_job, text_file, monkeypatch
):
    text = {"dataset_path": str(text_file), "sequence_length": 48, "vocab_size": 290}
    with monkeypatch.context() as older:
        older.setattr(PrepareConfig, "validation_fraction", 0.1)
        assert open_small_job(**text).data.manifest.arguments["validation_fraction"] == 0.1
    again = open_small_job(**text, eval_only=True).data.manifest
    assert again.arguments["validation_fraction"] == 0.1


def test_a_file_of_conversations_is_prepared_by_the_template_of_its_tokenizer(
    open_small_job, tmp_path, capsys
):
    words = saved(talking_tokenizer(), tmp_path / "words")
    talks = write(tmp_path / "talks.jsonl", [*rows(60), {"messages": []}])
    asked = {"dataset_path": str(talks), "tokenizer": str(words), "sequence_length": 64}
    with pytest.raises(ForgeError, match="line 61: 'messages' is an empty list") as error:
        open_small_job(**asked)
    # What the fix says: by itself, with that flag.
    assert "--skip-bad-rows" in (fix := error.value.problems[0].fix)
    command = shlex.split(fix.partition("python prepare_data.py ")[2].partition(", and then")[0])
    prepared = tmp_path / "by itself"
    command[command.index("PREPARED")] = str(prepared)
    assert prepare_data.main([*command, "--skip-bad-rows"]) == 0
    write(talks, rows(60))
    job = open_small_job(**asked)
    assert "written by the tokenizer's chat template" in capsys.readouterr().out
    assert job.data.train_blocks().is_of_conversations
    by_itself = open_small_job(dataset_path=str(prepared), sequence_length=64)
    assert replace(by_itself.data.manifest, skipped_rows=0).fingerprint == (
        job.data.manifest.fingerprint
    )


def test_a_job_holds_the_data_and_the_plan(open_small_job, prepared):
    job = open_small_job()
    assert job.data.path == prepared
    assert (job.plan.batch_size, job.plan.total_steps, job.plan.tokens_per_update) == (8, 6, 8 * 32)
    assert job.output_dir.name == "run" and not job.output_dir.exists()


def test_attention_ends_with_a_document_only_where_it_was_asked(open_small_job):
    assert open_small_job().document_end is None
    masked = open_small_job(document_mask=True)
    assert masked.document_end == masked.data.manifest.eos_token_id


def test_the_batch_of_a_run_stays_when_it_is_resumed_without_one(open_small_job):
    job = open_small_job(batch_size=20)
    claim(job.output_dir, job.identity())
    assert open_small_job(batch_size=None, resume="auto").plan.batch_size == 20
    assert open_small_job(batch_size=None).plan.batch_size == 16
    assert open_small_job(batch_size=10, resume="auto").plan.batch_size == 10


@pytest.mark.parametrize("resume", [(None, "auto"), ("auto", None)], ids=str)
def test_ranks_that_were_asked_otherwise_plan_by_what_rank_0_was_asked(open_small_job, resume):
    job = open_small_job(batch_size=20)
    claim(job.output_dir, job.identity())
    config = replace(job.config, batch_size=None)

    def batch_size(cluster):
        asked = replace(config, resume=resume[cluster.rank])
        return make_plan(asked, cluster, job.data).batch_size

    with clusters(2) as ranks:
        assert run_ranks(ranks, batch_size) == [20 if resume[0] else 16] * 2


def test_a_text_is_not_prepared_in_a_dry_run(open_small_job, text_file):
    with pytest.raises(ForgeError, match="--dry-run writes nothing") as error:
        open_small_job(dataset_path=str(text_file), dry_run=True)
    assert error.value.problems[0].fix.startswith("prepare it first: python prepare_data.py")


@pytest.mark.parametrize(
    "added",
    [["--document-separator", "\\n\\n"], ["--validation-fraction", "0"]],
    ids=lambda added: added[0],
)
def test_a_document_that_cannot_be_divided_has_a_fix_for_train_py(
    open_small_job, text_file, tmp_path, monkeypatch, added
):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my notes.md").write_text(text_file.read_text())
    asked = {"sequence_length": 32, "vocab_size": 300}
    with pytest.raises(ForgeError, match="too short") as error:
        open_small_job(dataset_path="my notes.md", **asked)
    (problem,) = error.value.problems
    assert " ".join(added) in problem.fix.replace("'", "")
    command = re.search(r"python prepare_data\.py (.*), and then train with (.*)$", problem.fix)
    assert prepare_data.main([*shlex.split(command[1]), *added]) == 0
    flag, folder = command[2].split()
    assert flag == "--dataset-path"
    job = open_small_job(dataset_path=folder, **asked)
    assert job.data.manifest.splits["train"].blocks > 1


@pytest.mark.parametrize(
    ("given", "flag"),
    [
        ({"tokenizer": "gpt2"}, "--tokenizer gpt2"),
        ({"vocab_size": 500}, "--vocab-size 500"),
        ({"encoding_errors": "replace"}, "--encoding-errors replace"),
    ],
    ids=str,
)
def test_flags_that_only_a_text_obeys_are_refused_beside_prepared_data(open_small_job, given, flag):
    with pytest.raises(ForgeError, match=f"{flag} is for a text file, and .* is prepared already"):
        open_small_job(**given)


def test_flags_that_the_data_were_made_with_may_stay(text_file, tmp_path, open_small_job, prepared):
    assert open_small_job(vocab_size=300).data.path == prepared  # as fixtures prepare it
    ready = prepared / "tokenizer"
    made = tmp_path / "made"
    prepare(PrepareConfig([str(text_file)], str(made), tokenizer=str(ready), sequence_length=32))
    for given in (str(ready), "tokenizer", None):
        assert open_small_job(dataset_path=str(made), tokenizer=given).data.path == made
    text = open_small_job(dataset_path=str(text_file), tokenizer=str(ready), sequence_length=32)
    assert text.data.manifest.tokenizer_fingerprint  # of a text the flag is obeyed
    assert (
        text.data.load_tokenizer().get_vocab() == open_small_job().data.load_tokenizer().get_vocab()
    )


def test_ranks_with_other_data_are_named(alone, open_small_job, monkeypatch):
    def gathered(facts):
        return [facts, {"data": "b" * 64, "path": "elsewhere"}, facts]

    data = open_small_job().data
    monkeypatch.setattr(alone, "gather_facts", gathered)
    with pytest.raises(ForgeError, match="rank 1 has other data .* in elsewhere") as error:
        jobs.refuse_different_data(alone, data)
    assert len(error.value.problems) == 1
    assert "copy rank 0's folder to the machine of rank 1" in error.value.problems[0].fix


def test_what_makes_a_run_is_in_its_identity(open_small_job):
    identity = open_small_job().identity()
    assert open_small_job(learning_rate=0.5, max_steps=9).identity() == identity
    for other in ({"seed": 1}, {"optimizer": "sgd"}, {"batch_size": 4}, {"document_mask": True}):
        assert open_small_job(**other).identity() != identity, other


def test_a_hint_about_a_models_tokenizer_speaks_of_the_flag_that_was_typed(config, alone, tmp_path):
    (tmp_path / "text.txt").write_text("The ferry left.\n\n" * 300)
    missing = str(tmp_path / "missing")
    given = {"dataset_path": str(tmp_path / "text.txt"), "output_dir": str(tmp_path / "run")}
    asked = replace(config, **given, model_type=None, depth=None, config_overrides=None)
    for flag, other in (("model_name", "--tokenizer"), ("tokenizer", "--model-name")):
        with pytest.raises(ForgeError) as error:
            open_job(replace(asked, **{flag: missing}), alone)
        (problem,) = error.value.problems
        assert f"--{flag.replace('_', '-')} {missing}" in problem.found
        assert other not in problem.found + problem.fix
