"""Triton's interpreter for kernel tests on a machine without a GPU.

Whether `triton.jit` interprets is settled when a kernel's module is imported, and asked again at some calls. The rest
of the test run (an engine choosing its backend, a child process) must not see the variable that says so. So it is set
while all kernels are imported, and then only inside `interpreted()`.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from triton_interpreter_speed import hasten

import nanoengine.kernels

INSTALLED = importlib.util.find_spec("triton") is not None


@contextmanager
def interpreted() -> Iterator[None]:
    """TRITON_INTERPRET=1 inside, where there is no GPU."""
    before = os.environ.get("TRITON_INTERPRET")
    if not torch.cuda.is_available():
        os.environ["TRITON_INTERPRET"] = "1"
    try:
        yield
    finally:
        if before is None:
            os.environ.pop("TRITON_INTERPRET", None)
        else:
            os.environ["TRITON_INTERPRET"] = before


def import_triton() -> None:
    """Before anyone else does (transformers, say): its own functions are interpreted, or not, from then on."""
    if INSTALLED:
        with interpreted():
            importlib.import_module("triton")
        interpreter = importlib.import_module("triton.runtime.interpreter")
        _remember_members(interpreter)
        hasten(interpreter)


def _remember_members(interpreter: Any) -> None:
    """Each launch asks for all members of `triton.language` to find its built-in functions, a seventh of the launch's
    time: their names are remembered. What is under a name is not, as a test may replace it."""
    names = functools.cache(
        lambda owner: [name for name, member in inspect.getmembers(owner) if interpreter.tl.core.is_builtin(member)]
    )
    mine = ModuleType("inspect")
    mine.__dict__.update(inspect.__dict__)
    mine.__dict__["getmembers"] = lambda owner: [(name, getattr(owner, name)) for name in names(owner)]
    interpreter.inspect = mine


def import_kernels() -> None:
    """Import every `*_triton` module of `nanoengine.kernels`, interpreted where there is no GPU."""
    if not INSTALLED:
        return
    with interpreted():
        for path in sorted(Path(nanoengine.kernels.__path__[0]).glob("*_triton.py")):
            importlib.import_module(f"nanoengine.kernels.{path.stem}")
