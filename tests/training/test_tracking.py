"""What a run shows and writes of its figures."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.launch import Launch
from p2p_llm_forge.training import tracking as tracking_module
from p2p_llm_forge.training.identity import claim
from p2p_llm_forge.training.run_record import RunRecord
from p2p_llm_forge.training.tracking import (
    METRICS,
    Elsewhere,
    Silent,
    Tracking,
    introduction,
    keep_metrics_until,
    line_of,
    tracker_names,
    tracking_of,
)
from tests.waiting import wait_until


class Accelerator:
    """Notes what trackers are given."""

    def __init__(self):
        self.logged = []

    def init_trackers(self, name, config, init_kwargs):
        self.settings = config

    def log(self, values, step):
        self.logged.append((step, values))

    def end_training(self):
        self.logged.append("end")


@pytest.fixture
def cluster():
    return SimpleNamespace(accelerator=Accelerator())


@pytest.fixture
def tracking(tmp_path, cluster):
    return Tracking(TrainConfig(output_dir=str(tmp_path), report_to="none"), cluster)


@pytest.mark.parametrize(
    ("launch", "kind"),
    [
        (Launch(rank=1, world_size=2, master_addr="10.0.0.1"), Elsewhere),
        (
            Launch(rank=3, world_size=4, local_rank=1, local_world_size=2, master_addr="10.0.0.1"),
            Silent,
        ),
        (
            Launch(rank=1, world_size=4, local_rank=1, local_world_size=2, master_addr="10.0.0.1"),
            Silent,
        ),
        (Launch(rank=1, world_size=2, master_addr="127.0.0.1"), Silent),
        (Launch(), Tracking),
    ],
    ids=["another machine", "second there", "second of main", "this machine", "alone"],
)
def test_every_machine_but_the_main_one_shows_that_it_trains(launch, kind, cluster, capsys):
    cluster.launch, cluster.is_main = launch, launch.rank == 0
    shown = tracking_of(TrainConfig(report_to="none"), cluster)
    assert type(shown) is kind
    if kind is not Tracking:
        shown.finish()
        assert capsys.readouterr().out == "", "it has not begun"
        shown.start(10, 1500)
        for _ in range(7):
            shown.step()
        shown.say("only rank 0 says this")
        shown.finish()
        assert capsys.readouterr().out.splitlines() == [
            "rank 1 of 2 trains with rank 0 at 10.0.0.1, where the progress is shown (1,490"
            " updates)",
            "rank 1 of 2 took part in 7 updates; figures and model are with rank 0 at 10.0.0.1",
        ] * (kind is Elsewhere)


def lines(folder):
    return [json.loads(line) for line in (folder / METRICS).read_text().splitlines()]


def test_metrics_are_written_at_once_and_shown(tracking, tmp_path, capsys):
    tracking.start(0, 10)
    tracking.step()
    tracking.log({"step": 1, "loss": 2.5, "tokens_per_second": 1234.4})
    assert lines(tmp_path) == [{"step": 1, "loss": 2.5, "tokens_per_second": 1234.4}]
    tracking.log({"step": 2, "loss": 2.25})  # written, but shown at most every few seconds
    tracking.log({"step": 2, "eval_loss": 2.0})
    tracking.say("a word")
    tracking.finish()
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 2]
    assert capsys.readouterr().out.splitlines() == [
        "step 1/10  loss 2.5000  tokens_per_second 1,234",
        "step 2/10  eval_loss 2.0000",
        "a word",
    ]


def test_a_line_says_how_well_the_hardware_is_used_and_when_the_run_ends(tracking, capsys):
    tracking.start(0, 10)
    used = {"mfu": 0.4125, "memory_peak_bytes": 1_234_000_000, "seconds": 61.0}
    tracking.log({"step": 4, "loss": 2.5, **used, "seconds_left": 7859.0})
    tracking.finish()
    assert capsys.readouterr().out.splitlines() == [
        "step 4/10  loss 2.5000  MFU 41.2%  memory 1.23 GB  after 1 min 1 s"
        "  ends in about 2 h 10 min",
    ]


def test_steps_that_come_again_and_torn_lines_are_dropped(tmp_path):
    file = tmp_path / METRICS
    keep_metrics_until(file, 0)
    assert not file.exists()
    whole = "".join(json.dumps({"step": step}) + "\n" for step in (1, 2, 3, 4))
    file.write_text(whole + '{"other": 1}\nno json\n' + '{"step": 1}')
    keep_metrics_until(file, 3)
    assert [line["step"] for line in lines(tmp_path)] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    "line",
    [
        *(b"[]", b"7", b"null", b'{"step": null}', b'{"step": "1"}', b'{"step": true}'),
        *(b'{"step": -1}', b'{"step": 1.0}', b'{"step": NaN}', b"[" * 100_000, bytes(range(256))),
        b'{"step": ' + b"1" * 5000 + b"}",
    ],
    ids=lambda line: ascii(line[:12]),
)
def test_damaged_lines_are_dropped_and_the_others_kept(tmp_path, line):
    (tmp_path / METRICS).write_bytes(b'{"step": 1}\n' + line + b'\n{"step": 2, "loss": 1.5}\n')
    keep_metrics_until(tmp_path / METRICS, 2)
    assert lines(tmp_path) == [{"step": 1}, {"step": 2, "loss": 1.5}]


@pytest.mark.parametrize("report_to", ["none", "tensorboard"])
def test_only_what_tensorboard_has_opened_is_put_on_record(tmp_path, report_to):
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    claim(tmp_path, {})
    diary = tmp_path / "runs" / "user" / "events.out.tfevents.1.user"
    diary.parent.mkdir(parents=True)
    diary.write_text("mine")
    config = TrainConfig(output_dir=str(tmp_path), report_to=report_to)
    accelerator = Accelerator(cpu=True, project_dir=str(tmp_path))
    tracking = Tracking(config, SimpleNamespace(accelerator=accelerator))
    try:
        tracking.start(0, 3)
        tracking.log({"step": 1, "loss": 2.0})
        tracking.finish()
    finally:
        AcceleratorState._reset_state(True)
    there = {p.relative_to(tmp_path).as_posix() for p in tmp_path.rglob("*") if p.is_file()}
    there -= {"run.json", "runs/user/events.out.tfevents.1.user"}
    to_come = {"samples.jsonl", "loss.png", "peers.png"}  # of other parts of a run
    assert RunRecord.read(tmp_path).wrote == there | to_come
    assert (len(there) > 1) == (report_to == "tensorboard")
    claim(tmp_path, {}, overwrite=True)
    assert [path for path in (tmp_path / "runs").rglob("*") if path.is_file()] == [diary]
    assert diary.read_text() == "mine"


def test_a_resumed_run_writes_after_the_lines_of_the_one_before(tracking, tmp_path):
    (tmp_path / METRICS).write_text('{"step": 1}\n{"step": 2}\n')
    tracking.start(1, 4)
    tracking.log({"step": 2, "loss": None})
    tracking.finish()
    assert lines(tmp_path) == [{"step": 1}, {"step": 2, "loss": None}]


def test_trackers_get_the_settings_and_the_numbers(tmp_path, cluster):
    config = TrainConfig(output_dir=str(tmp_path), report_to="tensorboard", max_steps=3)
    tracking = Tracking(config, cluster)
    tracking.start(0, 3)
    tracking.log({"step": 1, "loss": None, "grad_norm": 0.5, "shares": [1, 2]})
    tracking.finish()
    accelerator = cluster.accelerator
    assert [str(kind) for kind in accelerator.log_with] == ["tensorboard"]
    assert accelerator.settings["max_steps"] == 3
    assert {type(value) for value in accelerator.settings.values()} <= {bool, int, float, str}
    blocks = {"peers/blocks_of_rank_0": 1, "peers/blocks_of_rank_1": 2}
    assert accelerator.logged == [(1, {"train/grad_norm": 0.5, **blocks}), "end"]


def test_the_network_is_shown_where_something_was_sent():
    metrics = {"step": 3, "loss": 1.0, "communication": 0.25, "bytes_sent_per_update": 1.5e6}
    assert line_of(metrics) == "loss 1.0000  communication 25.0%, 1.50 MB/step"
    assert line_of({**metrics, "bytes_sent_per_update": 0}) == "loss 1.0000"


@pytest.mark.parametrize(
    ("shares", "words"),
    [([4, 4], "8 blocks, 4 on each of 2 process(es)"), ([5, 3], "8 blocks, 5 + 3 on 2 processes")],
)
def test_the_introduction_says_who_takes_how_much(shares, words):
    import torch

    cluster = SimpleNamespace(
        world_size=2, device=torch.device("cpu"), accelerator=SimpleNamespace(mixed_precision="no")
    )
    splits = {"train": SimpleNamespace(blocks=1000)}
    manifest = SimpleNamespace(
        splits=splits, sequence_length=32, vocab_size=300, conversations=None
    )
    plan = SimpleNamespace(total_steps=6, batch_size=8, shares=shares, micro_batch_size=4)
    lm = torch.nn.Linear(1000, 1000, bias=False)
    lm.config = SimpleNamespace(model_type="gpt2")
    text = introduction(cluster, SimpleNamespace(manifest=manifest), plan, lm)
    assert "gpt2, 1.00 M parameters" in text
    assert "1,000 blocks of 32 tokens, vocabulary 300" in text
    assert words in text


def test_unknown_and_missing_trackers_are_refused_all_at_once(monkeypatch):
    monkeypatch.setattr(tracking_module, "get_available_trackers", lambda: ["tensorboard"])
    assert tracker_names("none") == []
    assert tracker_names("tensorboard, none") == ["tensorboard"]
    with pytest.raises(ForgeError) as error:
        tracker_names("tensorbord,wandb")
    unknown, missing = error.value.problems
    assert unknown.found == "--report-to tensorbord: no such tracker"
    assert "tensorboard" in unknown.fix
    assert missing.found == "--report-to wandb: it is not installed"
    assert missing.fix.startswith("pip install wandb")


def test_the_other_ranks_show_nothing(capsys):
    silent = Silent()
    silent.start(0, 3)
    silent.step()
    silent.log({"step": 1})
    silent.say("nothing")
    silent.finish()
    assert capsys.readouterr() == ("", "")


def run_with(report_to, folder, resume_at=0):
    """Figures and samples of a session, given to a tracker."""
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState

    config = TrainConfig(output_dir=str(folder), report_to=report_to)
    accelerator = Accelerator(cpu=True, project_dir=str(folder))
    tracking = Tracking(config, SimpleNamespace(accelerator=accelerator))
    try:
        tracking.start(resume_at, 4)
        for step in range(resume_at + 1, resume_at + 3):
            tracking.log({"step": step, "loss": 3.0 / step, "tokens_per_second": 100.0})
            tracking.log({"step": step, "eval_loss": 2.0 / step, "bits_per_byte": None})
            tracking.texts(step, {"samples/1": "The ferry – goes"})
        tracking.finish()
    finally:
        AcceleratorState._reset_state(True)


def test_tensorboard_shows_groups_and_samples(tmp_path, capsys):
    run_with("tensorboard", tmp_path)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = {}
    for file in (tmp_path / "runs").rglob("events.out.tfevents.*"):
        events = EventAccumulator(str(file)).Reload()
        for name in events.Tags()["scalars"]:
            found[name] = [(event.step, event.value) for event in events.Scalars(name)]
        for name in events.Tags()["tensors"]:
            found[name] = [bytes(e.tensor_proto.string_val[0]) for e in events.Tensors(name)]
    assert found["train/loss"] == [(1, 3.0), (2, 1.5)]
    assert found["eval/loss"] == [(1, 2.0), (2, 1.0)]
    assert found["peers/tokens_per_second"] == [(1, 100.0), (2, 100.0)]
    assert "The ferry – goes".encode() in found["samples/1/text_summary"]
    assert "warning" not in capsys.readouterr().out


def test_trackio_has_every_figure_also_of_a_second_session(tmp_path, monkeypatch, capsys):
    """Where nothing is to be reached: it writes a database on this machine."""
    pytest.importorskip("trackio", reason="pip install --group dev")
    import sqlite3

    import trackio.sqlite_storage
    import trackio.utils

    for module in (trackio.utils, trackio.sqlite_storage):
        monkeypatch.setattr(module, "TRACKIO_DIR", tmp_path / "trackio")
    (tmp_path / "x").mkdir()
    run_with("trackio", tmp_path / "x")
    run_with("trackio", tmp_path / "x", resume_at=2)
    (file,) = (tmp_path / "trackio").rglob("runs.db")
    with sqlite3.connect(file) as database:
        rows = database.execute("select step, metrics from metrics order by step").fetchall()
    found = [(step, json.loads(text)) for step, text in rows]
    losses = [(step, one["train/loss"]) for step, one in found if "train/loss" in one]
    assert losses == [(1, 3.0), (2, 1.5), (3, 1.0), (4, 0.75)]
    assert any(one.get("samples/1") == "The ferry – goes" for _, one in found)
    assert "warning" not in capsys.readouterr().out


def test_wandb_writes_a_run_without_a_network(tmp_path, monkeypatch, capsys):
    pytest.importorskip("wandb", reason="pip install --group dev")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("WANDB_MODE", "offline")
    (tmp_path / "x").mkdir()
    run_with("wandb", tmp_path / "x")
    (file,) = tmp_path.rglob("run-*.wandb")
    words = (b"train/loss", b"eval/loss", b"peers/tokens_per_second", b"The ferry")
    # Its service writes it after the run has finished.
    wait_until(lambda: all(word in file.read_bytes() for word in words))
    assert "warning" not in capsys.readouterr().out


# --- from the first update on ---------------------------------------------------------------------


def test_the_first_update_is_shown_and_then_what_is_silent_for_long(
    tracking, tmp_path, monkeypatch, capsys
):
    import torch

    now = [1000.0]
    monkeypatch.setattr(tracking_module.time, "monotonic", lambda: now[0])
    tracking.start(20, 120, began=980.0)
    for number in range(1, 13):
        now[0] += 4.0
        tracking.step(torch.tensor(64.0 * number), 32)
        if number == 10:
            tracking.log({"step": 30, "loss": 11.5, "tokens_per_second": 8.0})
    assert capsys.readouterr().out.splitlines() == [
        "step 21/120  loss 2.0000  after 24 s  ends in about 6 min 36 s",
        "step 24/120  loss 8.0000  after 36 s  ends in about 6 min 24 s",
        "step 27/120  loss 14.0000  after 48 s  ends in about 6 min 12 s",
        "step 30/120  loss 11.5000  tokens_per_second 8.0000",
    ]
    assert [line["step"] for line in lines(tmp_path)] == [30], "a single update is no figure"
    now[0] += 4.0
    tracking.step(torch.tensor(0.0), 0)  # a rank without blocks of this update


def test_the_bar_shows_a_loss_from_the_first_update_on(tracking, monkeypatch, capsys):
    import sys

    import torch

    monkeypatch.setattr(sys.stderr, "isatty", lambda: True, raising=False)
    tracking.start(0, 100)
    tracking.step(torch.tensor(96.0), 32)
    tracking.finish()
    shown = capsys.readouterr().err
    assert "loss 3.0000" in shown and "1/100" in shown and "<" in shown, "elapsed<remaining"
