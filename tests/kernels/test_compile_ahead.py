"""Kernels compiled beside each other for a GPU that is not there, by a driver that launches nothing."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from subprocess import PIPE
from typing import Any

import pytest

pytest.importorskip("triton")

PRELUDE = """
import json, os, sys, tempfile, threading, traceback
os.environ.pop("TRITON_INTERPRET", None)
import torch, triton
from triton import knobs
from triton.backends.compiler import GPUTarget

launches, compiled = [], []

class Utils:
    def get_device_properties(self, device):
        return {"max_shared_mem": 232448}
    def load_binary(self, *given):
        return object(), 0, 0, 0, 1024

class Driver:
    utils = Utils()
    def launcher_cls(self, source, metadata):
        return lambda *given: launches.append(threading.current_thread().name)
    def get_current_device(self):
        return 0
    def get_current_stream(self, device):
        return 0
    def get_current_target(self):
        return GPUTarget("cuda", 90, 32)

triton.runtime.driver.set_active(Driver())

def listen(*, src, metadata, metadata_group, times, cache_hit):
    compiled.append(threading.current_thread() is threading.main_thread())

knobs.compilation.listener = listen
from nanoengine.kernels import activation_triton
from nanoengine.kernels.compile_ahead import compiling_ahead, is_compiling_ahead

def launch(dtype, activation="silu"):
    activation_triton.act_and_mul(torch.zeros(4, 64, dtype=dtype), activation)

KINDS = [(torch.float32, "silu"), (torch.bfloat16, "silu"), (torch.float32, "gelu_tanh")]
for line in sys.stdin:
    if child := os.fork():
        if status := os.waitpid(child, 0)[1]:
            print(json.dumps({"error": f"ended with status {status}"}), flush=True)
        continue
    try:
        os.environ["TRITON_CACHE_DIR"] = tempfile.mkdtemp()
        exec(json.loads(line))
        found = {"out": out}
    except BaseException:
        found = {"error": traceback.format_exc()}
    print(json.dumps(found), flush=True)
    os._exit(0)
"""
There = Callable[[str], Any]


@pytest.fixture(scope="module")
def there() -> Iterator[There]:
    """code -> what it assigns to `out`, in a copy of one process in which kernels are not interpreted: that is settled
    at import, which takes longer than these tests."""
    with subprocess.Popen([sys.executable, "-c", PRELUDE], stdin=PIPE, stdout=PIPE, text=True) as process:
        assert process.stdin is not None
        assert process.stdout is not None

        def run(code: str) -> Any:
            print(json.dumps(code), file=process.stdin, flush=True)
            found = json.loads(process.stdout.readline())
            assert "error" not in found, found["error"]
            return found["out"]

        yield run
        process.stdin.close()


def test_what_is_met_is_compiled_once_by_other_threads_and_nothing_runs_until_it_is_over(there: There) -> None:
    out = there("""
with compiling_ahead():
    for _ in range(3):
        for kind in KINDS:
            launch(*kind)
    inside = (is_compiling_ahead(), len(launches))
ahead = list(compiled)
for kind in KINDS:
    launch(*kind)
out = dict(inside=inside, ahead=ahead, later=len(compiled) - len(ahead), launched=len(launches),
           after=is_compiling_ahead())
""")
    assert out["inside"] == [True, 0]
    assert out["ahead"] == [False, False, False]  # none of them on the thread that met it
    assert out["later"] == 0
    assert out["launched"] == 3
    assert out["after"] is False


def test_other_threads_launch_as_ever_meanwhile_or_wait_to_compile_ahead_too(there: There) -> None:
    """And this one behind a Ctrl-C."""
    out = there("""
before = triton.runtime.JITFunction.run
entered, left = threading.Event(), threading.Event()

def ahead():
    with compiling_ahead():
        entered.set()
        left.wait()

launch(torch.float32)
with compiling_ahead():
    launch(torch.float32)
    other = threading.Thread(target=launch, args=(torch.float32,), name="other")
    other.start()
    other.join()
    second = threading.Thread(target=ahead)
    second.start()
    early = entered.wait(0.1)
left.set()
second.join()

def interrupted(futures):
    raise KeyboardInterrupt

triton.runtime._async_compile.as_completed = interrupted
try:
    with compiling_ahead():
        launch(torch.bfloat16)
except KeyboardInterrupt:
    launch(torch.bfloat16, "gelu_tanh")
out = [launches, early, triton.runtime.JITFunction.run is before]
""")
    assert out == [["MainThread", "other", "MainThread"], False, True]


def test_a_kernel_that_does_not_compile_says_so_when_it_is_launched(there: There) -> None:
    out = there("""
