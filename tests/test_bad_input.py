"""Bad input of every kind gets one message that says what was found, and status 2; each a line.

A line is what is typed after `train.py`, `prepare_data.py`, ..., perhaps with
variables of the environment before it, and words that the message must hold. `@` is the folder of
tests/bad_files.py, `%` a good dataset. What is typed comes after the words of a good run.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import resource
import shlex
import shutil
from pathlib import Path

import pytest

from tests.bad_files import make_bad_files
from tests.bad_words import TRAIN

PREPARE = r"""
--dataset-path -> --dataset-path: expected
--dataset-path= -> no text given
--dataset-path=@/nothing.txt -> no such file
--dataset-path=@/folder -> folder without text
--dataset-path=@/empty.txt -> empty.txt
--dataset-path=@/blank.txt -> the text is too short
--dataset-path=@/latin.txt -> UTF-8
--dataset-path=@/bytes.txt -> UTF-8
--dataset-path=@/pipe.txt -> pipe.txt
--dataset-path=/dev/zero -> /dev/zero
--dataset-path=@/loop -> loop
--dataset-path=@/dangling.txt -> dangling.txt
--dataset-path=@/garbage.txt.gz -> garbage.txt.gz is damaged
--dataset-path=@/garbage.gz -> garbage.gz
--dataset-path=@/cut.txt.gz -> cut.txt.gz is damaged
--dataset-path=@/garbage.txt.zst -> garbage.txt.zst is damaged
--dataset-path=@/garbage.txt.xz -> garbage.txt.xz is damaged
--dataset-path=@/cut.txt.xz -> cut.txt.xz is damaged
--dataset-path=@/cut.txt.bz2 -> cut.txt.bz2 is damaged
--dataset-path=@/shrt.txt -> short.txt?
--dataset-path=@/garbage.parquet -> garbage.parquet
--dataset-path=@/cut.parquet -> cut.parquet
--dataset-path=@/empty.parquet -> empty.parquet
--dataset-path=@/numbers.parquet -> numbers.parquet
--dataset-path=@/other.parquet -> other.parquet
--dataset-path=@/garbage.jsonl -> garbage.jsonl
--dataset-path=@/numbers.jsonl -> numbers.jsonl
--dataset-path=@/other_key.jsonl -> other_key.jsonl
--dataset-path=@/not_text.jsonl -> not_text.jsonl
--dataset-path=@/surrogate.jsonl -> is too short
--dataset-path=@/deep.jsonl -> deep.jsonl
--dataset-path=@/garbage.json -> garbage.json
--dataset-path=@/dict.json -> dict.json
--dataset-path=@/deep.json -> deep.json
--dataset-path=@/other.csv -> other.csv
--dataset-path=@/ragged.csv -> ragged.csv
--dataset-path=@/quote.csv -> quote.csv, line 2: a quote opens
--dataset-path=@/book.pdf -> book.pdf
--dataset-path=@/archive.zip -> archive.zip
--dataset-path=@/*.nothing -> no file matches
--dataset-path=@/short.txt:0 -> weight
--dataset-path @/short.txt:1 @/blank.txt -> has no weight
--dataset-path=no-such/dataset-anywhere -> no-such/dataset-anywhere
--dataset-path=% -> has no text column
--dataset-path=@/data_arrow_cut/train -> data_arrow_cut
--dataset-path=@/data_state_list/train -> data_state_list
--dataset-path=@/data_no_state -> data_no_state
$'--dataset-path=@/a\nb.txt' -> no such file
$'--dataset-path=@/a\x00b.txt' -> holds a NUL character
--dataset-path=@/LONG.txt -> is too long
--dataset-path=@/LONG -> is too long
--output-dir=@/LONG -> is too long
$'--dataset-path=@/a\udc80.txt' -> no such file
--validation-path=@/nothing.txt -> --validation-path
--validation-path=@/empty.txt -> --validation-path
--validation-fraction=1 -> --validation-fraction is 1
--validation-fraction=nan -> --validation-fraction is nan
--validation-fraction=-0.1 -> --validation-fraction is -0.1
--document-separator= -> --document-separator is empty
'--document-separator=\x' -> --document-separator
$'--document-separator=\udc80' -> --document-separator
--text-column=body --dataset-path=@/not_text.jsonl -> body
--text-column=text.b --dataset-path=@/not_text.jsonl -> found text.a
--text-column=a,,b -> a column without a name
--csv-delimiter= -> --csv-delimiter is ''
--csv-delimiter=;; -> --csv-delimiter is ';;'
'--csv-delimiter="' -> --csv-delimiter
--csv-delimiter=ß -> --csv-delimiter is 'ß'
'--csv-delimiter=;' --dataset-path=@/other.csv -> found a,b
--tokenizer=@/nothing -> @/nothing could not be loaded
--tokenizer=@/folder -> could not be loaded
--tokenizer=@/empty.txt -> could not be loaded
--tokenizer=@/tokenizer_empty -> could not be loaded
--tokenizer=@/tokenizer_list -> could not be loaded
--tokenizer=@/tokenizer_garbage -> could not be loaded
--tokenizer=@/tokenizer_nothing -> could not be loaded
--tokenizer=@/tokenizer_deep -> could not be loaded
--tokenizer=@/tokenizer_model_odd -> could not be loaded
--tokenizer=@/tokenizer_surrogate -> could not be loaded
--tokenizer=@/tokenizer_config_list -> could not be loaded
--tokenizer=@/tokenizer_no_eos -> names no end-of-text token
$'--tokenizer=@/tokenizer_no_eos' $'--eos-token=\udc80' -> --eos-token
--tokenizer=no-such/tokenizer-anywhere -> could not be loaded
--eos-token= --tokenizer=@/tokenizer_no_eos -> --eos-token
--vocab-size=0 -> --vocab-size is 0
--vocab-size=-1 -> --vocab-size is -1
--vocab-size=1e4 -> --vocab-size is '1e4'
--vocab-size=99999999999999999999 -> --vocab-size
--sequence-length=1 -> --sequence-length is 1
--sequence-length=-5 -> --sequence-length is -5
--sequence-length=99999999999 -> --sequence-length
--sequence-length=99999999999999999999999 -> --sequence-length
--num-workers=-1 -> --num-workers is -1
--num-workers=99999999 -> --num-workers
--seed=99999999999999999999999 -> --seed
--tokenizer-backend=foo -> --tokenizer-backend is 'foo'
--encoding-errors=ignore -> --encoding-errors is 'ignore'
--output-dir= -> no place for the result
--output-dir=@/empty.txt -> empty.txt
--output-dir=@/empty.txt/data -> empty.txt
--output-dir=@/loop -> loop
--output-dir=/proc/data -> /proc/data
--output-dir=@/folder.txt/../model -> model
--describe -> --describe: expected one argument
--describe=@/nothing -> no such folder
--describe=@/folder -> is not a prepared dataset
--describe=@/data_manifest_null -> manifest
--describe=@/data_arrow_cut -> cannot be read
--describe=@/data_arrow_beyond -> vocabulary
--describe=@/data_no_tokenizer -> tokenizer
--describe=@/data_tokenizer_deep -> tokenizer
--describe=@/data_arrow_cut --verify -> is damaged
--describe=@/data_manifest_changed --verify -> was changed after it was written
--verify -> add --describe FOLDER
--config=@/bomb.yaml -> bomb.yaml
--config=@/deep.yaml -> deep.yaml
--config=@/boolean.yaml -> prepare_data.py has no --epochs
RANK=x WORLD_SIZE=2 -> RANK is 'x'
RANK=3 WORLD_SIZE=2 -> RANK
"""

CHECK = r"""
--config-file -> --config-file
--config-file=@/nothing.yaml -> no such file
--config-file=@/folder.yaml -> folder.yaml
--config-file=@/bomb.yaml -> bomb.yaml
--config-file=@/deep.yaml -> deep.yaml
--config-file=@/list.yaml -> holds a list
--config-file=@/latin.yaml -> is not YAML
--config-file=@/pipe.yaml -> pipe.yaml
--config-file=/dev/zero -> /dev/zero
--meet -> --meet needs the file
--hosts=10.0.0.1 -> belong together
--write-configs=@/new --hosts 10.0.0.1 10.0.0.1 -> twice
--write-configs=@/new --hosts a@b -> is no address
--write-configs=@/new --hosts 10.0.0.300 -> is no address
--write-configs=@/empty.txt --hosts 10.0.0.1 -> empty.txt
--write-configs=@/loop --hosts 10.0.0.1 -> loop
--write-configs=@/new --hosts 10.0.0.1 10.0.0.2 --master-port=99999 -> --master-port is 99999
--write-configs=@/new --hosts 10.0.0.1 --gpus-per-host=0 -> --gpus-per-host is 0
--write-configs=@/new --hosts 10.0.0.1 --gpus-per-host=1 --cpu -> contradict
--batch-size=0 -> --batch-size is 0
--json=perhaps -> --json is 'perhaps'
"""

ELASTIC = r"""
train.py -> --main is missing
--main=127.0.0.1 -> no script to start
--main=127.0.0.1 @/nothing.py -> no such file
--main=127.0.0.1 --port=99999 train.py -> --port is 99999
--main=127.0.0.1 --port=x train.py -> --port
--main=127.0.0.1 --processes=0 train.py -> --processes is 0
--main=127.0.0.1 --lost-after=nan train.py -> --lost-after is nan
--main=127.0.0.1 --min-peers=3 --max-peers=2 train.py -> --max-peers 2 is below
--main=127.0.0.1 --foo train.py -> unknown argument --foo
--main=127.0.0.1 --secret-file=@/nothing train.py -> @/nothing
--main=127.0.0.1 --secret-file=@/short.secret train.py -> @/short.secret
--main=10.255.255.1 train.py -> secret
--main=no.such.host.invalid --secret-file=@/good.secret train.py -> no.such.host.invalid
--main=a..b --secret-file=@/good.secret train.py -> a..b
"""

GOOD = {
    "train": "--dataset-path=% --output-dir=@/out --max-steps=1 --cpu-threads=1 --report-to=none",
    "prepare_data": "--dataset-path=@/good.txt --output-dir=@/out --vocab-size=300"
    " --sequence-length=16 --num-workers=1",
    "check_cluster": "",
    "launch.elastic": "",
}
BY_HAND = "--rank=0 --world-size=2 --master-addr=127.0.0.1 --master-port=29500"
LISTS = {"train": TRAIN, "prepare_data": PREPARE, "check_cluster": CHECK, "launch.elastic": ELASTIC}
KINDS = [
    (script, *line.rsplit(" -> ", 1))
    for script, lines in LISTS.items()
    for line in lines.strip().splitlines()
]
LONGEST_CPU_S = 60  # of one process; the slowest needs a few


@pytest.fixture(scope="module")
def kit(prepared, text_file, tmp_path_factory):
    folder = tmp_path_factory.mktemp("bad") / "kit"
    make_bad_files(folder, prepared)
    (folder / "good.txt").write_bytes(text_file.read_bytes())
    return folder


def typed(line: str, kit: Path, data: Path) -> tuple[dict[str, str], list[str]]:
    """The variables and the words of a line, as a shell would read it; $'...' knows escapes."""
    found: list[str] = []
    line = line.replace("BY_HAND", BY_HAND).replace("LONG", "x" * 5000)
    for word in shlex.split(line.replace("$'", "'\x01")):
        plain, is_escaped, escaped = word.partition("\x01")
        word = plain + (escaped.encode().decode("unicode_escape") if is_escaped else "")
        word = f"{word[:-1]}{data}" if word.endswith("=%") else word
        found.append(word.replace("@/", f"{kit}/"))
    names = [word.split("=")[0] for word in found]
    first = next((n for n, name in enumerate(names) if not name.isupper()), len(names))
    return dict(word.split("=", 1) for word in found[:first]), found[first:]


def state_of(folder: Path) -> str:
    """A digest of every name, size and time of change below a folder."""
    facts = [
        (str(path), stat.st_size, stat.st_mtime_ns if not path.is_dir() else 0)
        for path in sorted(folder.rglob("*"))
        for stat in [path.lstat()]
    ]
    assert facts
    return hashlib.sha256(repr(facts).encode("utf-8", "surrogateescape")).hexdigest()


@pytest.mark.parametrize(
    ("script", "line", "expected"), KINDS, ids=[f"{k[0]} {k[1]}" for k in KINDS]
)
def test_bad_input_gets_one_message(script, line, expected, kit, prepared, zygote, tmp_path):
    environ, words = typed(line, kit, prepared)
    _, good = typed(GOOD[script], kit, prepared)
    before, log = state_of(kit), tmp_path / "log"
    pid = zygote.start([*good, *words], log, {"HF_HUB_OFFLINE": "1", **environ}, script=script)
    with contextlib.suppress(ProcessLookupError):  # it has ended already
        resource.prlimit(pid, resource.RLIMIT_CPU, (LONGEST_CPU_S, LONGEST_CPU_S))
    status, printed = zygote.wait(pid), log.read_text("utf-8", errors="replace")
    written = (kit / "out").exists()
    shutil.rmtree(kit / "out", ignore_errors=True)  # the other lines write there, too
    assert status == 2, printed
    assert "Traceback" not in printed, printed
    messages = [one for one in printed.splitlines() if one.startswith("error: ")]
    assert len(messages) == 1, printed
    assert expected.replace("@", str(kit)) in printed and "fix: " in printed, printed
    assert not written, "something was written"
    assert state_of(kit) == before, "what was there was changed"
    assert not os.path.lexists("/tmp/owned")
