"""Killed, shared, interrupted, out of room: a preparation goes on, and the bytes are the same."""

from __future__ import annotations

import errno
import json
import os
import shutil
import socket
import subprocess
import sys
import time
from pathlib import Path
from unittest import mock

import psutil
import pytest

import prepare_data
from p2p_llm_forge.config import PrepareConfig
from p2p_llm_forge.data import dataset as corpus
from p2p_llm_forge.data import parts, sources
from p2p_llm_forge.data import pieces as unfinished
from p2p_llm_forge.data.dataset import Manifest, open_prepared
from p2p_llm_forge.data.parts import ReadOptions
from p2p_llm_forge.data.pieces import Ranks
from p2p_llm_forge.errors import ForgeError
from prepare_data import prepare
from tests.texts import contents, some_text, write_rows

ROOT = Path(prepare_data.__file__).parent

# prepare_data.py with pieces so small that a small text has many; argv[1] slows every piece down.
SMALL_PIECES = """
import sys, time
import prepare_data
from p2p_llm_forge.data import dataset as corpus
from p2p_llm_forge.data import parts
from p2p_llm_forge.data import pieces as unfinished
from p2p_llm_forge.errors import run_script
parts.PIECE_BYTES, corpus.BATCH_BYTES, corpus.BATCHES_PER_SHARD = 3000, 1000, 4
unfinished.HEARTBEAT_S, unfinished.STALE_S, prepare_data.POLL_S = 0.2, 4.0, 0.05
pause_s = float(sys.argv.pop(1))
right = corpus.encode_piece
def slow(*arguments):
    time.sleep(pause_s)
    return right(*arguments)
corpus.encode_piece = slow
run_script(lambda: prepare_data.main(sys.argv[1:]))
"""


@pytest.fixture(autouse=True)
def small_pieces(monkeypatch):
    monkeypatch.setattr(parts, "PIECE_BYTES", 3_000)
    monkeypatch.setattr(corpus, "BATCH_BYTES", 1_000)
    monkeypatch.setattr(corpus, "BATCHES_PER_SHARD", 4)
    monkeypatch.setattr(prepare_data, "POLL_S", 0.02)


@pytest.fixture(scope="module")
def text(tmp_path_factory):
    """Text of every way of reading: cut by bytes, row by row, and as a stream."""
    folder = tmp_path_factory.mktemp("text")
    (folder / "a.txt").write_bytes(some_text(200).encode())
    rows = some_text(300, seed=5).split("\n\n")
    write_rows(folder / "b.jsonl", rows[:100])
    write_rows(folder / "c.jsonl.gz", rows[100:200])
    write_rows(folder / "d.parquet", rows[200:240])
    return folder


def config(text: Path, folder: Path, **changes) -> PrepareConfig:
    asked = {"dataset_path": [str(text)], "output_dir": str(folder), "sequence_length": 32}
    return PrepareConfig(**asked | {"vocab_size": 400, "validation_fraction": 0.2} | changes)


def start(text: Path, folder: Path, *more: str, pause_s: float = 0.0, **environment: str):
    """The script on its way, with the arguments of `config`."""
    command = [
        sys.executable, "-c", SMALL_PIECES, str(pause_s), "--dataset-path", str(text),
        "--output-dir", str(folder), "--sequence-length", "32", "--vocab-size", "400",
        "--validation-fraction", "0.2", *more,
    ]  # fmt: skip
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def undisturbed(text, tmp_path_factory):
    """What an undisturbed run of one worker writes."""
    folder = tmp_path_factory.mktemp("whole") / "out"
    small = mock.patch.multiple(corpus, BATCH_BYTES=1_000, BATCHES_PER_SHARD=4)
    with small, mock.patch.object(parts, "PIECE_BYTES", 3_000):
        prepare(config(text, folder, num_workers=1))
    found = contents(folder)
    assert len([name for name in found if name.endswith(".arrow")]) > 3
    return found


def wait_for(condition, timeout_s: float = 60.0) -> None:
    end = time.monotonic() + timeout_s
    while not condition():
        assert time.monotonic() < end, "waited too long"
        time.sleep(0.005)


# --- killed ---------------------------------------------------------------------------------------


