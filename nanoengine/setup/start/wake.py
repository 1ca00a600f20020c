"""Makes a GPU's context early, and has Triton name itself. Each is half a second of work that needs no interpreter: on
a thread it runs beside the import of torch. Where Triton's cache is empty, processes are started that will compile
kernels. Imports no torch."""

from __future__ import annotations

import ctypes
import importlib
import os
import threading
from collections.abc import Callable
from contextlib import suppress
from contextvars import ContextVar
from functools import partial
from pathlib import Path
from typing import Any

from nanoengine.kernels.compile_processes import CompileProcesses
from nanoengine.params.engine_options import EngineOptions

_DRIVER = "libcuda.so.1"
NOTES = "nanoengine-*.json"  # in Triton's cache: a start has ended well there
_processes: ContextVar[CompileProcesses | None] = ContextVar("nanoengine_compile_processes", default=None)


def wake_gpu(options: EngineOptions) -> threading.Thread | None:
    """Start to make the context of the GPU that an engine of this process uses, and return at once.

    None: nothing is done, as the engine runs on a CPU, or its ranks have processes of their own. What fails here fails
    again where torch makes the context, which reports it.
    """
    kind, _, index = options.device.partition(":")
    if options.tensor_parallel_size > 1 or kind not in ("auto", "cuda"):
        return None
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return None
    processes = None if options.enforce_eager else _processes_of_next()
    wake = partial(_wake, driver, int(index or 0), _key_function(), processes)
    thread = threading.Thread(target=wake, name="nanoengine-wake", daemon=True)
    thread.start()
    return thread


def compile_processes() -> CompileProcesses | None:
    """Those of the next engine of this thread, since `wake_gpu`. None: there are none."""
    return _processes.get()


def rank_processes(options: EngineOptions) -> CompileProcesses | None:
    """Those of a rank in a process of its own. None: it runs on a CPU, or eagerly."""
    if options.device.partition(":")[0] != "cuda" or options.enforce_eager:
        return None
    return _started_where_cold(CompileProcesses(engines=options.tensor_parallel_size))


def _processes_of_next() -> CompileProcesses:
    processes = _processes.get()
    if processes is None or processes.closed:
        processes = CompileProcesses()
        _processes.set(processes)
    return _started_where_cold(processes)


def _started_where_cold(processes: CompileProcesses) -> CompileProcesses:
    if _is_cold():
        processes.start()
    return processes


def _is_cold() -> bool:
    """Whether no engine has compiled its kernels to Triton's cache."""
    home = os.environ.get("TRITON_HOME") or os.path.expanduser("~")  # as `triton.knobs`
    folder = Path(os.environ.get("TRITON_CACHE_DIR") or Path(home, ".triton", "cache"))
    return next(folder.glob(NOTES), None) is None


def _key_function() -> Callable[[], object] | None:
    """By which Triton finds the kernels that it compiled: a hash over itself, half a gigabyte, which it keeps.

    It is imported by who starts the engine, never on a thread: where two threads import a package and its parts at
    once, Python may hand out one that is half imported.
    """
    try:
        function: Callable[[], object] = importlib.import_module("triton.runtime.cache").triton_key
    except Exception:  # noqa: BLE001 - not installed, broken, or another version: then nothing is saved
        return None
    return function


def _wake(driver: Any, index: int, key: Callable[[], object] | None, processes: CompileProcesses | None) -> None:
    if _make_context(driver, index):
        if key is not None:
            with suppress(Exception):
                key()
    elif processes is not None:
        processes.close()


def _make_context(driver: Any, index: int) -> bool:
    """Whether there is such a GPU."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        return bool(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0)
    return False
