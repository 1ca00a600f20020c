"""Kernels that cannot be imported cost speed, or a backend, and never the engine. Each case in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

BROKEN = {
    "missing": "import sys; sys.modules['triton'] = None",
    "no .so": "raise OSError('libtriton.so: cannot open shared object file')",
    "half there": "raise AttributeError('partially initialized module triton has no attribute jit')",
    "empty": "",
}


def run(tmp_path: Path, code: str, broken: dict[str, str]) -> str:
    """What `code` prints, in a fresh interpreter that finds these modules first."""
    for name, source in broken.items():
        (tmp_path / f"{name}.py").write_text(source)
    env = {**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout + done.stderr


OPS = """
import logging, torch
logging.basicConfig()
from nanoengine.kernels.ops import ops_for
print("layers on", ops_for(torch.device("cuda")).name)
"""


@pytest.mark.parametrize("how", ["no .so", "half there", "empty"])
def test_layers_run_on_plain_torch_which_is_said(tmp_path: Path, how: str) -> None:
    out = run(tmp_path, OPS, {"triton": BROKEN[how]})
    assert "layers on torch" in out
    assert out.count("the fused kernels cannot be imported") == 1
    assert "reinstall triton" in out


def test_a_missing_package_is_no_fault(tmp_path: Path) -> None:
    out = run(tmp_path, "import sys; sys.modules['triton'] = None\n" + OPS, {})
    assert "layers on torch" in out


CHOICE = """
import sys
from nanoengine.core.errors import NanoEngineError
from nanoengine.api import AttentionNeed
from nanoengine.core.setup.plugins import choose_attention, discover
need = AttentionNeed(device="cuda", dtype="bfloat16", head_sizes=frozenset({128}), block_size=256)
try:
    found, passed = choose_attention(discover(), need, NAME)
    print("chosen", found.spec.name)
    for name, reasons in passed:
        print("passed over", name, reasons)
except NanoEngineError as error:
    print(type(error).__name__, error)
"""


@pytest.mark.parametrize("how", ["no .so", "half there", "empty"])
def test_auto_falls_to_the_next_backend_and_says_why(tmp_path: Path, how: str) -> None:
    broken = {"triton": BROKEN[how], "flash_attn": "raise OSError('flash_attn_2_cuda.so: undefined symbol')"}
    out = run(tmp_path, CHOICE.replace("NAME", "'auto'"), broken)
    assert "chosen torch" in out
    assert "passed over triton" in out
    assert "passed over flash_attn ['flash_attn cannot be imported: OSError: flash_attn_2_cuda.so" in out


@pytest.mark.parametrize(("name", "cause"), [("triton", "libtriton.so"), ("flash_attn", "undefined symbol")])
def test_asked_for_by_name_it_is_a_typed_error_with_the_mend(tmp_path: Path, name: str, cause: str) -> None:
    broken = {"triton": BROKEN["no .so"], "flash_attn": "raise OSError('flash_attn_2_cuda.so: undefined symbol')"}
    out = run(tmp_path, CHOICE.replace("NAME", f"'{name}'"), broken)
    assert f"UnsupportedError attention backend '{name}' cannot serve this model here" in out
    assert cause in out
    assert "attention=auto takes one that can" in out


def test_what_is_not_installed_is_told_with_how_to_install_it(tmp_path: Path) -> None:
    code = "import sys; sys.modules['triton'] = None\n" + CHOICE.replace("NAME", "'triton'")
    assert "needs triton, not installed here (pip install 'nanoengine[triton]')" in run(tmp_path, code, {})
