"""Kernels that other processes compile, and the keys by which they are found."""

from __future__ import annotations

import random

import pytest

pytest.importorskip("triton")

from test_compile_ahead import There
from test_compile_ahead import there as there

PROCESSES = """
import time
from nanoengine.kernels.compile_processes import CompileProcesses
hits = []

def listen(*, src, metadata, metadata_group, times, cache_hit):
    hits.append(cache_hit)

knobs.compilation.listener = listen
processes = CompileProcesses(2)
processes.start()
"""


def test_kernels_of_a_first_start_are_compiled_by_processes_which_end_with_it(there: There) -> None:
    out = there(f"""{PROCESSES}
with compiling_ahead(processes):
    for kind in KINDS:
        launch(*kind)
ahead = list(hits)
process = processes._process
sys.modules["nanoengine.kernels.compile_processes"]._MOMENT = 60
processes.close()
processes.close()
for kind in KINDS:
    launch(*kind)
with compiling_ahead(processes):
    launch(torch.bfloat16, "gelu_tanh")
out = dict(ahead=ahead, later=hits[3:], ended=process.poll(), launched=len(launches))
""")
    assert out["ahead"] == [True] * 3  # found in the cache
    assert out["later"] == [False]  # once they have ended
    assert out["ended"] == 0  # behind the others, by itself
    assert out["launched"] == 3


def test_they_start_by_themselves_where_kernels_are_many(there: There) -> None:
    """Those that the cache has do not count."""
    out = there("""
from nanoengine.kernels import compile_processes
compile_processes._FEW = 1

def missed(*kinds):
    processes = compile_processes.CompileProcesses(1)
    with compiling_ahead(processes):
        for kind in kinds:
            launch(*kind)
    started = processes._process is not None
    processes.close()
    activation_triton._act_and_mul_kernel.device_caches.clear()
    return started

out = [missed(KINDS[0]), missed(*KINDS[:2]), missed(*KINDS[:2]), missed(*KINDS, (torch.float16, "silu"))]
""")
    assert out == [False, False, False, True]


@pytest.mark.parametrize("what", ["killed", "not started", "cannot be sent", "cannot be named"])
def test_what_no_process_compiles_is_compiled_here(there: There, what: str) -> None:
    spoilt = {
        "killed": "processes._process.kill(); processes._process.wait()",
        "not started": "processes = CompileProcesses(2)",
        "cannot be sent": "sys.modules['nanoengine.kernels.compile_processes']._Pickler = None",
        "cannot be named": "activation_triton._act_and_mul_kernel.fn.__qualname__ = 'none'",
    }
    out = there(f"""{PROCESSES}
{spoilt[what]}
with compiling_ahead(processes):
    launch(torch.float32)
    launch(torch.bfloat16)
ahead = list(hits)
launch(torch.float32)
processes.close()
out = [ahead, len(launches)]
""")
    assert out == [[False, False], 1]


@pytest.mark.parametrize("ours", [True, False])
def test_keys_do_not_depend_on_what_was_launched_before(there: There, ours: bool) -> None:
    """Triton's own do: who mends that there will see the mutant survive."""
    seeds = [random.Random(n).random() for n in range(4)]
    out = there(f"""
import random
from triton.runtime.jit import JITCallable
from nanoengine.kernels import sampling_truncation_triton, sampling_triton
from nanoengine.kernels.cache_keys import make_key
modules = [module for name, module in sys.modules.items() if name.startswith("nanoengine.kernels.")]
every = [function for module in modules for function in vars(module).values() if isinstance(function, JITCallable)]
found = {{(function.__module__, function.__name__): function for function in every}}
seen = set()
for seed in {seeds}:
    for function in found.values():
        function.hash, function.used_global_vals = None, {{}}
    order = sorted(found)
    random.Random(seed).shuffle(order)
    for name in order:
        if {ours}:
            make_key(found[name])
        found[name].cache_key
    seen.add(tuple(found[name].cache_key for name in sorted(found)))
out = [len(seen), len(found)]
""")
    assert out[1] > 20
    assert (out[0] == 1) is ours


@pytest.mark.parametrize("ours", [True, False])
def test_a_warm_start_finds_what_a_cold_one_compiled(there: There, ours: bool) -> None:
    """Which launched other kernels before."""
    out = there(f"""
import contextlib
from nanoengine.kernels import sampling_triton
from nanoengine.kernels.compile_ahead import making_keys

def draw():
    columns = dict.fromkeys(("greedy", "top_k", "positions", "at"), torch.zeros(1, dtype=torch.int32))
    columns |= dict.fromkeys(("temperature", "top_p", "min_p"), torch.zeros(1))
    columns |= dict.fromkeys(("seeds", "sample_index"), torch.zeros(1, dtype=torch.int64))
    out = torch.zeros(1, dtype=torch.int64), torch.zeros(1, dtype=torch.int32)
    sampling_triton.sample(torch.zeros(1, 32_000), sampling_triton.Tail.TEMPERATURE, *out, early=True, **columns)

def forget():
    for name, module in list(sys.modules.items()):
        for function in list(vars(module).values()) * name.startswith("nanoengine.kernels."):
            if hasattr(function, "used_global_vals"):
                function.hash, function.used_global_vals = None, {{}}
            if isinstance(function, triton.JITFunction):
                function.device_caches.clear()

torch.Tensor.is_cuda = property(lambda _: True)
torch.cuda.get_device_capability = lambda *_: (9, 0)
with compiling_ahead():
    draw()
forget()
hits = []
knobs.compilation.listener = lambda *, cache_hit, **given: hits.append(cache_hit)
with making_keys() if {ours} else contextlib.nullcontext():
    draw()
out = hits
""")
    assert len(out) > 1
    assert all(out) is ours


def test_neither_torch_nor_triton_is_imported_to_start_them(there: There) -> None:
    out = there("""
import subprocess
code = "import sys, nanoengine.setup.start.wake; print('torch' in sys.modules or 'triton' in sys.modules)"
out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout
""")
    assert out.strip() == "False"
