"""Pictures of a run: what they show, of which lines, and that they never cost a run anything."""

from __future__ import annotations

import io
import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from p2p_llm_forge.training import pictures as pictures_module
from p2p_llm_forge.training.pictures import (
    Pictures,
    between_lines,
    install_line,
    lines_in,
    pictures_of,
    restarts,
    smoothed,
)
from tests import ROOT

PNG = b"\x89PNG\r\n\x1a\n"
NEEDS = "pip install --group dev"


def a_line(step, seconds_of_update=0.5, **more):
    """A line of a session that began at 0, every update of which took as long."""
    line = {"step": step, "tokens": 100 * step, "tokens_per_second": 100 / seconds_of_update}
    line |= {"seconds": 7 + step * seconds_of_update, "learning_rate": 0.1 / step}
    return {**line, "loss": 9 / step, "communication": 0.25, "peers": 2, "shares": [3, 5], **more}


def lines_of_a_run(**more):
    return [a_line(step, **more) for step in range(10, 210, 10)]


def pixels(image):
    pytest.importorskip("matplotlib", reason=NEEDS)
    from PIL import Image

    assert image.startswith(PNG)
    return np.asarray(Image.open(io.BytesIO(image)).convert("RGB")).astype(int)


def has_colour(image, colour):
    """Whether a pixel is about of this colour, (red, green, blue)."""
    return bool((abs(pixels(image) - np.array(colour)).sum(-1) < 24).any())


BLUE, ORANGE = (31, 111, 180), (224, 123, 0)


def test_a_run_alone_has_a_picture_of_its_loss_and_peers_have_their_own():
    pytest.importorskip("matplotlib", reason=NEEDS)
    alone = [{**line, "peers": 1} for line in lines_of_a_run()]
    assert set(pictures_of(alone, "x")) == {"loss.png"}
    assert set(pictures_of(lines_of_a_run(), "x")) == {"loss.png", "peers.png"}
    assert pictures_of([], "x") == {}
    assert pictures_of(alone, "x") == pictures_of(alone, "x"), "the same bytes of the same lines"


def test_validation_and_restarts_are_seen_where_there_are_some():
    lines = lines_of_a_run()
    plain = pictures_of(lines, "x")
    assert has_colour(plain["loss.png"], BLUE) and not has_colour(plain["loss.png"], ORANGE)
    judged = pictures_of([*lines, {"step": 200, "eval_loss": 1.0}], "x")["loss.png"]
    assert has_colour(judged, ORANGE)
    resumed = [{**one, "resumed_from": 100} if one["step"] > 100 else one for one in lines]
    shown, before = (pixels(of["loss.png"]) for of in (pictures_of(resumed, "x"), plain))
    changed = (shown != before).any(-1).sum(0)  # pixels, by column
    place = changed.argmax() / len(changed)
    assert changed.max() > 200 and 0.45 < place < 0.6, "a line from top to bottom, in the middle"


@pytest.mark.parametrize(
    "line",
    [
        {"step": 1},
        {"step": 1, "tokens_per_second": None, "loss": None},
        {"step": 1, "tokens_per_second": 0.0, "loss": "many", "shares": 3, "peers": 2},
        {"step": 0, "tokens_per_second": 1e300, "loss": 1e300, "peers": True},
        {"step": 1, "eval_loss": 1e-300, "eval_loss_stderr": None},
        a_line(1, shares=[[1], "x"]),
        a_line(1, shares=[], seconds=None),
        a_line(2**60),
    ],
    ids=str,
)
def test_odd_lines_make_no_harm(line):
    pytest.importorskip("matplotlib", reason=NEEDS)
    for lines in ([line], [*lines_of_a_run(), line], [line, *lines_of_a_run()]):
        assert all(image.startswith(PNG) for image in pictures_of(lines, "a$b_{").values())


def test_restarts_are_named_or_seen_by_the_clock_of_the_session():
    named = [a_line(10), a_line(20), a_line(30, resumed_from=25), a_line(40, resumed_from=25)]
    assert restarts(named) == [25]
    old = [a_line(10), a_line(20), {**a_line(30), "seconds": 8.0}, {**a_line(40), "seconds": 9.0}]
    assert restarts(old) == [20]
    assert restarts(lines_of_a_run()) == []


def test_speed_and_waiting_are_those_between_two_lines():
    """As a session records them, which writes means since it began."""
    lines, spent_s, waited_s, took = [], 0.0, 0.0, [(1.0, 0.5), (4.0, 1.0), (2.0, 0.0), (5.0, 5.0)]
    for number, (seconds, waiting) in enumerate(took, start=1):
        if number == 3:
            spent_s = waited_s = 0.0
        start = 20 if number >= 3 else 0
        spent_s, waited_s, step = spent_s + seconds, waited_s + waiting, 10 * number
        figures = {"tokens_per_second": (step - start) * 7 / spent_s, "tokens": step * 7}
        lines.append({"step": step, "communication": waited_s / spent_s, **figures})
        if start:
            lines[-1]["resumed_from"] = start
    found = between_lines(lines)
    assert found["step"].tolist() == [10, 20, 30, 40]
    assert found["tokens_per_second"] == pytest.approx([70 / seconds for seconds, _ in took])
    assert found["communication"] == pytest.approx([waiting / seconds for seconds, waiting in took])


