"""All that a GPU can show of this project, in at most 9 minutes by one command:

    python benchmarks/gpu.py --results results/
    python benchmarks/gpu.py --device cpu --tiny --results /tmp/rehearsal   # every part, tiny

Made for a machine that it meets for the first time: it needs nothing but Python, says what it
finds, and skips what cannot run. Every part is a process with a share of the time; the parts run in
the order of their worth, and after each, and every few seconds, the tables are written again
(gpu.md, gpu.json; all that was printed is in gpu.log), so that a run that is cut off still reports.
--wheels: a folder of wheels of packages that the machine lacks; they are unpacked beside the work.
"""

from __future__ import annotations

import argparse
import contextlib
import datetime
import json
import os
import platform
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
LEAST_FREE = 2**35  # bytes in memory below which work goes to the disk
OUTCOMES = re.compile(r"^(tests/\S+(?: [^ ]*\])?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL|XPASS)", re.M)
# Dense bf16 (fp16 where there is none), in FLOP/s, of the makers' data sheets; the first that fits.
DATA_SHEETS = {
    **{"B200": 2250e12, "H200": 989.4e12, "H100 PCIe": 756e12, "H100 NVL": 835e12},
    **{"H100": 989.4e12, "GH200": 989.4e12, "A100": 312e12, "A10G": 70e12, "A10": 125e12},
    **{"L40S": 362e12, "L4": 121e12, "RTX 4090": 165.2e12, "RTX 3090": 71e12, "V100": 125e12},
    **{"T4": 65e12},
}
GPT2 = {"n_layer": 12, "n_head": 12, "n_embd": 768}
GPT2 |= {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
# Qwen3-0.6B's sizes; with the vocabulary of GPT-2, that of the blocks, 0.49 billion parameters.
QWEN3 = {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28}
QWEN3 |= {"num_attention_heads": 16, "num_key_value_heads": 8, "head_dim": 128}
QWEN3 |= {"tie_word_embeddings": True}
TINY_GPT2 = {**GPT2, "n_layer": 2, "n_head": 2, "n_embd": 32}
TINY_QWEN3 = {**QWEN3, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
TINY_QWEN3 |= {"num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 16}


@dataclass(frozen=True)
class Model:
    """A model that is measured, and what of its sizes its FLOPs follow from."""

    name: str
    family: str
    sizes: dict[str, Any]
    layers: int
    attention_width: int  # heads x width of a head
    positions_width: int  # of an embedding of positions, which multiplies nothing

    def overrides(self) -> str:
        return ",".join(f"{key}={value}" for key, value in self.sizes.items())

    def flops_per_token(self, parameters: int, length: int) -> float:
        """Forward and backward. Source: PaLM (arXiv 2204.02311), appendix B; nanoGPT counts so."""
        multiplied = parameters - self.positions_width * length
        return 6 * multiplied + 12 * self.layers * self.attention_width * length


MODELS = {
    False: [
        Model("GPT-2 124M", "gpt2", GPT2, 12, 768, 768),
        Model("qwen3 0.5B", "qwen3", QWEN3, 28, 2048, 0),
    ],
    True: [
        Model("GPT-2 124M", "gpt2", TINY_GPT2, 2, 32, 32),
        Model("qwen3 0.5B", "qwen3", TINY_QWEN3, 2, 32, 0),
    ],
}


@dataclass
class Part:
    """One process: what it shows, its command line, and the most and the least time for it."""

    name: str
    words: list[str]
    most_s: float
    least_s: float = 15.0
    needs: tuple[str, ...] = ("torch",)
    model: Model | None = None
    outcome: str = "not reached"
    seconds: float = 0.0
    tail: str = ""  # the end of what it printed, where it failed


@dataclass
class Report:
    """What is known so far, and its files."""

    folder: Path
    facts: dict[str, Any]
    parts: list[Part]
    length: int  # tokens in a block
    lacking: dict[str, str] = field(default_factory=dict)  # packages that are not as required
    figures: dict[str, dict[str, Any]] = field(default_factory=dict)  # of a part, by its name
    tests: dict[str, str] = field(default_factory=dict)  # outcome of a test

    def write(self) -> None:
        """Write both files, each in one piece."""
        content = {key: vars(self)[key] for key in ("facts", "lacking", "figures", "tests")}
        content["parts"] = [{**vars(one), "model": None} for one in self.parts]
        for name, text in (("gpu.json", json.dumps(content, indent=1)), ("gpu.md", self.text())):
            growing = self.folder / f".{name}"
            growing.write_text(text.rstrip() + "\n", encoding="utf-8")
            growing.replace(self.folder / name)

    def text(self) -> str:
        """The tables, in Markdown."""
        bad = [one for one in self.parts if one.tail]
        failures = [f"### {one.name}\n\n```\n{one.tail}\n```\n" for one in bad]
        found = rows("found", "", *({**self.facts, **self._lacking_fact()}).items())
        wrong = [name for name, outcome in self.tests.items() if outcome in ("FAILED", "ERROR")]
        counts = {one: [*self.tests.values()].count(one) for one in sorted({*self.tests.values()})}
        lines = [f"# A GPU, {self.facts['date']}", "", *found, "", "## Speed", ""]
        lines += [*self._speeds(), "", "## Loss and its head", "", *self._losses(), "", "## Tests"]
        lines += ["", ", ".join(f"{n} {what.lower()}" for what, n in counts.items()) or "none", ""]
        lines += [f"- {name}: {self.tests[name]}" for name in wrong]
        spent = [(one.name, f"{one.seconds:.0f} s", one.outcome) for one in self.parts]
        lines += ["", "## Parts", "", *rows("part", "time", "outcome", *spent)]
        return "\n".join([*lines, "", *(["## What failed", "", *failures] if failures else [])])

    def _lacking_fact(self) -> dict[str, str]:
        wrong = ", ".join(f"{name} ({why})" for name, why in self.lacking.items())
        return {"packages not as requirements.txt has them": wrong or "none"}

    def _speeds(self) -> list[str]:
        """Tokens a second, MFU and memory of each arm, beside Hugging Face's plain loop."""
        table = []
        peaks = self.figures.get("matrix products", {}).get("flops", {})
        measured, sheet = max(peaks.values(), default=None), self.facts.get("data sheet FLOP/s")
        for part in self.parts:
            figures = self.figures.get(part.name)
            if part.model is None or not figures or not figures.get("segments_s"):
                continue
            speed = tokens_per_s(figures)
            plain = self.figures.get(f"{part.model.name}, Hugging Face's loop")
            flops = speed * part.model.flops_per_token(figures["parameters"], self.length)
            table.append(
                (
                    part.name,
                    f"{figures['parameters'] / 1e6:.0f} M",
                    f"{speed:,.0f}",
                    f"{speed / tokens_per_s(plain):.2f}" if plain else "-",
                    f"{flops / sheet:.1%}" if sheet else "-",
                    f"{flops / measured:.1%}" if measured else "-",
                    f"{figures['peak_bytes'] / 1e9:.2f}",
                    f"{figures['overhead']:.1%}" if "overhead" in figures else "-",
                    spread(figures),
                )
            )
        heads = ("model and loop", "parameters", "tokens/s", "x Hugging Face's loop", "MFU")
        heads += ("of measured products", "peak GB", "loop without the update", "spread")
        return rows(*heads, *table)

    def _losses(self) -> list[str]:
        table = []
        for row in self.figures.get("loss by chunks", {}).get("rows", []):
            chunk = row["chunk_values"]
            chunk = f"2^{chunk.bit_length() - 1} logits at a time" if chunk else "all logits"
            spent = f"{1e3 * row['seconds']:.2f} ms", f"{row['flops'] / 1e12:.1f}"
            peak = f"{row['peak_bytes'] / 1e9:.2f}"
            table.append((f"vocabulary {row['vocab_size']:,}, {chunk}", *spent, peak))
        return rows("bf16, forward and backward", "time", "TFLOP/s", "peak GB", *table)


def rows(*cells: Any) -> list[str]:
    """A Markdown table: titles, which are texts, and then rows, which are tuples."""
    titles = [cell for cell in cells if isinstance(cell, str)]
    body = [cell for cell in cells if not isinstance(cell, str)]
    lines = [titles, ["---"] * len(titles), *body]
    return ["| " + " | ".join(str(cell) for cell in line) + " |" for line in lines]


def tokens_per_s(figures: dict[str, Any]) -> float:
    """Of the median segment."""
    middle = sorted(figures["segments_s"])[len(figures["segments_s"]) // 2]
    return figures["updates"] * figures["tokens_per_update"] / middle


def spread(figures: dict[str, Any]) -> str:
    """How far the segments are apart."""
    low, high = min(figures["segments_s"]), max(figures["segments_s"])
    return f"{(high - low) / low:.1%} of {len(figures['segments_s'])}"


# --- what the machine has -------------------------------------------------------------------------


def lacking(requirements: Path) -> dict[str, str]:
    """The packages of requirements.txt that are missing here, older or newer, and how."""
    wrong = {}
    for line in requirements.read_text(encoding="utf-8").splitlines():
        if not (known := re.match(r"([A-Za-z][\w-]*)>=([\d.]+),<([\d.]+)", line)):
            continue
        name, least, most = known.groups()
        try:
            version = metadata.version(name)
        except metadata.PackageNotFoundError:
            wrong[name] = "missing"
            continue
        if numbers(version) < numbers(least):
            wrong[name] = f"{version}, older than {least}"
        elif numbers(version) >= numbers(most):
            wrong[name] = f"{version}, not below {most}"
    return wrong


def numbers(version: str) -> tuple[int, ...]:
    """A version for comparing: 2.11.0+cu130 is (2, 11)."""
    whole = tuple(int(one) for one in re.findall(r"\d+", version.partition("+")[0]))
    while whole and not whole[-1]:
        whole = whole[:-1]
    return whole


def unpack_wheels(folder: Path, site: Path, log: Path) -> str:
    """Install the wheels of a folder into `site`, all or as many as can be; says what came of it.

    Without their dependencies: those that are there stay as they are.
    """
    wheels = sorted(folder.glob("*.whl"))
    pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps"]
    pip += ["--no-compile", "--upgrade", "--target", str(site)]

    def install(some: list[Path]) -> bool:
        with log.open("a") as output, contextlib.suppress(subprocess.TimeoutExpired, OSError):
            words = [*pip, *map(str, some)]
            done = subprocess.run(words, stdout=output, stderr=output, timeout=120, check=False)
            return done.returncode == 0
        return False

    failed = [] if not wheels or install(wheels) else [one for one in wheels if not install([one])]
    return f"{len(wheels) - len(failed)} of {len(wheels)}" + "".join(
        f", not {f.name}" for f in failed
    )


def facts_here() -> dict[str, Any]:
    """What Python alone knows of this machine."""
    versions = {}
    for name in ("transformers", "accelerate", "datasets", "triton", "pytest"):
        with contextlib.suppress(metadata.PackageNotFoundError):
            versions[name] = metadata.version(name)
    return {
        "date": datetime.date.today().isoformat(),
        "python": platform.python_version(),
        "machine": f"{platform.machine()}, {os.cpu_count()} cores",
        **{name: versions.get(name, "missing") for name in ("transformers", "accelerate")},
        **versions,
    }


# --- the parts ------------------------------------------------------------------------------------


def parts_of(asked: argparse.Namespace, work: Path, memory_bytes: float) -> list[Part]:
    """All parts, the most telling first. memory_bytes: of the card."""
    tiny, data = asked.tiny, work / "blocks"
    on = ["--device", asked.device, *(["--tiny"] if tiny else [])]
    train_needs = ("torch", "transformers", "accelerate", "datasets", "cryptography", "psutil")
    one, other = MODELS[tiny]
    # As many blocks at a time as a card of 80 GB takes of Hugging Face's loop, with its logits.
    least_bytes = {"gpt2": 1.0e9, "qwen3": 2.7e9}  # of a block

    def own(name: str, *words: str, most_s: float, needs: tuple[str, ...] = ("torch",)) -> Part:
        return Part(name, ["-m", "benchmarks.gpu_parts", *words, *on], most_s, needs=needs)

    def sizes(model: Model) -> tuple[int, int]:
        """Micro-batch, and how many make up a batch, the same for both loops."""
        fits = memory_bytes / least_bytes[model.family]
        micro = 2 if tiny else max(1, 2 ** min(5, int(fits).bit_length() - 1))
        return micro, max(1, (4 if tiny else 32) // micro)

    def forge(model: Model, is_compiled: bool, most_s: float, by: str = "adamw") -> Part:
        micro, times = sizes(model)
        words = ["--data", data, "--work-dir", work / "run", "--model-type", model.family]
        words += ["--config-overrides", model.overrides(), "--micro-batch-size", micro]
        words += ["--batch-size", micro * times, "--mixed-precision", "bf16", *amounts(tiny)]
        words += ["--optimizer", by, *(["--compile"] if is_compiled else [])]
        name = f"{model.name}, train.py{' --compile' if is_compiled else ''}"
        name += "" if by == "adamw" else f" --optimizer {by}"
        part = own(name, "forge", *map(str, words), most_s=most_s, needs=train_needs)
        part.model = model
        return part

    def usual(model: Model, is_compiled: bool, most_s: float) -> Part:
        micro, times = sizes(model)
        words = ["-m", "benchmarks.hf_loop", "--data", data, "--model-type", model.family]
        words += ["--config-overrides", model.overrides(), "--micro-batch-size", micro]
        words += ["--gradient-accumulation-steps", times, "--mixed-precision", "bf16"]
        # C++ takes a minute on a slow CPU: a rehearsal compiles with what needs no compiler.
        compiled = ["--compile", "eager" if asked.device == "cpu" else "inductor"]
        words += [*amounts(tiny), *(compiled if is_compiled else [])]
        words += ["--cpu", "--threads", "1"] if asked.device == "cpu" else []
        name = f"{model.name}, Hugging Face's loop{', compiled' if is_compiled else ''}"
        return Part(name, [*map(str, words)], most_s, needs=train_needs, model=model)

    length = ["--sequence-length", "32", "--vocab-size", "512"] if tiny else []
    tests = ["-m", "pytest", "-vv", "--tb=short", "-p", "no:cacheprovider", "-m", "gpu"]
    tests += [f"tests/gpu/test_{one}.py" for one in ("loss", "muon", "training", "check_cluster")]
    tests += ["tests/sync/test_compress.py"]
    return [
        own("matrix products", "matmul", most_s=45),
        own("blocks", "data", "--data", str(data), *length, most_s=60, needs=("datasets",)),
        forge(one, True, 110),
        usual(one, False, 70),
        Part("tests", tests, 200, needs=("torch", "pytest", "datasets", "cryptography")),
        forge(other, True, 120),
        usual(other, False, 80),
        own("loss by chunks", "loss", most_s=45, needs=("torch", "transformers")),
        forge(one, True, 60, by="muon"),
        forge(one, False, 60),
        usual(one, True, 110),
        forge(other, False, 80),
        usual(other, True, 120),
    ]


def amounts(tiny: bool) -> list[str]:
    """Updates to warm up with, of a segment, and segments."""
    warm_up, updates = (1, 1) if tiny else (5, 10)
    return ["--warm-up", str(warm_up), "--updates", str(updates), "--segments", "3"]


class Runner:
    """Runs parts, one after the other, and keeps the report up to date."""

    def __init__(self, report: Report, work: Path, asked: argparse.Namespace, site: Path) -> None:
        self._report, self._work, self._log = report, work, report.folder / "gpu.log"
        self._ends = time.monotonic() + asked.seconds
        paths = [str(site), str(ROOT), os.environ.get("PYTHONPATH", "")]
        caches = {name: str(work / name.lower()) for name in ("TRITON_CACHE_DIR", "XDG_CACHE_HOME")}
        self._is_rehearsal = asked.device == "cpu"
        rehearsed = {"GPU_TESTS_ON": "cpu"} if self._is_rehearsal else {}
        self._environ = {
            **{k: v for k, v in os.environ.items() if k != "ACCELERATE_MIXED_PRECISION"},
            **{"PYTHONPATH": os.pathsep.join(filter(None, paths)), "PYTHONUNBUFFERED": "1"},
            **{"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", **caches, **rehearsed},
        }

    def run(self, part: Part, why_not: str = "") -> None:
        """Run a part, unless something is missing or the time is over. Never raises for it."""
        left = self._ends - time.monotonic()
        if why_not or left < part.least_s:
            part.outcome = f"skipped: {why_not or 'no time was left'}"
        else:
            self._run(part, min(part.most_s, left))
        print(f"{part.name}: {part.outcome} ({part.seconds:.0f} s)", flush=True)
        self._report.write()

    def _run(self, part: Part, most_s: float) -> None:
        figures, began = self._work / "figures.json", time.monotonic()
        figures.unlink(missing_ok=True)
        takes_json = "pytest" not in part.words
        words = [sys.executable, *part.words, *(["--json", str(figures)] if takes_json else [])]
        environ = dict(self._environ)
        if "--compile" in words and self._is_rehearsal:
            environ["ACCELERATE_DYNAMO_BACKEND"] = "eager"
        with self._log.open("ab") as log:
            log.write(f"\n=== {part.name}: {' '.join(words)}\n".encode())
            log.flush()
            first = log.tell()
            process = subprocess.Popen(
                words, cwd=ROOT, env=environ, stdout=log, stderr=log, start_new_session=True
            )
            try:
                status = self._wait(process, part, began + most_s, first)
            finally:
                end(process)
        part.seconds = time.monotonic() - began
        part.outcome = "done" if status == 0 else f"ended with status {status}"
        if status is None:
            part.outcome = f"cut off after {most_s:.0f} s"
        if status != 0:
            part.tail = self._printed(first)[-2500:]
        with contextlib.suppress(OSError, ValueError):
            self._report.figures[part.name] = json.loads(figures.read_text())

    def _wait(
        self, process: subprocess.Popen[bytes], part: Part, ends: float, first: int
    ) -> int | None:
        """Its status when it has ended; None when the time is over. The report grows meanwhile."""
        while time.monotonic() < ends:
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(min(5.0, max(0.1, ends - time.monotonic())))
            if "pytest" in part.words:
                self._report.tests.update(OUTCOMES.findall(self._printed(first)))
            if process.returncode is not None:
                return process.returncode
            part.outcome, part.seconds = "under way", part.most_s - (ends - time.monotonic())
            self._report.write()
        return None

    def _printed(self, first: int) -> str:
        """What the part has printed, which begins at this byte of the log."""
        with self._log.open("rb") as log:
            log.seek(first)
            return log.read().decode(errors="replace").replace("\r", "\n")


def end(process: subprocess.Popen[bytes]) -> None:
    """End a part with all that it has started: they are a session of their own."""
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)
    process.wait()


def measure(asked: argparse.Namespace, work: Path) -> Report:
    """Find out about the machine, and run the parts."""
    folder, site, began = asked.results, work / "site", time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "gpu.log").write_text("")
    report = Report(folder, {"date": "?"}, [], 32 if asked.tiny else 1024)
    if asked.wheels:
        report.facts["wheels"] = unpack_wheels(asked.wheels, site, folder / "gpu.log")
        sys.path.insert(0, str(site))
    report.facts = {**facts_here(), **report.facts, "date": facts_here()["date"]}
    report.lacking = lacking(ROOT / "requirements.txt")
    asked.seconds -= time.monotonic() - began
    runner = Runner(report, work, asked, site)
    first = Part("torch", ["-m", "benchmarks.gpu_parts", "found", "--device", asked.device], 90)
    report.parts = [first]
    runner.run(first)
    report.facts |= report.figures.pop("torch", {})
    card = str(report.facts.get("card", ""))
    report.facts["data sheet FLOP/s"] = next(
        (peak for name, peak in DATA_SHEETS.items() if name in card), None
    )
    for name, value in report.facts.items():
        print(f"{name}: {value}")
    for name, value in report.lacking.items():
        print(f"not as requirements.txt has it: {name}, {value}", flush=True)
    report.parts += parts_of(asked, work, report.facts.get("memory_bytes") or 0)
    no_gpu = asked.device == "cuda" and not report.facts.get("has a GPU")
    for part in report.parts[1:]:
        if asked.only and not part.name.endswith(tuple(asked.only)):
            part.outcome = "not asked for"
            continue
        missing = [name for name in part.needs if report.lacking.get(name) == "missing"]
        why_not = f"{', '.join(missing)} missing" if missing else ""
        runner.run(part, "torch sees no GPU" if no_gpu else why_not)
    report.write()
    return report


def work_folder() -> str | None:
    """Where to work: in memory where there is much of it, so that no disk is waited for."""
    memory = Path("/dev/shm")
    has_room = memory.is_dir() and shutil.disk_usage(memory).free > LEAST_FREE
    return str(memory) if has_room and os.access(memory, os.W_OK) else None


def interrupted(number: int, frame: Any) -> None:
    """End in good order when asked to: what runs is ended, and the tables are there."""
    raise SystemExit(128 + number)


def main() -> int:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--results", type=Path, default=Path("gpu_results"), help="a folder")
    parser.add_argument("--seconds", type=float, default=540, help="the time for all parts")
    parser.add_argument("--wheels", type=Path, help="a folder of wheels to unpack first")
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--tiny", action="store_true", help="toy sizes, to rehearse")
    parser.add_argument("--only", nargs="*", metavar="END", help="parts whose names end so")
    asked = parser.parse_args()
    asked.results = asked.results.resolve()
    signal.signal(signal.SIGTERM, interrupted)
    with tempfile.TemporaryDirectory(prefix="gpu-", dir=work_folder()) as work:
        report = measure(asked, Path(work))
    print((asked.results / "gpu.md").read_text(encoding="utf-8"))
    bad = [one for one in report.parts if one.tail]
    return 1 if bad or {"FAILED", "ERROR"} & {*report.tests.values()} else 0


if __name__ == "__main__":
    sys.exit(main())
