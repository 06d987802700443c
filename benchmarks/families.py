"""Train every type of transformers' causal language models for a few updates, and load it again.

    python benchmarks/families.py --results families.json
    python benchmarks/families.py --results families.json --only gemma3 qwen3

Each type runs as a user would run it: train.py in processes of its own (two ranks), with a few
sizes of the names that its configuration has. What it saves is then loaded by transformers alone,
whose own forward has to find the same evaluation loss, and in float64 the loss and the gradients of
train.py. Prints a table of all types: trained, refused and why, or failed. A type that is in the
file of results already is not run again unless it is asked for.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import shutil
import signal
import sys
import tempfile
import time
from datetime import date
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
os.environ["HF_HUB_OFFLINE"] = "1"

from p2p_llm_forge.config import PrepareConfig  # noqa: E402
from tests.runs import SEQUENCE_LENGTH, flags, start_ranks  # noqa: E402
from tests.texts import write_text  # noqa: E402
from tests.zygote import Zygote  # noqa: E402

# The sizes of a small model, by all the names that families have for them.
NAMES_OF_SIZES = {
    64: "hidden_size d_model n_embd emb_dim embedding_size word_embed_proj_dim embedding_dim"
    " input_embedding_size output_embedding_size attention_hidden_size lru_width ple_embed_dim"
    " router_hidden_size",
    2: "num_hidden_layers n_layer n_layers num_layers encoder_layers decoder_layers num_blocks"
    " num_encoder_layers num_decoder_layers num_experts_per_tok num_experts_per_token moe_topk"
    " moe_k",
    4: "num_attention_heads n_head n_heads num_heads attention_heads encoder_attention_heads"
    " decoder_attention_heads num_encoder_attention_heads num_decoder_attention_heads num_experts"
    " num_local_experts n_routed_experts moe_num_experts",
    128: "intermediate_size moe_intermediate_size ffn_dim encoder_ffn_dim decoder_ffn_dim d_inner"
    " dff dim_ff feed_forward_size ffn_hidden_size expert_ffn_hidden_size intermediate_size_mlp"
    " shared_expert_intermediate_size shared_intermediate_size",
    # Of the parts that scan, each with a head size of 16.
    8: "mamba_n_heads mamba_num_heads linear_num_key_heads linear_num_value_heads"
    " linear_num_heads index_n_heads",
    16: "linear_head_dim mamba_d_head mamba_head_dim linear_key_head_dim"
    " linear_value_head_dim rotary_dim"
    " mamba_d_state ssm_state_size hidden_size_per_layer_input",
    32: "chunk_size mamba_chunk_size",
    # Of choices among experts by groups.
    1: "n_group topk_group num_expert_group n_shared_experts",
}
SIZES = {name: size for size, names in NAMES_OF_SIZES.items() for name in names.split()}
BLT = ("patcher_config", "encoder_config", "decoder_config", "global_config")
OF_A_PART = {"hidden_size": 64, "num_attention_heads": 4, "intermediate_size": 128}
# What else a user has to give.
MORE: dict[str, dict[str, Any]] = {
    "blt": {
        **{f"{part}.{name}": size for part in BLT for name, size in OF_A_PART.items()},
        **{f"{part}.num_key_value_heads": 4 for part in BLT},
        **{f"{part}.num_hidden_layers": 2 for part in BLT},
        **{f"{part}.head_dim": 16 for part in BLT if part != "encoder_config"},
        **{f"{part}.hidden_size_global": 64 for part in ("encoder_config", "decoder_config")},
        "encoder_hash_byte_group_vocab": 100,
    },
    "cohere_compass_text": {
        "rope_parameters.full_attention.rope_type": "default",
        "rope_parameters.full_attention.rope_theta": 10000,
    },
    "dbrx": {
        "attn_config": "{rope_theta: 10000.0,clip_qkv: 8,kv_n_heads: 2}",
        "ffn_config.ffn_hidden_size": 128,
    },
    "falcon_h1": {"mamba_d_ssm": 128, "lm_head_multiplier": 0.5},
    "gemma3_text": {"final_logit_softcapping": 20.0},
    "gemma4_text": {"final_logit_softcapping": 20.0},
    "gpt_neo": {"attention_types": "[[[global,local],1]]"},
    "granite": {"logits_scaling": 8.0},
    "granitemoe": {"logits_scaling": 8.0},
    "helium": {"head_dim": 16},
    "hyperclovax": {"logits_scaling": 8.0},
    "lfm2_moe": {"layer_types": "[conv,full_attention]"},
    "mamba2": {"num_heads": 8, "head_dim": 16},
    "phi4_multimodal": {
        **{f"vision_config.{name}": size for name, size in OF_A_PART.items()},
        **{f"audio_config.{name}": size for name, size in OF_A_PART.items()},
        **{"vision_config.num_hidden_layers": 2, "audio_config.num_blocks": 2},
    },
    "reformer": {
        **{"axial_pos_embds_dim": "[16,48]", "axial_pos_shape": "[4,8]"},
        "attention_head_size": 16,
    },
    "xmod": {"default_language": "en_XX"},
    "zamba": {
        "layers_block_type": "[linear_attention,linear_attention,hybrid,hybrid]",
        **{"num_hidden_layers": 4, "mamba_dt_rank": 4},
        **{"attention_hidden_size": 128, "attention_head_dim": 32},
    },
    "zamba2": {
        "layers_block_type": "[linear_attention,hybrid]",
        **{"attention_hidden_size": 128, "attention_head_dim": 32, "mamba_headdim": 16},
    },
    "zaya": {"num_experts_per_tok": 1},
}
UPDATES = 3


def main() -> None:
    """Run what is missing, and print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=Path("families.json"))
    parser.add_argument("--only", nargs="*", help="types to run (again); default: what is missing")
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--idle-seconds", type=float, default=240.0, help="limit of one type")
    parser.add_argument("--only-table", action="store_true")
    args = parser.parse_args()
    results = json.loads(args.results.read_text()) if args.results.exists() else {}
    types = families()
    missing = args.only or [family for family in types if family not in results]
    if not args.only_table:
        with tempfile.TemporaryDirectory() as temporary:
            bench = Bench(Path(temporary), args.processes, args.idle_seconds)
            for family in missing:
                results[family] = bench.run(family)
                print(family, *list(results[family].values())[:-1], flush=True)
                args.results.write_text(json.dumps(results, indent=1))
            bench.zygote.close()
    print(table({family: results[family] for family in types if family in results}))


