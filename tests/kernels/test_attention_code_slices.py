"""Attention of many rows by slices over eight-bit codes, in a process of its own: in this one Triton interprets. On a
CPU the kernel's Python runs there (`emulated_gluon`)."""

from __future__ import annotations

import json
from typing import Any

import pytest
import torch
import uninterpreted

pytest.importorskip("triton")

from nanoengine.kernels.paged_attention_slices import code_slices_keys

MUTANTS = [
    "forgets the newest value",
    "sees a key behind the end",
    "keeps a sum of smaller shares",
    "forgets scales of values",
    "has one column of a head",
    "takes the first block twice",
    "stores half of a code",
]


def run(*arguments: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in uninterpreted.run("attention_code_slices_cases.py", *arguments).splitlines()]


def test_heads_and_caches_are_those_of_the_reference() -> None:
    found = run()
    assert len(found) == 12
    for case in found:
        assert case["far"] < 0.02, case
        assert case["cache"] <= (1.1 if torch.cuda.is_available() else 1e-3), case  # where a value's last bit decides


@pytest.mark.skipif(torch.cuda.is_available(), reason="what a broken kernel reads may take the GPU with it")
def test_broken_kernels_are_far_from_it() -> None:
    for name, case in zip(MUTANTS, run(*MUTANTS), strict=True):
        assert case["far"] > 0.1 or case["cache"] > 10, name


def test_many_rows_that_no_programs_share() -> None:
    found = {rows: code_slices_keys("fp8", rows, 8, 4096, 132) for rows in (1, 32, 64, 128, 256)}
    assert found == {1: None, 32: None, 64: 128, 128: 64, 256: 64}
    assert code_slices_keys("int8", 256, 8, 4096, 132) == 128
    assert code_slices_keys("fp8", 256, 8, 131072, 132) is None
