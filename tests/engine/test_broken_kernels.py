"""Kernels that cannot be imported cost speed, or a backend, and never the engine. Each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

FLASH = "raise OSError('flash_attn_2_cuda.so: undefined symbol')"
BROKEN = {
    "no .so": "raise OSError('libtriton.so: cannot open shared object file')",
    "half there": "raise AttributeError('partially initialized module triton has no attribute jit')",
}
ASK = """
import logging, torch
logging.basicConfig()
from nanoengine.api import AttentionNeed
from nanoengine.api.errors import NanoEngineError
from nanoengine.setup.plugins.discover import choose_attention, discover
from nanoengine.kernels.ops import ops_for

print("layers on", ops_for(torch.device("cuda")).name)
need = AttentionNeed(device="cuda", dtype="bfloat16", head_sizes=frozenset({128}), block_size=256)
for name in ("auto", "triton", "flash_attn"):
    try:
        found, passed = choose_attention(discover(), need, name)
        print(name, "chose", found.spec.name, *[f"not {other}: {why}" for other, why in passed])
    except NanoEngineError as error:
        print(name, type(error).__name__, error)
"""


def run(tmp_path: Path, code: str, broken: dict[str, str]) -> list[str]:
    """The lines that `code` prints, in a fresh interpreter that finds these modules first."""
    for name, source in broken.items():
        (tmp_path / f"{name}.py").write_text(source)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return (done.stdout + done.stderr).splitlines()


@pytest.mark.parametrize("how", BROKEN)
def test_broken_packages(tmp_path: Path, how: str) -> None:
    lines = run(tmp_path, ASK, {"triton": BROKEN[how], "flash_attn": FLASH})
    cause = BROKEN[how].split("'")[1]
    layers, auto, triton, flash, warning = lines
    assert layers == "layers on torch"
    assert "the fused kernels cannot be imported, layers and sampling run on plain torch" in warning
    assert cause in warning
    assert "reinstall triton" in warning
    assert auto.startswith("auto chose torch not triton: ")
    assert cause in auto
    assert "not flash_attn: ['flash_attn cannot be imported: OSError: flash_attn_2_cuda.so: undefined symbol']" in auto
    assert triton.startswith("triton UnsupportedError attention backend 'triton' does not support this model here")
    assert "attention=auto takes 'torch'" in triton
    assert cause in triton
    assert flash.startswith(
        "flash_attn UnsupportedError attention backend 'flash_attn' does not support this model here"
    )
    assert "attention=auto takes 'torch'" in flash
    assert "undefined symbol" in flash


def test_missing_packages_are_no_fault(tmp_path: Path) -> None:
    hide = "import sys; sys.modules['triton'] = sys.modules['flash_attn'] = None\n"
    layers, auto, triton, flash = run(tmp_path, hide + ASK, {})
    assert layers == "layers on torch"
    assert auto.startswith("auto chose torch not triton: ")
    assert "UnsupportedError" in triton
    assert "needs triton, not installed here (pip install 'nanoengine[triton]')" in triton
    assert "pip install flash-attn" in flash