def families() -> list[str]:
    """The types that transformers maps to a causal language model."""
    from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

    return sorted(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES)


def sizes_of(family: str) -> str:
    """The flag --config-overrides of a small model: those of SIZES that the family has."""
    from p2p_llm_forge.model.sizes import text_part

    _, config = text_part(family)
    known = config.to_dict()
    sizes = {
        name: size
        for name, size in SIZES.items()
        if name in known and isinstance(known[name], int | None)
    }
    return ",".join(f"{name}={size}" for name, size in {**sizes, **MORE.get(family, {})}.items())


class Bench:
    """A small dataset, and processes that are forked from one that has imported everything."""

    def __init__(self, folder: Path, processes: int, limit_s: float) -> None:
        from prepare_data import prepare

        self.folder, self.processes, self.limit_s = folder, processes, limit_s
        self.zygote, self.data = Zygote(), folder / "data"
        text = write_text(folder / "text.txt", documents=200)
        prepare(
            PrepareConfig(
                [str(text)], str(self.data), vocab_size=300, sequence_length=SEQUENCE_LENGTH
            )
        )

    def run(self, family: str) -> dict[str, Any]:
        """Train, save and load one type: how it ended, and what there is to say of it."""
        output, log = self.folder / "run", self.folder / "log"
        shutil.rmtree(output, ignore_errors=True)
        log.write_text("")
        try:
            sizes = sizes_of(family)
        except Exception:  # transformers' own default does not work: train.py has to say so
            sizes = None
        settings = {"model_type": family, "config_overrides": sizes, "max_steps": UPDATES}
        words = flags(self.data, output, **settings, mixed_precision="no")
        began = time.monotonic()
        ended = self.wait(start_ranks(self.zygote, words, self.processes, log))
        said = log.read_text()
        if ended == 0:
            check = [f"--dataset={self.data}", f"--folder={output}"]
            script = "benchmarks.families_check"
            ended = self.wait([self.zygote.start(check, log, script=script)])
            said = log.read_text()
        seconds = round(time.monotonic() - began, 1)
        outcome, why = judge(ended, said)
        if outcome == "trained":
            saved = json.loads((output / "config.json").read_text())["model_type"]
            why = "" if saved == family else f"as a {saved}"
        return {"outcome": outcome, "why": why, "seconds": seconds, "flags": sizes, "log": said}

    def wait(self, pids: list[int]) -> int:
        """The worst status of these processes; killed at the limit, it is -SIGKILL."""
        deadline = time.monotonic() + self.limit_s
        while not all(self.zygote.has_ended(pid) for pid in pids):
            if time.monotonic() > deadline:
                for pid in pids:
                    with contextlib.suppress(ProcessLookupError):
                        os.kill(pid, signal.SIGKILL)
            time.sleep(0.05)
        statuses = [self.zygote.wait(pid) for pid in pids]
        return next((status for status in statuses if status), 0)


def judge(status: int, said: str) -> tuple[str, str]:
    """trained, refused or failed, and why, from how a run ended and what it has printed."""
    lines = [line for line in said.splitlines() if line.strip()]
    if "Traceback" in said:
        return "failed", lines[-1][:300]
    if status == 0:
        return "trained", ""
    first = next((n for n, line in enumerate(lines) if line.startswith("error:")), None)
    if status == 2 and first is not None:
        return "refused", lines[first].removeprefix("error: ")
    if status == -signal.SIGKILL:
        return "failed", "took too long"
    return "failed", f"status {status}: {' '.join(lines)[-300:]}"


def table(results: dict[str, dict[str, Any]]) -> str:
    """The results in Markdown."""
    import torch
    import transformers

    outcomes = ("trained", "refused", "failed")
    of = {kind: [f for f, one in results.items() if one["outcome"] == kind] for kind in outcomes}
    lines = [
        f"{date.today()}, Python {platform.python_version()}, torch {torch.__version__},"
        f" transformers {transformers.__version__}: of {len(results)} types"
        f" {len(of['trained'])} trained, {len(of['refused'])} were refused,"
        f" {len(of['failed'])} failed.",
        "",
        f"Trained: {', '.join(f for f in of['trained'] if not results[f]['why'])}.",
        "",
        "| type | | |",
        "|---|---|---|",
    ]
    for outcome in outcomes:
        for family in of[outcome]:
            if why := results[family]["why"].replace("|", "/"):
                lines.append(f"| {family} | {outcome} | {why} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
