"""Files and folders that are wrong in one way each: what accidents and strangers leave."""

from __future__ import annotations

import bz2
import gzip
import json
import lzma
import os
import shutil
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from tests.texts import write_manifest

DEEP = "[" * 100_000 + "]" * 100_000
BOMB = "a0: &a0 [x, x]\n" + "".join(
    f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 10)}]\n" for n in range(1, 12)
)
# By name: the text or bytes of a file.
PLAIN: dict[str, str | bytes] = {
    "empty.txt": "",
    "blank.txt": "\n\n  \n\n",
    "short.txt": "a",
    "latin.txt": "Stra\xdfe\n\n".encode("latin-1") * 50,
    "utf16.txt": ("Wort " * 50).encode("utf-16"),
    "bytes.txt": bytes(range(256)) * 10,
    "garbage.gz": b"no gzip at all",
    "garbage.txt.gz": b"no gzip at all",
    "cut.txt.gz": gzip.compress(b"some words\n\n" * 500)[:-20],
    "garbage.txt.zst": b"no zstd at all",
    "garbage.txt.xz": b"no xz at all",
    "cut.txt.xz": lzma.compress(b"some words\n\n" * 500)[:-20],
    "cut.txt.bz2": bz2.compress(b"some words\n\n" * 500)[:-20],
    "garbage.parquet": b"PAR1 and no more",
    "cut.parquet": b"PAR1" + bytes(40) + b"PAR1",
    "empty.parquet": b"",
    "garbage.jsonl": "{no json\n",
    "numbers.jsonl": "1\n2\n",
    "other_key.jsonl": '{"body": "some text"}\n' * 20,
    "not_text.jsonl": '{"text": {"a": 1}}\n' * 20,
    "surrogate.jsonl": '{"text": "\\ud800"}\n' * 20,
    "deep.jsonl": '{"text": ' + DEEP + "}\n",
    "garbage.json": "[{",
    "dict.json": '{"text": 1}',
    "deep.json": DEEP,
    "other.csv": "a,b\n1,2\n",
    "ragged.csv": "text\none\ntwo,three,four\n",
    "quote.csv": 'text\n"never ends\n',
    "book.pdf": b"%PDF-1.7",
    "archive.zip": b"PK\x03\x04",
    "bomb.yaml": BOMB,
    "list.yaml": "- 1\n",
    "number.yaml": "5\n",
    "word.yaml": "word\n",
    "tabs.yaml": "a:\n\tb: 1\n",
    "unclosed.yaml": "a: [1, 2\n",
    "deep.yaml": "a: " + "[" * 3000 + "]" * 3000,
    "latin.yaml": "output_dir: stra\xdfe\n".encode("latin-1"),
    "nul.yaml": "output_dir: a\x00b\n",
    "object.yaml": "seed: !!python/object/apply:os.system ['touch /tmp/owned']\n",
    "unknown.yaml": "batch_sice: 4\n",
    "list_value.yaml": "batch_size: [1, 2]\n",
    "word_value.yaml": "batch_size: many\n",
    "date_value.yaml": "seed: 2020-01-01\n",
    "nested.yaml": "batch_size: {a: {b: c}}\n",
    "nan.yaml": "learning_rate: .nan\n",
    "boolean.yaml": "dataset_path: true\nepochs: yes\n",
    "complex_key.yaml": "? [a, b]\n: c\n",
    "itself.yaml": "batch_size: &a {b: *a}\n",
    "documents.yaml": "seed: 1\n---\nseed: 2\n",
    "huge.yaml": "# " + "x" * (4 << 20) + "\nseed: 1\n",
    "huge_number.yaml": "seed: " + "9" * 6000 + "\n",
    "config_in_config.yaml": "config: other.yaml\n",
    "short.secret": "x\n",
    "empty.secret": "",
}
# What is changed in a prepared dataset's manifest; a value that is called "absent" is taken out.
MANIFESTS: dict[str, dict[str, Any]] = {
    "future": {"format_version": 99},
    "version_word": {"format_version": "three"},
    "version_list": {"format_version": []},
    "no_splits": {"splits": {}},
    "splits_list": {"splits": []},
    "splits_absent": {"splits": "absent"},
    "split_word": {"splits": {"train": "all"}},
    "split_empty": {"splits": {"train": {}}},
    "blocks_other": {"splits": {"train": {"documents": 1, "blocks": 5, "tokens": 160}}},
    "length_zero": {"sequence_length": 0},
    "length_negative": {"sequence_length": -32},
    "length_word": {"sequence_length": "long"},
    "length_other": {"sequence_length": 48},
    "length_huge": {"sequence_length": 10**12},
    "vocabulary_zero": {"vocab_size": 0},
    "vocabulary_huge": {"vocab_size": 10**15},
    "vocabulary_word": {"vocab_size": "many"},
    "vocabulary_small": {"vocab_size": 20},
    "eos_beyond": {"eos_token_id": 999},
    "eos_none": {"eos_token_id": None},
    "dtype_other": {"dtype": "float32"},
    "skipped_null": {"skipped_rows": None},
    "fingerprint_null": {"content_fingerprint": None},
    "files_null": {"files": None},
    "files_none": {"files": {}},
    "field_more": {"surprise": 1},
    "field_absent": {"tokenizer_fingerprint": "absent"},
    "arguments_list": {"arguments": []},
}
MANIFEST_TEXTS = {"null": "null", "list": "[]", "empty": "", "garbage": "{", "deep": DEEP}
MANIFEST_TEXTS |= {"surrogate": '{"format_version": "\\ud800"}', "nan": '{"format_version": NaN}'}
# The text of a model's config.json, or changes of a good one.
CONFIGS: dict[str, Any] = {
    "list": "[]",
    "null": "null",
    "number": "7",
    "empty": "",
    "garbage": "{",
    "deep": DEEP,
    "nothing": "{}",
    "type_unknown": {"model_type": "foo"},
    "type_number": {"model_type": 5},
    "type_other": {"model_type": "vit"},
    "type_seq2seq": {"model_type": "t5"},
    "heads_zero": {"n_head": 0},
    "heads_word": {"n_head": "two"},
    "layers_negative": {"n_layer": -1},
    "layers_more": {"n_layer": 9},
    "width_other": {"n_embd": 64},
    "width_huge": {"n_embd": 10**9, "n_head": 1},
    "width_null": {"n_embd": None},
    "activation": {"activation_function": "foo"},
    "remote_code": {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine"}},
    "quantized": {"quantization_config": {"quant_method": "foo"}},
}
TOKENIZERS = {"empty": "{}", "list": "[]", "garbage": "{", "nothing": "", "deep": DEEP}
TOKENIZERS |= {
    "model_odd": '{"version": "1.0", "model": {"type": "Odd"}}',
    "surrogate": '"\\ud800"',
}


def make_bad_files(kit: Path, prepared: Path) -> None:
    """Fill the folder `kit`; prepared: a good dataset, of which copies are damaged."""
    kit.mkdir()
    for name, content in PLAIN.items():
        encoded = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
        (kit / name).write_bytes(encoded)
    pq.write_table(pa.table({"text": [1, 2, 3]}), kit / "numbers.parquet")
    pq.write_table(pa.table({"other": ["a"]}), kit / "other.parquet")
    (kit / "short.secret").chmod(0o600)
    (kit / "empty.secret").chmod(0o600)
    (kit / "good.secret").write_text("0123456789abcdef0123456789abcdef\n")
    (kit / "good.secret").chmod(0o600)
    (kit / "open.secret").write_text("0123456789abcdef0123456789abcdef\n")
    (kit / "open.secret").chmod(0o644)
    for name in ("folder", "folder.txt", "folder.yaml", "folder.secret"):
        (kit / name).mkdir()
    (kit / "loop").symlink_to("loop")
    (kit / "dangling.txt").symlink_to("nothing")
    os.mkfifo(kit / "pipe.txt")
    os.mkfifo(kit / "pipe.yaml")
    make_bad_datasets(kit, prepared)
    make_bad_models(kit, prepared)
    make_bad_tokenizers(kit, prepared)


def make_bad_datasets(kit: Path, prepared: Path) -> None:
    """Copies of a prepared dataset, each damaged: `data_...`."""

    def copy(name: str) -> Path:
        return Path(shutil.copytree(prepared, kit / f"data_{name}"))

    good = json.loads((prepared / "manifest.json").read_text())
    for name, changes in MANIFESTS.items():
        content = {k: v for k, v in {**good, **changes}.items() if v != "absent"}
        if name == "blocks_other":
            content["splits"] = {
                **good["splits"],
                "train": {**good["splits"]["train"], "blocks": 5},
            }
        write_manifest(copy(name), content)
    text = (prepared / "manifest.json").read_text()
    changed = {"changed": text.replace('"tokens": ', '"tokens": 1', 1), "spaced": text + " "}
    for name, text in (MANIFEST_TEXTS | changed).items():
        (copy(f"manifest_{name}") / "manifest.json").write_text(text)
    (copy("no_manifest") / "manifest.json").unlink()
    shutil.rmtree(copy("no_train") / "train")
    shutil.rmtree(copy("no_tokenizer") / "tokenizer")
    (copy("no_state") / "train" / "state.json").unlink()
    (copy("state_list") / "train" / "state.json").write_text("[]")
    (copy("info_list") / "train" / "dataset_info.json").write_text("[]")
    for name, text in TOKENIZERS.items():
        (copy(f"tokenizer_{name}") / "tokenizer" / "tokenizer.json").write_text(text)
    for name in ("cut", "empty", "garbage", "beyond", "other_type", "other_column", "no_arrow"):
        damage_arrow(next((copy(f"arrow_{name}") / "train").glob("*.arrow")), name)


def damage_arrow(file: Path, how: str) -> None:
    """Damage the blocks of a split."""
    raw = file.read_bytes()
    with pa.ipc.open_stream(raw) as stream:
        column = stream.read_all().column("input_ids").combine_chunks()
    if how == "beyond":  # as flipped bits leave it: tokens that the vocabulary does not have
        values = column.values.to_numpy().copy()
        values[:] |= 0x8000
        column = pa.FixedSizeListArray.from_arrays(pa.array(values), len(values) // len(column))
    if how == "other_type":
        column = pa.array([str(n) for n in range(len(column))])
    if how == "no_arrow":
        return file.unlink()
    if how in ("cut", "empty", "garbage"):
        file.write_bytes({"cut": raw[: len(raw) // 2], "empty": b""}.get(how, b"x" * len(raw)))
        return
    table = pa.table({"other" if how == "other_column" else "input_ids": column})
    with pa.ipc.new_stream(file, table.schema) as stream:
        stream.write_table(table)


def make_bad_models(kit: Path, prepared: Path) -> None:
    """Folders of models, each damaged: `model_...`, and a good one: `model`."""
    from transformers import GPT2Config, GPT2LMHeadModel

    sizes = {"n_layer": 1, "n_head": 2, "n_embd": 32, "n_positions": 32, "vocab_size": 300}
    GPT2LMHeadModel(GPT2Config(**sizes, bos_token_id=0, eos_token_id=0)).save_pretrained(
        kit / "model"
    )
    for file in (prepared / "tokenizer").iterdir():
        shutil.copy(file, kit / "model")
    config = json.loads((kit / "model" / "config.json").read_text())
    raw = (kit / "model" / "model.safetensors").read_bytes()

    def copy(name: str) -> Path:
        return Path(shutil.copytree(kit / "model", kit / f"model_{name}"))

    for name, change in CONFIGS.items():
        text = change if isinstance(change, str) else json.dumps({**config, **change})
        (copy(name) / "config.json").write_text(text)
    (copy("no_config") / "config.json").unlink()
    (copy("no_weights") / "model.safetensors").unlink()
    contents = {"cut": raw[: len(raw) // 2], "empty": b"", "garbage": b"x" * 5000}
    contents |= {"head": (2**60).to_bytes(8, "little") + raw[8:], "header": raw[:7]}
    for name, content in contents.items():
        (copy(f"weights_{name}") / "model.safetensors").write_bytes(content)
    folder = copy("weights_folder") / "model.safetensors"
    folder.unlink()
    folder.mkdir()
    pickle = copy("pickle")
    (pickle / "model.safetensors").rename(pickle / "pytorch_model.bin")
    shards = copy("no_shard")
    (shards / "model.safetensors").unlink()
    index = {"metadata": {}, "weight_map": {"lm_head.weight": "model-00001-of-00002.safetensors"}}
    (shards / "model.safetensors.index.json").write_text(json.dumps(index))
    odd = copy("index_list")
    (odd / "model.safetensors").unlink()
    (odd / "model.safetensors.index.json").write_text("[]")


def make_bad_tokenizers(kit: Path, prepared: Path) -> None:
    """Folders of tokenizers, each damaged: `tokenizer_...`."""
    for name, text in TOKENIZERS.items():
        folder = Path(shutil.copytree(prepared / "tokenizer", kit / f"tokenizer_{name}"))
        (folder / "tokenizer.json").write_text(text)
    folder = Path(shutil.copytree(prepared / "tokenizer", kit / "tokenizer_no_eos"))
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    for key in ("eos_token", "bos_token"):
        settings.pop(key)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    for name in ("special_tokens_map.json",):
        (folder / name).unlink(missing_ok=True)
    folder = Path(shutil.copytree(prepared / "tokenizer", kit / "tokenizer_config_list"))
    (folder / "tokenizer_config.json").write_text("[]")
