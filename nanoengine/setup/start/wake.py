"""Makes a GPU's context early. That is half a second of the driver's work, which needs no interpreter: on a thread it
runs beside the import of torch. Imports no torch."""

from __future__ import annotations

import ctypes
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
    thread = threading.Thread(target=_make_context, args=(int(index or 0),), name="nanoengine-wake", daemon=True)
    thread.start()
    return thread


def _make_context(index: int) -> None:
    try:
        driver = ctypes.CDLL(_DRIVER)
    except OSError:  # no GPU
        return
    device, context = ctypes.c_int(), ctypes.c_void_p()
    if driver.cuInit(0) == 0 and driver.cuDeviceGet(ctypes.byref(device), index) == 0:
        driver.cuDevicePrimaryCtxRetain(ctypes.byref(context), device)
