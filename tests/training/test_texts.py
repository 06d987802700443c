"""Machines that are given a text each train on one, and no other is left out without a word."""

from __future__ import annotations

import os
import shutil

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.training import texts
from tests.folders import tree
from tests.training.machines import Machines, of_text, on_record, other_data


@pytest.fixture
def machines(config, tmp_path):
    return lambda count: Machines(config, tmp_path, count)


def reversed_lines(path):
    """Another text of just as many bytes."""
    lines = path.read_text("utf-8").splitlines(keepends=True)
    path.write_text("".join(reversed(lines)), "utf-8")


def half(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def a_folder(path):
    path.unlink()
    path.mkdir()
    (path / "notes.txt").write_text("mine")


@pytest.mark.parametrize(
    "changed, said",
    [
        (reversed_lines, r"another text than rank 0 \(.*SHA-256"),
        (half, r"another text than rank 0 .*\([\d,]+ and [\d,]+ bytes\)"),
        (a_folder, "not the text that rank 0 "),
    ],
)
def test_another_text_under_the_same_name_is_refused_and_moved_away_it_is_not_missed(
    machines, text_file, changed, said
):
    home = of_text(machines, text_file, (0, 1, 2))
    changed(home.data[1])
    before = [tree(folder) for folder in home.homes]
    with pytest.raises(ForgeError, match=rf"machine 1/corpus\.txt of rank 1 \(.*\) is {said}") as e:
        home.open_data(vocab_size=300)
    (problem,) = e.value.problems
    assert "move it away, and what rank 0's becomes is fetched; or copy rank 0's" in problem.fix
    assert [tree(folder) for folder in home.homes] == before, "nothing is prepared before"
    home.data[1].rename(home.homes[1] / "kept")  # as the fix says
    opened = home.open_data(vocab_size=300)
    assert len({one.manifest.fingerprint for one in opened}) == 1


def test_the_other_fix_is_a_copy_and_the_only_one_where_nothing_is_fetched(machines, text_file):
    home = of_text(machines, text_file, (0, 1), count=2)
    half(home.data[1])
    with pytest.raises(ForgeError, match="another text") as error:
        home.open_data(vocab_size=300, fetch="never")
    assert error.value.problems[0].fix == "there, copy rank 0's to its place"
    shutil.copy(home.data[0], home.data[1])
    home.open_data(vocab_size=300)


def test_texts_in_a_folder_with_an_odd_name_are_compared(config, text_file, tmp_path):
    home = of_text(
        lambda count: Machines(config, tmp_path / "tab\there  two  spaces", count),
        text_file,
        (0, 1),
    )
    home.open_data(vocab_size=300)
    half(home.data[1])
    with pytest.raises(ForgeError, match=r"two  spaces/machine 1/corpus\.txt of rank 1 .* another"):
        home.open_data(vocab_size=300)


@pytest.mark.parametrize("having", [(0,), (1,)])
def test_without_fetching_nothing_is_prepared_that_others_could_not_see(
    machines, text_file, having
):
    home = of_text(machines, text_file, having, count=2)
    with pytest.raises(ForgeError, match="--fetch never brings nothing") as error:
        home.open_data(vocab_size=300, fetch="never")
    (problem,) = error.value.problems
    assert problem.found.startswith(f"rank {1 - having[0]} (")
    assert [os.listdir(folder) for folder in home.homes].count([]) == 1, "and no folder is left"
    home.open_data(vocab_size=300)  # as the fix says
    home.open_data(vocab_size=300, fetch="never")


def test_without_fetching_a_folder_that_all_see_serves_all(machines, text_file, tmp_path):
    home = of_text(machines, text_file, (1,), count=2)
    (tmp_path / "share").mkdir()
    for folder in home.homes:
        (folder / "run").symlink_to(tmp_path / "share")
    home.open_data(vocab_size=300, fetch="never")
    assert (tmp_path / "share" / "prepared" / "manifest.json").is_file()
    assert os.listdir(tmp_path / "share") == ["prepared"]


def test_a_file_that_all_see_is_not_read_for_that(machines, text_file, monkeypatch):
    home = of_text(machines, text_file, (0,))
    for rank in (1, 2):
        os.link(home.data[0], home.data[rank])  # as a share looks: the same file everywhere
    read = []
    monkeypatch.setattr(texts, "sha256_of", read.append)
    home.open_data(vocab_size=300)
    assert read == []


def test_the_fix_of_a_text_that_cannot_be_read_is_another_file(machines, text_file):
    home = of_text(machines, text_file, (), count=2)
    home.data[0].touch()
    home.data[1].symlink_to("/proc/self/mem")
    with pytest.raises(ForgeError, match=r"corpus\.txt cannot be read: Input/output") as error:
        home.open_data(vocab_size=300)
    assert error.value.problems[0].fix == "make it readable, or give another file"
    home.data = [folder / "another.txt" for folder in home.homes]
    for path in home.data:
        shutil.copy(text_file, path)
    home.open_data(vocab_size=300)


@pytest.mark.parametrize("is_dry", [False, True])
def test_a_run_goes_on_with_the_text_it_was_made_of_where_another_has_its_name(
    machines, text_file, is_dry
):
    """The main machine is another one now, and has a text of its own under this name."""
    home = of_text(machines, text_file, (0,), count=2)
    first, _ = home.open_data(vocab_size=300)
    on_record(home, first.manifest.fingerprint)
    home.data[0].unlink()
    shutil.copy(text_file, home.data[1])
    half(home.data[1])
    home.homes, home.data = home.homes[::-1], home.data[::-1]
    with pytest.raises(ForgeError, match="made from another text") as error:
        home.open_data(vocab_size=300, dry_run=is_dry, resume="auto")
    (problem,) = error.value.problems
    assert f"move {home.data[0]} away" in problem.fix
    home.data[0].rename(home.homes[0] / "kept")  # as the fix says
    opened = home.open_data(vocab_size=300, dry_run=is_dry, resume="auto")
    assert {one.manifest.fingerprint for one in opened} == {first.manifest.fingerprint}
    shutil.copy(text_file, home.data[0])  # as its other half says
    home.open_data(vocab_size=300, dry_run=is_dry, resume="auto")


OF_ANOTHER_RUN, OF_THE_RUN = "0" * 64, None


@pytest.mark.parametrize(
    "recorded, asked",
    [
        (OF_THE_RUN, {}),
        (OF_THE_RUN, {"overwrite": True}),
        (OF_THE_RUN, {"overwrite": True, "eval_only": True}),
        (OF_ANOTHER_RUN, {"resume": "auto"}),
        (OF_ANOTHER_RUN, {"eval_only": True}),
        ("", {"resume": "auto"}),
    ],
)
@pytest.mark.parametrize("count", [1, 2])
def test_a_text_that_is_not_there_is_no_other_one_of_its_name(
    machines, text_file, recorded, asked, count
):
    """Its disk is not mounted, say; an older text of this name was prepared for another start."""
    home = of_text(machines, text_file, (0,), count=count)
    made = home.open_data(vocab_size=300)[0].manifest.fingerprint
    if recorded != "":
        on_record(home, recorded or made)
    before = [tree(folder) for folder in home.homes]
    home.data = [folder / "usb" / text_file.name for folder in home.homes]
    with pytest.raises(ForgeError, match=r"usb/corpus\.txt: no such file"):
        home.open_data(vocab_size=300, **asked)
    assert [tree(folder) for folder in home.homes] == before


@pytest.mark.parametrize("asked", [{"resume": "auto"}, {"eval_only": True}], ids=str)
def test_the_data_of_a_run_serve_it_where_another_machine_has_others_of_that_name(
    machines, text_file, asked
):
    home = of_text(machines, text_file, (0,), count=2)
    made = home.open_data(vocab_size=300)[0].manifest.fingerprint
    on_record(home, made, ranks=[1])
    home.data[0].unlink()
    older = home.homes[0] / "run" / "prepared"
    shutil.rmtree(older)
    shutil.copy(text_file, text := home.homes[0] / text_file.name)
    half(text)
    other_data(text, older)
    text.unlink()
    with pytest.raises(ForgeError, match="rank 0 has prepared other data .* go on") as error:
        home.open_data(vocab_size=300, **asked)
    assert error.value.problems[0].fix.startswith("on rank 0, move that folder and its text away")
    older.rename(home.homes[0] / "kept")
    opened = home.open_data(vocab_size=300, **asked)
    assert {one.manifest.fingerprint for one in opened} == {made}


def test_another_text_of_this_name_where_no_run_goes_on_is_refused_with_fixes_that_work(
    machines, text_file
):
    home = of_text(machines, text_file, (0,), count=2)
    first, _ = home.open_data(vocab_size=300)
    half(home.data[0])
    with pytest.raises(ForgeError, match="made from another text") as error:
        home.open_data(vocab_size=300)
    assert error.value.problems[0].fix == "give a new folder, or --overwrite to replace it"
    again, _ = home.open_data(vocab_size=300, overwrite=True)
    assert again.manifest.fingerprint != first.manifest.fingerprint
