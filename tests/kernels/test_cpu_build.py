"""The library in C: built once for a cache folder, by several processes at once, and not at all where it cannot be."""

from __future__ import annotations

import logging
import multiprocessing
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from nanoengine import LLM
from nanoengine.kernels.cpu import Built, Library, NotBuilt, build, built, load
from nanoengine.kernels.ops import CpuOps, Ops, ops_for
from nanoengine.testing.checkpoints import tiny_llama

NEEDS_COMPILER = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")
CPU = torch.device("cpu")


def compiler(folder: Path, script: str) -> str:
    """A folder whose `cc` is this script."""
    folder.mkdir(exist_ok=True)
    (folder / "cc").write_text(f"#!/bin/sh\n{script}\n")
    (folder / "cc").chmod(0o755)
    return str(folder)


@NEEDS_COMPILER
def test_it_is_built_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = (("-DNE_PLAIN", "-O0"),)
    first = built(tmp_path, plain)
    assert isinstance(first, Built)
    assert [path.name for path in first.path.parent.iterdir()] == [first.path.name]
    monkeypatch.setattr(build, "_build", lambda *_: pytest.fail("built again"))
    build.built.cache_clear()
    assert built(tmp_path, plain) == first


def plain_library(cache: Path) -> str:
    made = built(cache, (("-DNE_PLAIN", "-O0"),))
    assert isinstance(made, Built)
    return Library(made.path).path


@NEEDS_COMPILER
def test_processes_may_build_it_at_once(tmp_path: Path) -> None:
    with multiprocessing.get_context("fork").Pool(2) as processes:  # which have imported what they need
        assert processes.map(plain_library, [tmp_path, tmp_path], chunksize=1) == ["plain C", "plain C"]
    assert len(list((tmp_path / "cpu-kernels").iterdir())) == 1


@NEEDS_COMPILER
def test_an_option_that_the_compiler_refuses_is_not_the_end(tmp_path: Path) -> None:
    assert isinstance(built(tmp_path, (("-march=no-such-processor",), ("-DNE_PLAIN", "-O0"))), Built)


@pytest.mark.parametrize(
    ("script", "words"),
    [(None, "there is no C compiler (cc, gcc, clang); install a C compiler"),
     ("echo 'no header' >&2; exit 1", "cc failed: no header; install a C compiler"),
     ("for a; do [ \"$p\" = -o ] && echo x > $a; p=$a; done", "too short; delete that file")],
    ids=["none", "fails", "makes no library"],
)  # fmt: skip
def test_without_it_layers_run_on_torch_and_the_log_says_why(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture, script: str | None, words: str
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path / "empty") if script is None else compiler(tmp_path / "bin", script))
    cache = tmp_path / "cache"
    with caplog.at_level(logging.WARNING):
        ops = ops_for(CPU, cache=cache)
    assert type(ops) is Ops
    [record] = caplog.records
    assert words in record.getMessage()
    assert "fuse_kernels=false" in record.getMessage()
    assert not list(cache.rglob("*.tmp"))


@NEEDS_COMPILER
def test_a_cache_that_cannot_be_written_is_a_reason(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    found = built(tmp_path / "file" / "cache")
    assert isinstance(found, NotBuilt)
    assert "Not a directory" in found.why
    assert "NANOENGINE_CACHE" in found.fix


@NEEDS_COMPILER
def test_a_switch_turns_it_off(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """And another one the attention alone."""
    from nanoengine.api.sources import cache_root

    if isinstance(load(cache_root()), NotBuilt):
        pytest.skip("no kernels in C")
    assert type(ops_for(CPU, fuse=False, cache=cache_root())) is Ops
    found = [ops_for(CPU, attends_qkv=on, cache=cache_root()) for on in (True, False)]
    assert [(type(ops), ops.attends_qkv) for ops in found] == [(CpuOps, True), (CpuOps, False)]
    seen: list[str] = []

    def chosen(*args: Any, **options: Any) -> Ops:
        ops = ops_for(*args, **options)
        seen.append(ops.name)
        return ops

    monkeypatch.setattr("nanoengine.setup.start.starter.ops_for", chosen)
    for fuse in (True, False):
        with LLM(tiny_llama(tmp_path / str(fuse)), device="cpu", fuse_kernels=fuse, num_gpu_blocks_override=8):
            pass
    assert seen == ["cpu", "torch"]
