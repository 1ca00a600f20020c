"""Attention of few rows by slices, in a process of its own: in this one Triton interprets. On a CPU the kernel's Python
runs there (`emulated_gluon`)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import uninterpreted

pytest.importorskip("triton")

from nanoengine.kernels.paged_attention_slices import SlicesConfig, slices_config

MUTANTS = [
    "forgets the newest value",
    "sees a key behind the end",
    "joins one part",
    "keeps a sum of smaller shares",
    "leaves its words",
]


def run(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in uninterpreted.run("attention_slices_cases.py", *arguments).splitlines()]


def test_heads_and_caches_are_those_of_the_reference() -> None:
    found = run()
    assert len(found) == 9
    for case in found:
        assert case["far"] < 0.02, case
        assert case["empty"], case
    assert sum(case["joined"] for case in found) > 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a part that is waited for in vain takes the GPU with it")
def test_broken_kernels_are_far_from_it() -> None:
    for name, case in zip(MUTANTS, run(*MUTANTS), strict=True):
        assert case["far"] > 0.05 or not case["empty"], name


def test_layouts_fill_the_multiprocessors() -> None:
    found = {rows: slices_config(rows, 8, 2, 132) for rows in (1, 2, 3, 4, 8, 16, 32, 64, 128, 256)}
    assert found[1] == SlicesConfig(splits=16, keys=256, least=4)
    assert found[8] == SlicesConfig(splits=2, keys=256, least=4)
    assert found[16] == SlicesConfig(splits=1, keys=128, least=4)
    assert found[128] == SlicesConfig(splits=1, keys=128, least=4)
    assert found[256] == SlicesConfig(splits=1, keys=64, least=4)
    assert [rows for rows, config in found.items() if config is None] == [64]
    assert slices_config(64, 8, 4, 132) == found[128]
    assert slices_config(8, 1, 16, 132) is None
    assert [slices_config(rows, 8, 4, 132) for rows in (1, 2, 8)] == [None, None, found[8]]
    for rows, config in found.items():  # parts that wait for each other
        assert config is None or config.splits == 1 or rows * 8 * config.splits <= 132
