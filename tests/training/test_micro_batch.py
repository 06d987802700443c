"""`--micro-batch-size auto` takes what fits, and goes on with less where that was too much."""

from __future__ import annotations

import contextlib
import json
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.build import recompute_activations
from p2p_llm_forge.model.loss import NextTokenLoss
from p2p_llm_forge.peers.join import join
from p2p_llm_forge.training import micro_batch
from p2p_llm_forge.training.compilation import one_micro_batch
from p2p_llm_forge.training.job import open_job
from p2p_llm_forge.training.learner import build_learner, new_model
from p2p_llm_forge.training.micro_batch import (
    Memory,
    bytes_kept,
    kept_by,
    measured_memory,
    settle_micro_batch,
)
from p2p_llm_forge.training.plan import even_size
from p2p_llm_forge.training.run_folder import run_folder
from p2p_llm_forge.training.setup import set_up
from tests.memory_channel import clusters, run_ranks
from tests.runs import flags
from tests.training.machines import other_data
from tests.training.slow_models import too_small_for_more_than
from train import take_update


@pytest.mark.parametrize(
    ("share", "most", "size"), [(16, 16, 16), (16, 12, 8), (16, 7, 6), (5, 3, 3), (8, 1, 1)]
)
def test_a_share_is_cut_into_the_fewest_parts_of_one_size(share, most, size):
    assert even_size(share, most) == size
    assert -(-share // size) == -(-share // most)


def test_what_a_forward_keeps_is_counted_once_and_without_weights():
    weight = torch.nn.Parameter(torch.ones(8, 8))
    hidden = torch.ones(100, 8, requires_grad=True)

    def act():
        product = hidden @ weight  # keeps hidden, and the weight
        (product.sin() + product.cos()).sum().backward()  # keeps the product, twice

    assert bytes_kept(act) == 2 * 100 * 8 * 4


def test_memory_grows_with_blocks_and_less_so_with_checkpointing(config):
    with join(config) as cluster:
        job = open_job(config, cluster)
        model = build_learner(job, None).bare_model
        plain = measured_memory(job, model)
        kept = [bytes_kept(lambda n=n: one_micro_batch(job, model, n)) for n in (1, 4)]
        assert 2.5 * kept[0] < kept[1] < 4.5 * kept[0]
        assert plain.per_block > (kept[1] - kept[0]) / 3
        recompute_activations(model.lm)
        assert measured_memory(job, model).per_block < 0.7 * plain.per_block


@pytest.mark.parametrize(("blocks", "size"), [(1, 1), (3, 3), (7, 4), (100, 8)])
def test_as_many_blocks_are_taken_as_fit(config, monkeypatch, blocks, size):
    memory = Memory(
        free=(10 + blocks * 100 + 50) / micro_batch.USABLE_SHARE, fixed=10, per_block=100
    )
    assert memory.blocks_that_fit() == blocks
    monkeypatch.setattr(micro_batch, "measured_memory", lambda job, model: memory)
    asked = replace(config, micro_batch_size="auto")
    with join(asked) as cluster:
        assert build_learner(open_job(asked, cluster), None).micro_batch_size == size


def test_where_one_block_does_not_fit_what_would_is_said_and_fits(config, monkeypatch):
    asked = replace(config, micro_batch_size="auto")
    with join(asked) as cluster:
        job = open_job(asked, cluster)
        model = build_learner(job, None).bare_model
        need = measured_memory(job, model)
        # Room for half a block, which is enough for one whose activations are made again.
        free = (need.fixed + 0.6 * need.per_block) / micro_batch.USABLE_SHARE
        monkeypatch.setattr(micro_batch, "free_bytes", lambda device: free)
        with pytest.raises(ForgeError, match="not even one block of 32 tokens fits") as error:
            build_learner(job, None)
        fix = error.value.problems[0].fix
        assert fix.startswith("add --gradient-checkpointing, or prepare the data with")
        assert "--sequence-length 16" in fix
        checkpointed = replace(job, config=replace(asked, gradient_checkpointing=True))
        assert build_learner(checkpointed, None).micro_batch_size >= 1  # the fix, followed


@pytest.mark.skipif(sys.platform != "linux", reason="needs Linux: only it limits address space")
def test_what_a_process_may_not_take_is_seen(zygote, prepared, text_file, tmp_path):
    """For real: the system refuses the process what goes beyond a room."""
    short, found = other_data(text_file, tmp_path / "short", length=16), []
    for number, data in enumerate((prepared, short)):
        log = tmp_path / f"{number}.log"
        words = flags(data, tmp_path / f"run {number}", micro_batch_size="auto")
        pid = zygote.start(words, log, script="tests.training.little_room")
        assert zygote.wait(pid) == 0, log.read_text()
        said = log.read_text().splitlines()
        found.append([json.loads(line[5:]) for line in said if line.startswith("room ")])
    (size, refused, update_s), (_, size_of_short, _) = found
    assert size == 1 and 0 < update_s < 60  # of micro-batches of 2, where 8 are usual
    assert "not even one block of 32 tokens fits: it needs more than the 0.0" in refused
    assert "fix: prepare the data with --sequence-length 16, or take a smaller model" in refused
    assert size_of_short == 1  # the fix, followed


def settled(open_small_job, *suffices_for):
    """What each rank comes to, by the blocks that its memory suffices for."""
    job = open_small_job(micro_batch_size="auto")
    job = replace(job, plan=replace(job.plan, shares=[8 for _ in suffices_for]))
    models = [NextTokenLoss(new_model(job)).train() for _ in suffices_for]

    def act(cluster):
        cluster.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
        model = models[cluster.rank]
        model.register_forward_pre_hook(too_small_for_more_than(suffices_for[cluster.rank]))
        try:
            return settle_micro_batch(replace(job, cluster=cluster), model, None)
        except ForgeError as error:
            return error

    with clusters(len(suffices_for)) as ranks:
        return run_ranks(ranks, act)


@pytest.mark.parametrize("suffices_for", [(1,), (8, 1), (1, 8)])
def test_where_two_blocks_do_not_fit_on_a_rank_all_take_one(open_small_job, suffices_for):
    assert settled(open_small_job, *suffices_for) == [1 for _ in suffices_for]


def test_where_one_block_does_not_fit_on_a_rank_all_end_with_what_would_there(open_small_job):
    errors = settled(open_small_job, 8, 0.5)
    assert all(isinstance(one, ForgeError) for one in errors)
    (problem,), (same,) = (one.problems for one in errors)
    assert problem == same
    assert problem.where.startswith("rank 1 ")
    assert problem.found.startswith("--micro-batch-size auto: not even one block of 32 tokens fits")
    assert problem.fix.startswith("prepare the data with --sequence-length 16, or take a smaller")


def test_out_of_memory_leaves_nothing_behind_and_another_error_is_raised(open_small_job):
    job = open_small_job()
    job.cluster.accelerator = SimpleNamespace(autocast=contextlib.nullcontext)
    model = NextTokenLoss(new_model(job)).train()
    errors = [torch.OutOfMemoryError("CUDA out of memory"), ValueError("shapes do not match")]

    def fail(gradient):
        raise errors.pop(0)

    hook = next(model.parameters()).register_hook(fail)  # late in backward
    assert kept_by(job, model, (1, 32), 0) is None
    assert all(parameter.grad is None for parameter in model.parameters())
    with pytest.raises(ValueError, match="shapes"):
        kept_by(job, model, (1, 32), 0)
    hook.remove()
    assert kept_by(job, model, (1, 32), 0) > 0


def gradients_of_update(config, fail_at=None, error=None):
    """Summed loss, norm and the micro-batches of the first update; one forward may fail."""
    sizes = []
    with join(config) as cluster:
        job = open_job(config, cluster)
        with run_folder(job) as folder, set_up(job, folder) as run:

            def watch(model, inputs):
                sizes.append(len(inputs[0]))
                if len(sizes) == fail_at:
                    raise error

            run.learner.bare_model.register_forward_pre_hook(watch)
            update = take_update(run, 0)
            return float(update.nats), float(update.grad_norm), sizes, run


NO_MEMORY = RuntimeError(
    "[enforce fail at alloc_cpu.cpp:124] DefaultCPUAllocator: can't allocate memory"
)


@pytest.mark.parametrize("error", [NO_MEMORY, torch.OutOfMemoryError("CUDA out of memory")])
def test_an_update_that_memory_is_too_small_for_begins_again_in_smaller_parts(config, error):
    config = replace(config, micro_batch_size="auto")
    nats, norm, whole, _ = gradients_of_update(config)
    assert whole == [8]
    again = replace(config, output_dir=config.output_dir + "-again")
    same_nats, same_norm, sizes, run = gradients_of_update(again, fail_at=1, error=error)
    assert sizes == [8, 4, 4] and run.micro_batch_size == 4
    assert (same_nats, same_norm) == (pytest.approx(nats, rel=1e-5), pytest.approx(norm, rel=1e-4))


def test_a_half_done_update_is_not_counted_twice(config):
    config = replace(config, micro_batch_size="auto", batch_size=16)
    nats, norm, _, _ = gradients_of_update(config)
    again = replace(config, output_dir=config.output_dir + "-again")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(micro_batch, "even_size", lambda share, most: 4)
        same_nats, same_norm, sizes, _ = gradients_of_update(again, fail_at=3, error=NO_MEMORY)
    assert sizes == [4, 4, 4] + [2] * 8
    assert (same_nats, same_norm) == (pytest.approx(nats, rel=1e-5), pytest.approx(norm, rel=1e-4))


@pytest.mark.parametrize(
    ("size", "error"), [(8, NO_MEMORY), ("auto", RuntimeError("shapes do not match"))]
)
def test_what_was_asked_for_and_what_is_another_error_is_not_halved(config, size, error):
    config = replace(config, micro_batch_size=size)
    with pytest.raises((RuntimeError, ForgeError)) as raised:
        gradients_of_update(config, fail_at=1, error=error)
    assert "memory" in str(raised.value) if error is NO_MEMORY else raised.value is error


def test_a_resumed_run_goes_on_with_the_micro_batch_that_it_had_come_to(config):
    from p2p_llm_forge.training.micro_batch import recorded_size
    from p2p_llm_forge.training.run import Due

    config = replace(config, micro_batch_size="auto", resume="auto")
    with join(config) as cluster:
        job = open_job(config, cluster)
        with run_folder(job) as folder, set_up(job, folder) as run:
            assert run.micro_batch_size == 8
            take_update(run, 0)
            run.micro_batch_size = 2
            run.evaluate_and_save(1, Due(evaluate=False, save=True, stop=True))
            run.saving.finish()
        assert recorded_size(folder.path / "checkpoint-1") == 2
        with run_folder(job) as folder, set_up(job, folder) as run:
            assert (run.first_step, run.micro_batch_size) == (1, 2)