def test_a_smoothed_curve_keeps_a_level_and_leaves_out_what_is_missing():
    level = np.full(200, 3.0)
    level[50:53] = np.nan
    assert smoothed(level) == pytest.approx(np.full(200, 3.0))
    noisy = 3 + np.random.default_rng(0).normal(size=2000)
    assert np.std(smoothed(noisy)) < 0.2 * np.std(noisy)
    assert np.isnan(smoothed(np.array([np.nan, np.nan]))).all() and len(smoothed(noisy[:0])) == 0


def test_of_many_lines_some_are_left_out_but_no_evaluation(tmp_path):
    with (tmp_path / "metrics.jsonl").open("w") as file:
        for step in range(1, 30_001):
            file.write(json.dumps({"step": step, "loss": 1.0}) + "\n")
            if step % 3000 == 1:
                file.write(json.dumps({"step": step, "eval_loss": 1.0}) + "\nno line\n")
        file.write('{"step": 30001, "loss": 0.5}\n{"step": 3')
    found = lines_in(tmp_path)
    assert 3000 < len(found) <= 4012
    assert [one["step"] for one in found if "eval_loss" in one] == list(range(1, 30_001, 3000))


# --- while a run trains ---------------------------------------------------------------------------


@pytest.fixture
def now(monkeypatch):
    """A clock that the drawing moves on by 2 seconds; and how often something was drawn."""
    seconds, drawn = [100.0], []

    def draw(lines, name):
        seconds[0] += 2.0
        drawn.append(len(lines))
        return {"loss.png": PNG}

    monkeypatch.setattr(pictures_module, "pictures_of", draw)
    return seconds, drawn


def test_drawing_takes_at_most_a_hundredth_of_the_time(tmp_path, now):
    pytest.importorskip("matplotlib", reason=NEEDS)
    seconds, drawn = now
    pictures = Pictures(tmp_path, lambda name: True, print, lambda: seconds[0])
    for checkpoint in range(1000):
        with (tmp_path / "metrics.jsonl").open("a") as file:
            file.write(json.dumps(a_line(checkpoint + 1)) + "\n")
        seconds[0] += 10.0
        pictures.draw_if_due()
    assert 40 <= len(drawn) <= 51, "10,000 seconds of training"
    pictures.draw()
    pictures.draw()
    assert len(drawn) <= 52 and drawn[-1] == 1000, "the last picture shows all, and is drawn once"


def test_what_fails_is_said_once_and_files_of_others_stay(tmp_path, now, monkeypatch):
    pytest.importorskip("matplotlib", reason=NEEDS)
    seconds, drawn = now
    (tmp_path / "metrics.jsonl").write_text('{"step": 1}\n')
    (tmp_path / "loss.png").write_text("mine")
    said = []
    Pictures(tmp_path, lambda name: name != "loss.png", said.append).draw()
    assert drawn and (tmp_path / "loss.png").read_text() == "mine"

    def broken(*_):
        raise RuntimeError("no fonts\nat all")

    monkeypatch.setattr(pictures_module, "pictures_of", broken)
    pictures = Pictures(tmp_path, lambda name: True, said.append)
    pictures.draw()
    pictures.draw_if_due()
    assert said == ["warning: no pictures (RuntimeError: no fonts); the run continues"]


def test_a_run_draws_its_loss_and_marks_it_as_its_own(config, tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS)
    from train import train

    asked, folder = replace(config, pictures=True), tmp_path / "run"
    train(asked)
    image = (folder / "loss.png").read_bytes()
    assert pixels(image).shape[1] > 800 and not (folder / "peers.png").exists()
    assert "loss.png" in json.loads((folder / "run.json").read_text())["wrote"]
    assert image == pictures_of(lines_in(folder), "run")["loss.png"], "of metrics.jsonl alone"
    train(replace(asked, overwrite=True, pictures=False))
    assert not (folder / "loss.png").exists(), "it was of the run that was thrown away"


def test_without_matplotlib_a_run_goes_on_and_says_how_to_install_it(config, monkeypatch, capsys):
    from train import train

    monkeypatch.setitem(sys.modules, "matplotlib", None)  # an import of it fails
    result = train(replace(config, pictures=True))
    assert result.is_published and not (Path(config.output_dir) / "loss.png").exists()
    printed = capsys.readouterr().out
    line = install_line("matplotlib")
    assert printed.count(f"matplotlib is not installed. To have them:\n          {line}\n") == 1
    assert "warning" not in printed


def test_the_line_to_install_it_works_as_typed():
    """Where it is installed already, the line has nothing to do, and needs no network."""
    pytest.importorskip("matplotlib", reason=NEEDS)
    line = install_line("matplotlib")
    done = subprocess.run(line, shell=True, capture_output=True, text=True, check=False)
    assert done.returncode == 0 and "already satisfied" in done.stdout, done


def test_old_runs_are_drawn_from_the_command_line(tmp_path):
    pytest.importorskip("matplotlib", reason=NEEDS)
    folder = tmp_path / "old run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("".join(json.dumps(a_line(s)) + "\n" for s in (1, 2)))
    words = [sys.executable, "-m", "p2p_llm_forge.training.pictures"]

    def drawn(*folders):
        return subprocess.run(
            [*words, *folders], cwd=ROOT, capture_output=True, text=True, check=False
        )

    done = drawn(str(folder))
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[:2] == [str(folder / n) for n in ("loss.png", "peers.png")]
    assert all(pixels((folder / name).read_bytes()).any() for name in ("loss.png", "peers.png"))
    nothing = drawn(str(tmp_path / "nothing"))
    assert nothing.returncode == 2 and "give the --output-dir of a run" in nothing.stderr
    assert "usage" not in drawn().stderr