# Children that work and are killed: half of them by themselves, at a random one of the operations
# on files (so that every kind of moment comes), half from outside, at a random time.
KILLED_AGAIN_AND_AGAIN = """
import os, random, shutil, signal, sys, time
import prepare_data
from p2p_llm_forge.data import dataset as corpus
from p2p_llm_forge.data import packing
from p2p_llm_forge.data import parts
from p2p_llm_forge.data import tokenizer as tokenization
from p2p_llm_forge.data import pieces as unfinished
# What is loaded once serves every child.
import awkward, datasets, gigatoken, psutil, pyarrow.compute, pyarrow.json, pyarrow.parquet, xxhash
from transformers import AutoTokenizer, PreTrainedTokenizerFast
parts.PIECE_BYTES, corpus.BATCH_BYTES, corpus.BATCHES_PER_SHARD = 3000, 1000, 4
text, folder, kills = sys.argv[1], sys.argv[2], int(sys.argv[3])
chosen = random.Random(7)
config = prepare_data.PrepareConfig(
    dataset_path=[text], output_dir=folder + "/0", sequence_length=32, vocab_size=400,
    validation_fraction=0.2, num_workers=2)
OPERATIONS = {"open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"}

def work(operations):
    def count(event, arguments):
        if event in OPERATIONS and folder in str(arguments[0]):
            left[0] -= 1
            if not left[0]:
                os.kill(os.getpid(), signal.SIGKILL)
    left = [operations]
    if operations:
        sys.addaudithook(count)
    prepare_data.prepare(config)

killed = finished = after_some_pieces = 0
while killed < kills or not finished:
    child = os.fork()
    if child == 0:
        sys.stdout = open(os.devnull, "w")
        try:
            # More than it takes to finish what was killed late: some always come to the end.
            work(chosen.randint(1, 400) if killed % 2 else 0)
            os._exit(0)
        except BaseException as error:
            print("failed:", repr(error), file=sys.stderr, flush=True)
            os._exit(1)
    if killed % 2 == 0:
        time.sleep(chosen.uniform(0.02, 0.25))
        os.kill(child, signal.SIGKILL)
    chosen.random()
    status = os.waitpid(child, 0)[1]
    pieces = config.output_dir + "/unfinished/pieces"
    if os.WIFSIGNALED(status):
        killed += 1
        after_some_pieces += os.path.isdir(pieces) and len(os.listdir(pieces)) > 0
    elif os.WEXITSTATUS(status) != 0:
        sys.exit(1)
    else:
        finished += 1
        config.output_dir = f"{folder}/{finished}"
    if killed > kills + 40:
        sys.exit("it never finishes")
print(killed, finished, after_some_pieces)
"""


def test_killed_at_random_moments_it_goes_on_to_the_same_bytes(text, tmp_path, undisturbed):
    command = [sys.executable, "-c", KILLED_AGAIN_AND_AGAIN, str(text), str(tmp_path / "out"), "30"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=200, cwd=ROOT)
    assert done.returncode == 0, done.stderr
    killed, finished, after_some_pieces = map(int, done.stdout.split())
    assert killed >= 30 and finished >= 1 and after_some_pieces >= 10
    for number in range(finished):
        assert contents(tmp_path / "out" / str(number)) == undisturbed


def test_what_is_done_is_not_done_again(text, tmp_path, undisturbed, monkeypatch):
    right, encoded = corpus.encode_piece, []

    def end_after_ten(number, *arguments):
        if len(encoded) == 10:
            raise KeyboardInterrupt
        encoded.append(number)
        return right(number, *arguments)

    monkeypatch.setattr(corpus, "encode_piece", end_after_ten)
    with pytest.raises(KeyboardInterrupt):
        prepare(config(text, tmp_path / "out", num_workers=1))
    with pytest.raises(ForgeError, match="did not finish"):
        open_prepared(tmp_path / "out")
    first = list(encoded)
    monkeypatch.setattr(
        corpus, "encode_piece", lambda number, *a: (encoded.append(number), right(number, *a))[1]
    )
    prepare(config(text, tmp_path / "out"))
    assert len(first) == 10 and len(encoded) == len(set(encoded)) > 20
    assert contents(tmp_path / "out") == undisturbed


