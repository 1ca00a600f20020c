"""Makes a GPU's context early, and has Triton name itself. Each is half a second of work that needs no interpreter: on
a thread it runs beside the import of torch. Imports no torch."""

from __future__ import annotations

import ctypes
import importlib
import threading

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
    thread = threading.Thread(target=_wake, args=(int(index or 0),), name="nanoengine-wake", daemon=True)
    thread.start()
    return thread


def _wake(index: int) -> None:
    if _make_context(index):
        _name_compiler()


def _name_compiler() -> None:
    """Triton finds the kernels that it compiled by a hash over itself, half a gigabyte, which it keeps."""
    try:
        importlib.import_module("triton.runtime.cache").triton_key()
    except Exception:  # noqa: BLE001 - not installed, broken, or another version: then nothing is saved
        return


def _make_context(index: int) -> bool:
    """Whether there is such a GPU."""
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:
        return False
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        return bool(driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device) == 0)
    return False
