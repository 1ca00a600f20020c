"""Test-wide settings: one thread (small matrices get slower with two), no network-hub look-ups, how workers share."""

from __future__ import annotations

import gc
import os
import random
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of the processes that tests start
os.environ.pop("PYTHONDONTWRITEBYTECODE", None)  # each of those processes would compile all that it imports
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:  # "pytest &" in a script; what tests start would inherit it
    signal.signal(signal.SIGINT, signal.default_int_handler)

import beside
import pytest
import torch
from fixtures_models import smollm2_expanded, smollm2_gguf, smollm2_path  # noqa: F401 - fixtures
from forked_programs import FORK_EXEC, Starter, forked_programs
from hypothesis import settings
from triton_interpreter import import_triton

import_triton()
torch.set_num_threads(1)
settings.register_profile("ci", deadline=None, max_examples=60, print_blob=True, derandomize=True)
settings.register_profile("explore", deadline=None, max_examples=1000, print_blob=True)
settings.load_profile("ci")
gc.disable()  # until all tests are collected
OWN_RUNS = ("corpus", "load", "clients")  # marks of tests that download or take minutes: run only if -m names them


@pytest.fixture(scope="session")
def starter() -> Iterator[Starter]:
    with forked_programs() as starter:
        yield starter


@pytest.fixture(scope="module")
def forked(starter: Starter) -> Iterator[None]:
    """Python programs that the module's tests start are forked; see tests/forked_programs.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(subprocess, "_fork_exec", starter)
        yield


@pytest.fixture
def started(monkeypatch: pytest.MonkeyPatch) -> None:
    """In a module where programs are forked: the test's are not."""
    monkeypatch.setattr(subprocess, "_fork_exec", FORK_EXEC)


@pytest.fixture
def forget_modules(tmp_path: Path) -> Iterator[None]:
    """What the test imports from under its tmp_path is unknown to the tests after it, which may use the same names."""
    yield
    for name, module in list(sys.modules.items()):
        said = getattr(module, "__dict__", {})
        if any(str(place).startswith(f"{tmp_path}/") for place in (said.get("__file__"), *said.get("__path__", ()))):
            del sys.modules[name]


def pytest_collection_finish() -> None:
    """Modules and tests stay until the end: no collection of garbage looks at them again, which would take a second."""
    gc.collect()
    gc.freeze()
    gc.enable()


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    """What a test draws without a seed of its own does not depend on the tests that ran before it."""
    random.seed(0)
    torch.manual_seed(0)


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    return beside.number_of_workers()


def pytest_configure(config: pytest.Config) -> None:
    if hasattr(config, "workerinput"):
        config.pluginmanager.register(beside.Turns(Path(config.option.basetemp).parent))


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if hasattr(config, "workerinput"):
        beside.longest_first(items)
    devices = torch.cuda.device_count()
    if not devices:
        beside.halve(items)
    left_out = [mark for mark in OWN_RUNS if mark not in config.option.markexpr]
    for item in items:
        for mark in left_out:
            if item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=f"needs -m {mark}"))
        if item.get_closest_marker("gpu") and devices < 1:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
        if item.get_closest_marker("multi_gpu") and devices < 2:
            item.add_marker(pytest.mark.skip(reason="needs two CUDA devices"))
