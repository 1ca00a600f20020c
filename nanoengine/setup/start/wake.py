"""Makes a GPU's context early, and has Triton name itself. Each is half a second of work that needs no interpreter: on
a thread it runs beside the import of torch. Imports no torch."""

from __future__ import annotations

import ctypes
import importlib
import threading
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from typing import Any

from nanoengine.params.engine_options import EngineOptions

_DRIVER = "libcuda.so.1"


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
    wake = partial(_wake, driver, int(index or 0), _key_function())
    thread = threading.Thread(target=wake, name="nanoengine-wake", daemon=True)
    thread.start()
    return thread


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


def _wake(driver: Any, index: int, key: Callable[[], object] | None) -> None:
    if _make_context(driver, index) and key is not None:
        with suppress(Exception):
            key()


def _make_context(driver: Any, index: int) -> bool:
    """Whether there is such a GPU."""
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        return bool(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0)
    return False
