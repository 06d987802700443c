"""What is no good checkpoint is skipped with a reason, whatever is in its files."""

from __future__ import annotations

import copy
import hashlib
import json
import os
import shutil

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file

from p2p_llm_forge.training.checkpoint import newest_good
from p2p_llm_forge.training.manifest import damage, is_whole, own_files, steps_saved
from tests.training.saved import state_of, writer

HUGE = 10**400
OF_DILOCO = {
    "settings": {"sync": "diloco", "sync_every": 2, "fragments": 1, "overlap_steps": 0},
    **{"is_agreed": True, "is_warming_up": False, "ranks": 2, "bad_rounds": 0, "warmup_steps": 0},
    **{"sent_at": [4], "lands_at": [0], "outer": [[0.7, 0.9]], "agreed_at": [4]},
}


def digest(file):
    return {
        "size": file.stat().st_size,
        "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
    }


def seal(folder, **changes):
    """Write the manifest of a checkpoint, as a stranger who knows the format would."""
    names = [p.name for p in folder.iterdir() if p.name != "manifest.json"]
    files = {name: digest(folder / name) for name in names}
    manifest = {"format_version": 1, "step": int(folder.name.split("-")[1]), "files": files}
    (folder / "manifest.json").write_text(json.dumps({**manifest, **changes}))


def save(output_dir, step, fill=1.0, **state):
    folder = output_dir / f"checkpoint-{step}"
    folder.mkdir()
    writer(step, fill, **state)(folder)
    seal(folder)
    return folder


def manifest_of(folder):
    return json.loads((folder / "manifest.json").read_text())


def with_files(change):
    """A change of the manifest's files."""

    def act(folder):
        files = manifest_of(folder)["files"]
        change(files)
        seal(folder, files=files)

    return act


MANIFESTS = {
    "format version 2": lambda folder: seal(folder, format_version=2),
    "0000... is too long": lambda folder: seal(folder, format_version=HUGE),
    "'format_version' is None": lambda folder: seal(folder, format_version=None),
    "'format_version' is True": lambda folder: seal(folder, format_version=True),
    "'format_version' is '1'": lambda folder: seal(folder, format_version="1"),
    "that of step 8": lambda folder: seal(folder, step=8),
    "'step' is 9.0": lambda folder: seal(folder, step=9.0),
    "'step' is -9": lambda folder: seal(folder, step=-9),
    "does not name trainer_state.json": lambda folder: seal(folder, files={}),
    "'files' is []": lambda folder: seal(folder, files=[]),
    "'config.json' is None": with_files(lambda files: files.update({"config.json": None})),
    "'config.json' is []": with_files(lambda files: files.update({"config.json": []})),
    "number 1000": with_files(lambda files: files["config.json"].update(size=HUGE)),
    "'size' is -1": with_files(lambda files: files["config.json"].update(size=-1)),
    "'sha256' is 5": with_files(lambda files: files["config.json"].update(sha256=5)),
    "'../notes'": with_files(lambda files: files.update({"../notes": files["config.json"]})),
    "'/etc/passwd'": with_files(lambda files: files.update({"/etc/passwd": files["config.json"]})),
    "surrogates not allowed": with_files(
        lambda files: files.update({"\ud800": files["config.json"]})
    ),
    "is no file in a checkpoint": with_files(
        lambda files: files.update({"a\0b": files["config.json"]})
    ),
    "File name too long": with_files(lambda files: files.update({"x" * 999: files["config.json"]})),
    "it is []": lambda folder: (folder / "manifest.json").write_text("[]"),
    "it is None": lambda folder: (folder / "manifest.json").write_text("null"),
    "nested too deep": lambda folder: (folder / "manifest.json").write_text("[" * 200_000),
    "codec can't decode": lambda folder: (folder / "manifest.json").write_bytes(b'{"a": "\xff"}'),
    "Is a directory": lambda folder: replaced_by_a_folder(folder / "manifest.json"),
    "config.json is missing": lambda folder: replaced_by_a_folder(folder / "config.json"),
}


def replaced_by_a_folder(file):
    file.unlink()
    file.mkdir()


def nan_in_a_file(name):
    def act(folder):
        save_file({"weight": torch.tensor([1.0, float("nan")])}, folder / name)
        seal(folder)

    return act


def of_state(**state):
    def act(folder):
        writer(9, **state)(folder)
        seal(folder)

    return act


def raw_state(content):
    def act(folder):
        (folder / "trainer_state.json").write_bytes(content)
        seal(folder)

    return act


def without_weights(folder):
    (folder / "model.safetensors").unlink()
    seal(folder)


CONTENTS = {
    "model.safetensors holds NaN or infinite values in weight": nan_in_a_file("model.safetensors"),
    "optimizer.safetensors holds NaN": nan_in_a_file("optimizer.safetensors"),
    "rank-00001.safetensors holds NaN": nan_in_a_file("rank-00001.safetensors"),
    "values of 1.0e+38 in weight, too large": of_state(fill=1e38),
    "it holds no weights": without_weights,
    "trainer_state.json is that of step 8": lambda folder: (writer(8)(folder), seal(folder)),
    "'blocks_read' is -1": of_state(blocks_read=-1),
    "'figures' is None": of_state(figures=None),
    "'eval_loss' is 'low'": of_state(figures={"eval_loss": "low"}),
    "a figure 'made_up'": of_state(figures={"made_up": 1}),
    "'since_log' is {}": of_state(since_log={}),
    "NaN is no number": of_state(train_loss=float("nan")),
    "'sync' is 5": of_state(sync={"settings": {"sync": 5}}),
    "'is_agreed' is None": of_state(sync={"settings": OF_DILOCO["settings"], "ranks": 2}),
    "rounds of 1 fragments": of_state(sync={**OF_DILOCO, "outer": []}),
    "'scaler' is {}": of_state(scaler={}),
    "trainer_state.json cannot be read (it is []": raw_state(b"[]"),
    "trainer_state.json cannot be read (it is nested": raw_state(b"[" * 200_000),
    "trainer_state.json cannot be read ('utf-8'": raw_state(b'{"a": "\xff"}'),
}


