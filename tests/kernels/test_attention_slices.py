"""Attention of few rows by slices, in a process of its own: in this one Triton interprets. On a CPU the kernel's Python
runs there (`emulated_gluon`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

pytest.importorskip("triton")

from nanoengine.kernels.paged_attention_slices import SlicesConfig, slices_config

CASES = Path(__file__).with_name("attention_slices_cases.py")
MUTANTS = [
    "forgets the newest value",
    "sees a key behind the end",
    "joins one part",
    "keeps a sum of smaller shares",
    "leaves its words",
]


def run(*arguments: str) -> list[dict[str, Any]]:
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = os.pathsep.join([str(CASES.parents[2]), environment.get("PYTHONPATH", "")])
    ran = subprocess.run(
        [sys.executable, CASES, *arguments], capture_output=True, text=True, env=environment, check=False
    )
    assert ran.returncode == 0, ran.stderr
    return [json.loads(line) for line in ran.stdout.splitlines()]


def test_heads_and_caches_are_those_of_the_reference() -> None:
    found = run()
    assert len(found) == 7
    for case in found:
        assert case["far"] < 0.02, case
        assert case["empty"], case
    assert sum(case["joined"] for case in found) > 4


@pytest.mark.skipif(torch.cuda.is_available(), reason="a part that is waited for in vain takes the GPU with it")
def test_broken_kernels_are_far_from_it() -> None:
    for name, case in zip(MUTANTS, run(*MUTANTS), strict=True):
        assert case["far"] > 0.05 or not case["empty"], name


def test_there_is_a_multiprocessor_for_each_part() -> None:
    assert slices_config(8, 8, 132) == SlicesConfig(splits=2, keys=256, least=4)
    assert slices_config(16, 8, 132) == SlicesConfig(splits=1, keys=128, least=4)
    assert slices_config(2, 8, 132) is None
    assert slices_config(17, 8, 132) is None
    for rows in (3, 4, 8, 16):
        config = slices_config(rows, 8, 132)
        assert config is not None
        assert rows * 8 * config.splits <= 132
