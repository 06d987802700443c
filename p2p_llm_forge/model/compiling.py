"""Compile the repeated layer of a model, and find out by trying what that brings."""

from __future__ import annotations

import contextlib
import os
import sys
import sysconfig
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.model.sizes import one_line

CACHE = "TORCHINDUCTOR_CACHE_DIR"
WITHOUT = "leave --compile out"
REPEATS = 3  # that are timed of each, in turns


@dataclass(frozen=True)
class Trial:
    """What compiling has come to, in seconds: of a forward and backward of one micro-batch."""

    eager_s: float
    compiled_s: float
    compile_s: float  # until it had been compiled


def repeated_layers(lm: Any) -> list[nn.Module]:
    """The layers of a model: its longest list of modules of one class; empty where it has none."""
    lists = [
        list(module)
        for module in lm.base_model.modules()
        if isinstance(module, nn.ModuleList) and len({type(layer) for layer in module}) == 1
    ]
    return max(lists, key=len, default=[])


def compile_layers(lm: Any) -> None:
    """Have each layer compiled when it is first called; the whole base model where it has none.

    Layers of one class share what is compiled, so this takes seconds where the whole model would
    take minutes. Weights keep their names.
    """
    for layer in repeated_layers(lm) or [lm.base_model]:
        layer.compile()


def take_back(lm: Any) -> None:
    """Undo `compile_layers`, if that was done."""
    compiled = [module for module in lm.modules() if module._compiled_call_impl is not None]
    for module in compiled:
        module._compiled_call_impl = None
    if compiled:
        torch._dynamo.reset()


def require_compiler(device: torch.device) -> None:
    """Raise ForgeError where torch.compile has nothing that makes machine code for the device."""
    from torch._inductor import cpp_builder, exc

    if device.type == "cuda" and not torch.utils._triton.has_triton():
        raise ForgeError(
            "--compile needs Triton, which does not run with this GPU and this installation",
            f"install the triton that belongs to this torch, or {WITHOUT}",
        )
    try:
        cpp_builder.get_cpp_compiler()
    except (exc.InvalidCxxCompiler, RuntimeError, OSError) as error:
        raise ForgeError(
            "--compile needs a C++ compiler, and none was found (g++, or what CXX names)",
            f"install one (Debian, Ubuntu: sudo apt install g++), or {WITHOUT}",
        ) from error
    headers = Path(sysconfig.get_path("include"))
    if not (headers / "Python.h").exists():
        raise ForgeError(
            f"--compile needs Python.h, and it is not in {headers}",
            f"install them (Debian, Ubuntu: sudo apt install python3-dev), or {WITHOUT}",
        )


def keep_between_runs() -> Path:
    """Let what is compiled be found again by later runs, and return the folder.

    torch's own default (2.13) is a folder in /tmp, where others could leave code for it to run.
    """
    from torch._inductor.runtime.cache_dir_utils import cache_dir

    folder = Path(os.environ.get("XDG_CACHE_HOME", ""))
    with contextlib.suppress(OSError, RuntimeError):  # a home that cannot be written, or is none
        folder = (folder if folder.is_absolute() else Path.home() / ".cache") / "p2p-llm-forge"
        if CACHE not in os.environ:
            (folder / "compiled").mkdir(mode=0o700, parents=True, exist_ok=True)
            os.environ[CACHE] = str(folder / "compiled")
    return Path(cache_dir())


def compiled_by(lm: Any, call: Callable[[], object]) -> float:
    """Compile the layers and `call`, which runs them. Returns the seconds until that was done.

    Raises ForgeError, with nothing compiled, where that fails.
    """
    began = time.perf_counter()
    keep_between_runs()
    compile_layers(lm)
    try:
        call()
    except Exception as error:  # whatever dynamo, inductor, Triton and compilers raise
        take_back(lm)
        found = f"torch.compile fails with this {lm.config.model_type}: {one_line(error)}"
        raise ForgeError(found, WITHOUT) from error
    return time.perf_counter() - began


def try_compiling(lm: Any, call: Callable[[], object], clock: Callable[[], float]) -> Trial:
    """Compile the layers, and time `call` with and without that, in turns. They stay compiled.

    call: a forward and backward of a micro-batch by the model that holds `lm`. clock: seconds, once
    the device has done all that it was given. Raises ForgeError as `compiled_by`.
    """
    call()  # what only the first call does is of neither
    compile_s = compiled_by(lm, call)
    timed: tuple[list[float], list[float]] = [], []
    for _ in range(REPEATS):
        for spent, stance in zip(timed, ("force_eager", "default"), strict=True):
            with torch.compiler.set_stance(stance):
                began = clock()
                call()
                spent.append(clock() - began)
    eager_s, compiled_s = (sorted(spent)[REPEATS // 2] for spent in timed)
    return Trial(eager_s, compiled_s, compile_s)


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run compiled layers as they are written: what is called rarely, with many shapes."""
    if "torch._dynamo" not in sys.modules:  # importing it takes a second
        yield
        return
    with torch.compiler.set_stance("force_eager"):
        yield