@pytest.mark.parametrize("reason", [*MANIFESTS, *CONTENTS])
def test_it_is_skipped_with_a_reason(tmp_path, reason):
    good = save(tmp_path, 4, sync=OF_DILOCO)
    bad = save(tmp_path, 9)
    assert newest_good(tmp_path) == (bad, [])
    {**MANIFESTS, **CONTENTS}[reason](bad)
    found, (skipped,) = newest_good(tmp_path)
    assert found == good
    assert skipped.startswith(f"skipped {bad}: ") and reason in skipped
    if reason in MANIFESTS and reason != "config.json is missing":
        assert own_files(bad) is None or "too long" in reason, "it could be removed"
        assert not is_whole(bad)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("checkpoint-007", "called so"),
        ("checkpoint-1e3", "called so"),
        ("checkpoint-", "called so"),
        ("checkpoint-٣", "called so"),
        ("checkpoint--9", "called so"),
        ("checkpoint-9 ", "called so"),
        ("checkpoint-best", "called so"),
        ("checkpoint-" + "9" * 200, "has no manifest.json"),
    ],
)
def test_folders_with_other_names_are_skipped(tmp_path, name, reason):
    good = save(tmp_path, 4)
    (tmp_path / name).mkdir()
    found, (skipped,) = newest_good(tmp_path)
    assert found == good and name in skipped and reason in skipped


def test_files_and_links_are_skipped_and_not_followed(tmp_path):
    good = save(tmp_path, 4)
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    save(elsewhere, 9)
    (tmp_path / "checkpoint-5").write_text("a file")
    (tmp_path / "checkpoint-6").symlink_to("nowhere")
    (tmp_path / "checkpoint-7").symlink_to("checkpoint-7")
    (tmp_path / "checkpoint-9").symlink_to(elsewhere / "checkpoint-9")
    os.mkfifo(tmp_path / "checkpoint-11")
    found, skipped = newest_good(tmp_path)
    assert found == good and len(skipped) == 5 and steps_saved(tmp_path) == [4]
    assert sum("it is a link" in line for line in skipped) == 3
    assert sum("it is no folder" in line for line in skipped) == 2


ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.sampled_from([HUGE, -1, 2**63, 1e999, float("nan"), "\ud800", "\0", "..", "/", ""])
    | st.floats()
    | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner),
    max_leaves=6,
)


@st.composite
def changed(draw, value):
    """The JSON value with one of its parts replaced, removed or added to."""
    value = copy.deepcopy(value)
    part, way = value, []
    while isinstance(part, dict | list) and part and (not way or draw(st.booleans())):
        keys = sorted(part) if isinstance(part, dict) else range(len(part))
        way.append((part, draw(st.sampled_from(keys))))
        part = part[way[-1][1]]
    if not way:
        return draw(ANYTHING)
    holder, key = way[-1]
    what = draw(st.sampled_from(["replace", "remove", "add"]))
    if what == "replace":
        holder[key] = draw(ANYTHING)
    elif what == "remove":
        del holder[key]
    elif isinstance(holder, dict):
        holder[draw(st.text(max_size=9))] = draw(ANYTHING)
    else:
        holder.append(draw(ANYTHING))
    return value


FUZZ = settings(
    max_examples=300,
    deadline=None,
    derandomize=True,
    suppress_health_check=[HealthCheck.function_scoped_fixture],
)


@FUZZ
@given(data=st.data())
def test_no_manifest_and_no_state_is_more_than_a_reason(tmp_path_factory, data):
    output_dir = tmp_path_factory.mktemp("run")
    try:
        folder = save(output_dir, 9, sync=OF_DILOCO)
        if data.draw(st.booleans()):
            content = data.draw(changed(manifest_of(folder)))
            (folder / "manifest.json").write_text(json.dumps(content))
        else:
            content = data.draw(changed(state_of(9, sync=OF_DILOCO, train_loss=1.0, scaler=[{}])))
            (folder / "trainer_state.json").write_text(json.dumps(content))
            seal(folder)
        reason = damage(folder)
        assert reason is None or reason.isprintable() or "\n" in reason
        (reason or "").encode()  # it can be printed
    finally:
        shutil.rmtree(output_dir)


@FUZZ
@given(content=st.binary(max_size=60))
def test_no_bytes_in_a_manifest_or_state_are_more_than_a_reason(tmp_path_factory, content):
    output_dir = tmp_path_factory.mktemp("run")
    try:
        folder = save(output_dir, 9)
        (folder / "manifest.json").write_bytes(content)
        assert damage(folder).startswith("its manifest.json cannot be read")
        (folder / "trainer_state.json").write_bytes(content)
        seal(folder)
        assert damage(folder).startswith("its trainer_state.json cannot be read")
    finally:
        shutil.rmtree(output_dir)


def test_a_folder_that_vanishes_while_it_is_read_has_no_checkpoints(tmp_path, monkeypatch):
    right = os.scandir

    def removed_first(path):  # as by a rank that has found it empty
        (tmp_path / "run").rmdir()
        return right(path)

    (tmp_path / "run").mkdir()
    monkeypatch.setattr(os, "scandir", removed_first)
    assert steps_saved(tmp_path / "run") == []
    monkeypatch.undo()
    assert not (tmp_path / "run").exists()
