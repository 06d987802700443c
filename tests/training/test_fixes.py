"""What is said to be wrong with data and batches is fixed as it is said; then a run can begin."""

from __future__ import annotations

import re
import shlex
import shutil
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest

from p2p_llm_forge.config import PrepareConfig, parse
from p2p_llm_forge.data.dataset import open_prepared
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training.job import Job, open_job, refuse_different_data
from p2p_llm_forge.training.run_record import RunRecord
from prepare_data import prepare
from tests.memory_channel import clusters, run_ranks

BATCHES = [
    (
        {"batch_size": 7, "micro_batch_size": 2, "gradient_accumulation_steps": 2},
        r"^leave --batch-size out, or use (4)$",
        {"micro_batch_size": 2, "gradient_accumulation_steps": 2},
    ),
    ({"batch_size": 7, "micro_batch_size": 2}, r"^use (6) or (8)$", {"micro_batch_size": 2}),
]


def fix_of(act, *of, **named):
    with pytest.raises(ForgeError) as refused:
        act(*of, **named)
    return refused.value.problems[0].fix


@pytest.mark.parametrize(("sizes", "fix", "then"), BATCHES, ids=["accumulation", "micro-batch"])
def test_the_fix_of_a_batch_is_one_that_can_be_divided(open_small_job, sizes, fix, then):
    said = re.search(fix, fix_of(open_small_job, **sizes))
    for number in (None, *map(int, said.groups())):
        batch = open_small_job(**{**then, "batch_size": number}).plan.batch_size
        assert number is None or batch == number


def test_the_fixes_of_a_batch_with_fewer_blocks_than_processes_let_the_run_go_on(config):
    """As where a third peer joins an elastic launch, or a run resumes with one more."""

    def opened(count, **settings):
        asked = replace(config, **settings)
        with clusters(count, is_elastic=True) as ranks:
            jobs = run_ranks(ranks, partial(open_job, asked))
            run_ranks(jobs, Job.refuse_another_run)
        return jobs[0]

    begun = opened(1, batch_size=2)
    Path(config.output_dir).mkdir()
    RunRecord(begun.identity()).write(begun.output_dir)
    for batch_size in (None, 2):
        same = {"batch_size": batch_size, "resume": "auto"}
        fix = fix_of(opened, 3, **same)
        said = re.fullmatch(
            r"start at most (\d+) processes, or add --batch-size (\d+) --resume-changed on all"
            r" machines",
            fix,
        )
        most, larger = map(int, said.groups())
        assert opened(most, **same).plan.shares == [1, 1]
        changed = {**same, "batch_size": larger, "resume_changed": True}
        assert opened(3, **changed).plan.batch_size == larger >= 3
    accumulated = {"batch_size": None, "gradient_accumulation_steps": 4, "resume": "auto"}
    larger = int(re.search(r"--batch-size (\d+)", fix_of(opened, 3, **accumulated))[1])
    changed = {**accumulated, "batch_size": larger, "resume_changed": True}
    assert opened(3, **changed).plan.batch_size == larger


def test_the_fixes_of_a_text_are_to_prepare_it_or_no_dry_run(open_small_job, text_file, tmp_path):
    assert fix_of(open_small_job, dataset_path="no.txt") == "give a text or a folder"
    text = {"dataset_path": str(text_file)}
    fix = fix_of(open_small_job, **text, dry_run=True)
    line = re.fullmatch(
        r"prepare it first: python prepare_data.py (.+); then give --dataset-path PREPARED, or"
        r" leave --dry-run out",
        fix,
    )[1]
    folder = str(tmp_path / "prepared by itself")
    typed = [folder if word == "PREPARED" else word for word in shlex.split(line)]
    prepare(parse(PrepareConfig, typed, "prepare_data.py"))
    assert open_small_job(dataset_path=folder, dry_run=True)
    assert open_small_job(**text)


def test_the_fixes_of_flags_of_texts_leave_them_out_or_prepare_again(
    open_small_job, text_file, tmp_path
):
    again = {"dataset_path": [str(text_file)], "sequence_length": 32, "vocab_size": 300}
    fix = fix_of(open_small_job, sequence_length=48)
    assert fix.startswith("leave the flag out, or prepare the data again")
    prepare(PrepareConfig(**{**again, "sequence_length": 48}, output_dir=str(tmp_path / "48")))
    assert open_small_job(dataset_path=str(tmp_path / "48"), sequence_length=48)
    fix = fix_of(open_small_job, vocab_size=290)
    assert fix.startswith("leave the flag out, or prepare the text again: ")
    (size,) = re.findall(r"prepare_data.py --vocab-size (\d+)", fix)
    prepare(PrepareConfig(**{**again, "vocab_size": int(size)}, output_dir=str(tmp_path / "290")))
    assert open_small_job(dataset_path=str(tmp_path / "290"), vocab_size=290)
    assert open_small_job()


def test_the_fix_of_other_data_is_a_copy_of_those_of_rank_0(prepared, text_file, tmp_path):
    folder = tmp_path / "of rank 1"
    prepare(
        PrepareConfig(
            dataset_path=[str(text_file)],
            output_dir=str(folder),
            vocab_size=300,
            sequence_length=16,
        )
    )

    def act(cluster):
        refuse_different_data(cluster, open_prepared(folder if cluster.rank else prepared))

    def refused(cluster):
        return fix_of(act, cluster)

    with clusters(2) as ranks:
        for fix in run_ranks(ranks, refused):
            assert fix == "copy rank 0's folder to the machine of rank 1, or share it"
    shutil.rmtree(folder)
    shutil.copytree(prepared, folder)
    with clusters(2) as ranks:
        run_ranks(ranks, act)