def test_a_piece_that_was_damaged_on_the_disk_is_made_again(text, tmp_path, undisturbed):
    def interrupt(*_):
        raise KeyboardInterrupt

    before_packing = mock.patch.object(prepare_data.packing.Packer, "finish", interrupt)
    with before_packing, pytest.raises(KeyboardInterrupt):
        prepare(config(text, tmp_path / "out"))
    pieces = sorted((tmp_path / "out" / "unfinished" / "pieces").glob("*.tokens"))
    assert len(pieces) > 20
    pieces[3].write_bytes(b"\0" * pieces[3].stat().st_size)
    pieces[5].write_bytes(pieces[5].read_bytes()[:-2])
    pieces[7].unlink()
    pieces[9].with_suffix(".json").write_text("{")
    prepare(config(text, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed


def test_another_length_of_blocks_takes_the_tokens_that_are_there(text, tmp_path, monkeypatch):
    def interrupt(*_):
        raise KeyboardInterrupt

    before_packing = mock.patch.object(prepare_data.packing.Packer, "finish", interrupt)
    with before_packing, pytest.raises(KeyboardInterrupt):
        prepare(config(text, tmp_path / "out"))
    monkeypatch.setattr(corpus, "encode_piece", interrupt)
    manifest = prepare(config(text, tmp_path / "out", sequence_length=64))
    assert manifest.sequence_length == 64 and manifest.splits["train"].blocks > 10


def test_a_bad_row_late_in_the_text_loses_nothing_that_was_done(text, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    (folder / "e.jsonl").write_text("{")
    out = tmp_path / "out"
    tokenizer = {"tokenizer": str(ready_tokenizer(text, tmp_path))}
    with pytest.raises(ForgeError, match="e.jsonl, line 1 is not JSON"):
        prepare(config(folder, out, **tokenizer))
    records = {path: path.stat().st_mtime_ns for path in out.rglob("pieces/*.json")}
    assert len(records) > 20
    (folder / "e.jsonl").write_text('{"text": "mended"}\n')
    with mock.patch.object(corpus, "publish"):
        prepare(config(folder, out, **tokenizer))
    manifest = prepare(config(folder, tmp_path / "fresh", **tokenizer))
    assert manifest.splits["train"].documents > 300


def ready_tokenizer(text: Path, tmp_path: Path) -> Path:
    prepare(config(text, tmp_path / "first"))
    return tmp_path / "first" / "tokenizer"


def test_what_a_run_left_that_was_killed_at_the_very_end_is_removed(text, tmp_path, undisturbed):
    with mock.patch.object(shutil, "rmtree"):
        prepare(config(text, tmp_path / "out"))
    assert any((tmp_path / "out" / "unfinished" / "pieces").iterdir())
    prepare(config(text, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed


# --- several ranks --------------------------------------------------------------------------------


def launch(text: Path, folder: Path, world: int, *more: str, pause_s: float = 0.0):
    return [
        start(text, folder, *more, pause_s=pause_s, RANK=str(rank), WORLD_SIZE=str(world))
        for rank in range(world)
    ]


@pytest.mark.slow
def test_several_ranks_write_the_same_bytes_as_one(text, tmp_path, undisturbed):
    ranks = launch(text, tmp_path / "out", 3, pause_s=0.02)
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [0, 0, 0], told
    assert contents(tmp_path / "out") == undisturbed
    assert "prepared" in told[0][0] and "prepared" not in told[1][0] + told[2][0]


@pytest.mark.slow
def test_the_main_process_takes_over_from_a_rank_that_was_killed(text, tmp_path, undisturbed):
    main, helper = launch(text, tmp_path / "out", 2, pause_s=0.1)
    wait_for(lambda: (tmp_path / "out" / "unfinished" / "rank-1").exists())
    wait_for(lambda: any(tmp_path.rglob("pieces/*.json")))
    helper.kill()
    told = main.communicate(timeout=120)
    helper.communicate()
    assert main.returncode == 0, told
    assert contents(tmp_path / "out") == undisturbed


@pytest.mark.slow
def test_what_ends_a_rank_ends_the_launch_and_is_told(text, tmp_path):
    folder = tmp_path / "text"
    shutil.copytree(text, folder)
    for number in range(20):
        (folder / f"e{number}.parquet").write_bytes((text / "d.parquet").read_bytes())
    rows = write_rows(folder / "f.parquet", ["x"], column="body")
    tokenizer = str(ready_tokenizer(text, tmp_path))
    ranks = launch(folder, tmp_path / "out", 2, "--tokenizer", tokenizer)
    told = [rank.communicate(timeout=120) for rank in ranks]
    assert [rank.returncode for rank in ranks] == [2, 2], told
    assert f"{rows} has no text column" in told[0][1] and "Traceback" not in told[0][1]


def test_each_rank_takes_its_share(text, tmp_path):
    prepare(config(text, tmp_path / "out"))
    found = sources.find([str(text)], ReadOptions(piece_bytes=3_000))
    pieces = mock.Mock(records=lambda *_: [], record=lambda *_: None)
    job = mock.Mock(parts=found.parts, reading=ReadOptions(piece_bytes=3_000), pieces=pieces)
    alone = [(t.number, t.place) for t in prepare_data.pieces_to_do(job, Ranks())]
    for world in (2, 3, 50):
        shares = [
            [(t.number, t.place) for t in prepare_data.pieces_to_do(job, Ranks(rank, world))]
            for rank in range(world)
        ]
        assert sorted(piece for share in shares for piece in share) == alone
        assert world == 50 or min(map(len, shares)) > len(alone) / world / 2


# --- two runs in one folder -----------------------------------------------------------------------


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_refuses(text, tmp_path, undisturbed):
    first = start(text, tmp_path / "out", pause_s=0.1)
    wait_for(lambda: any(tmp_path.rglob("pieces/*.json")))
    with pytest.raises(ForgeError, match=f"is being prepared by process {first.pid} on"):
        prepare(config(text, tmp_path / "out"))
    assert first.wait(timeout=120) == 0
    first.communicate()
    assert contents(tmp_path / "out") == undisturbed


def lock_of(folder: Path, holder: str) -> Path:
    (folder / "unfinished").mkdir(parents=True)
    (folder / "unfinished" / "lock").write_text(holder)
    return folder / "unfinished" / "lock"


def test_locks_of_the_dead_do_not_hold(text, tmp_path):
    host = socket.gethostname()
    dead = subprocess.Popen([sys.executable, "-c", ""])
    dead.wait()
    here = psutil.Process()
    holders = {
        "gone": {"host": host, "pid": dead.pid, "started": 0},
        "pid-used-again": {"host": host, "pid": here.pid, "started": here.create_time() - 99},
        "other-host": {"host": "elsewhere", "pid": 1, "started": 0},
    }
    for name, holder in holders.items():
        lock = lock_of(tmp_path / name, json.dumps(holder))
        old = time.time() - 2 * unfinished.STALE_S
        os.utime(lock, (old, old))
        with unfinished.claim(tmp_path / name, Ranks()) as folder:
            assert json.loads((folder / "lock").read_text())["pid"] == here.pid
        assert not lock.exists()


def test_locks_of_the_living_hold(tmp_path):
    here = psutil.Process()
    own = {"host": socket.gethostname(), "pid": here.pid, "started": here.create_time()}
    for name, holder in {"here": own, "elsewhere": own | {"host": "elsewhere"}}.items():
        lock_of(tmp_path / name, json.dumps(holder))
        told = f"prepared by process {here.pid} on .*wait for it"
        with pytest.raises(ForgeError, match=told), unfinished.claim(tmp_path / name, Ranks()):
            pass


# --- no room --------------------------------------------------------------------------------------


def test_a_full_disk_leaves_a_resumable_state_and_says_what_is_needed(
    text, tmp_path, undisturbed, monkeypatch
):
    right, written = unfinished.write_whole, []

    def fill_up(path, content):
        if len(written) == 20:
            raise OSError(errno.ENOSPC, "No space left on device")
        written.append(path)
        right(path, content)

    monkeypatch.setattr(unfinished, "write_whole", fill_up)
    with pytest.raises(ForgeError, match=r"is full: 0.00 GB are needed.*free.*is kept"):
        prepare(config(text, tmp_path / "out", num_workers=1))
    assert len(list((tmp_path / "out").rglob("pieces/*.json"))) == 10
    monkeypatch.setattr(unfinished, "write_whole", right)
    usage = shutil._ntuple_diskusage(10, 10, 0)
    with monkeypatch.context() as full:
        full.setattr(shutil, "disk_usage", lambda _: usage)
        with pytest.raises(ForgeError, match="are needed to finish, 0.00 GB are free"):
            prepare(config(text, tmp_path / "out"))
    prepare(config(text, tmp_path / "out"))
    assert contents(tmp_path / "out") == undisturbed
    assert Manifest.load(tmp_path / "out").splits["train"].blocks > 10


def test_a_disk_that_is_really_full_is_told_at_every_moment(text, tmp_path, undisturbed):
    disk = tmp_path / "disk"
    disk.mkdir()

    def mount(size: str, *options: str) -> int:
        command = ["mount", "-t", "tmpfs", "-o", ",".join([*options, f"size={size}"]), "tmpfs"]
        return subprocess.run([*command, str(disk)], capture_output=True).returncode

    if mount("16k"):
        pytest.skip("needs the right to mount a small file system (root)")
    try:
        kept = []
        # Too small for the tokenizer, for the first piece, for all pieces, for the dataset.
        for size in ("16k", "44k", "80k", "300k", "900k"):
            assert not mount(size, "remount")
            with pytest.raises(ForgeError, match="is full: .* GB are needed.*same command"):
                prepare(config(text, disk / "out", num_workers=2))
            kept.append(len(list(disk.rglob("pieces/*.json"))))
        assert kept == sorted(kept) and kept[0] == 0 < kept[-1]
        assert not mount("9m", "remount")
        prepare(config(text, disk / "out"))
        assert contents(disk / "out") == undisturbed
    finally:
        subprocess.run(["umount", str(disk)], check=True)