import pathlib, importlib.util
path = pathlib.Path(tempfile.mkdtemp()) / "broken.py"
path.write_text(
    "import triton, triton.language as tl\\n"
    "@triton.jit\\n"
    "def broken(x, N: tl.constexpr):\\n"
    "    tl.static_assert(N == 2, 'only two')\\n"
)
spec = importlib.util.spec_from_file_location("broken", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with compiling_ahead():
    launch(torch.float32)
    module.broken[(1,)](torch.zeros(4), N=3)
ahead = len(compiled)
launch(torch.float32)
try:
    module.broken[(1,)](torch.zeros(4), N=3)
    said = None
except Exception as error:
    said = f"{type(error).__name__}: {error}"
launch(torch.float32)
out = dict(said=said, ahead=ahead, compiled=len(compiled), launched=len(launches))
""")
    assert "only two" in out["said"]
    assert out["ahead"] == out["compiled"] == 1
    assert out["launched"] == 2


def test_what_a_first_launch_makes_is_made_by_the_threads_too(there: There) -> None:
    """Its launcher, one at a time for the same arguments, and its code on the GPU; once."""
    out = there("""
made, loaded, making = [], [], threading.Lock()

class Utils(Utils):
    def load_binary(self, *given):
        loaded.append(threading.current_thread() is threading.main_thread())
        return super().load_binary(*given)

def launcher(source, metadata):
    alone = making.acquire(blocking=False)
    made.append((threading.current_thread() is threading.main_thread(), alone))
    making.release()
    return lambda *given: launches.append(1)

Driver.utils = Utils()
Driver.launcher_cls = staticmethod(launcher)
with compiling_ahead():
    launch(torch.float32)
    launch(torch.float32, "gelu_tanh")  # the same arguments
ahead = len(made), len(loaded)
launch(torch.float32)
launch(torch.float32, "gelu_tanh")
out = dict(made=made, loaded=loaded, ahead=ahead, launched=len(launches))
""")
    assert out["ahead"] == [2, 2]
    assert out["made"] == [[False, True]] * 2
    assert out["loaded"] == [False] * 2
    assert out["launched"] == 2


def test_what_could_not_be_made_ahead_is_made_by_the_launch(there: There) -> None:
    """A launcher that a C compiler does not make, and code that the GPU does not take."""
    out = there("""
tried, failing = [], []

def step(name, made):
    tried.append(name)
    if name in failing:
        raise RuntimeError(name)
    return made

class Utils(Utils):
    def load_binary(self, *given):
        return step("load", super().load_binary(*given))

Driver.utils = Utils()
Driver.launcher_cls = staticmethod(lambda *_: step("make", lambda *given: launches.append(given[4] is not None)))
for (dtype, activation), name in zip(KINDS, ("make", "load")):
    failing.append(name)
    with compiling_ahead():
        launch(dtype, activation)
    failing.clear()
    launch(dtype, activation)
out = dict(tried=tried, launches=launches)
""")
    assert out["tried"] == ["make", "make", "load", "make", "load", "make", "load"]
    assert out["launches"] == [True, True]  # with code


def test_a_tuned_kernel_is_not_tuned_on_nothing(there: There) -> None:
    out = there("""
import pathlib, importlib.util
path = pathlib.Path(tempfile.mkdtemp()) / "tuned.py"
path.write_text(
    "import triton, triton.language as tl\\n"
    "@triton.autotune([triton.Config({'N': 2}), triton.Config({'N': 4})], key=[])\\n"
    "@triton.jit\\n"
    "def tuned(x, N: tl.constexpr):\\n"
    "    tl.store(x + tl.arange(0, N), 0.0)\\n"
)
spec = importlib.util.spec_from_file_location("tuned", path)
module = importlib.util.module_from_spec(spec)
spec.loader.exec_module(module)
with compiling_ahead():
    module.tuned[(1,)](torch.zeros(4))
out = [len(module.tuned.cache), len(compiled), len(launches)]
""")
    assert out == [0, 0, 0]


def test_few_row_products_compile_for_a_gpu(there: There) -> None:
    """The interpreter takes more of Python than the compiler does, and never meets what PDL adds."""
    out = there("""
from nanoengine.kernels import matvec_held_triton as held, matvec_large_triton as large
from nanoengine.kernels import matvec_skinny_triton as skinny, matvec_triton as matvec
for module in (held, large, skinny, matvec):
    module.pdl_options = lambda x: {"PDL": True, "launch_pdl": True}
x, weight = torch.zeros(8, 1100, dtype=torch.bfloat16), torch.zeros(64, 1100, dtype=torch.bfloat16)
around = dict(gate="silu", norm_weight=x[0].contiguous(), add=x[:, :32])
matvec.gemv(x[:2], weight, weight[0, :64].contiguous(), eps=1e-6, gate="silu", norm_weight=around["norm_weight"])
held.held(x, weight, tile=held.HeldTile(16, warps=8, block_t=8), **around)
tile = skinny.SkinnyTile(16, 64, 8, warps=4, stages=2, splits=2)
skinny.skinny(x, weight, tile=tile, tickets=torch.zeros(8, dtype=torch.int32), **around)
for splits in (1, 2):  # in parts, a second kernel adds them
    tile = large.LargeTile(32, 256, warps=2, stages=3, splits=splits, block_t=8)
    large.large(x, weight, tile=tile, gate="silu", add=around["add"])
out = len(launches)
""")
    assert out == 3 + 3


def test_tiles_that_the_copy_engine_reads_are_told_apart_by_their_size() -> None:
    """Not by whose they are: all layers' weights of one size need one kernel."""
    import torch
    from triton.tools.tensor_descriptor import TensorDescriptor

    from nanoengine.kernels.compile_ahead import _specialises

    def described(rows: int) -> TensorDescriptor:
        return TensorDescriptor.from_tensor(torch.empty(64, 64, dtype=torch.float16), [rows, 32])

    assert _specialises(described(16)) == _specialises(described(16))
    assert _specialises(described(16)) != _specialises(described(32))
