"""One device: whose streams and memory calls use, its allocator, and what is sent to it."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor


def on_device(device: torch.device) -> AbstractContextManager[object]:
    """Streams, events and kernels of this GPU, whatever the calling thread's current one is."""
    return torch.cuda.device(device) if device.type == "cuda" else nullcontext()


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    """The calling thread's stream of this GPU; None: it is no GPU. By the device's number, which saves the host ten
    microseconds that torch takes to find it."""
    return torch.cuda.current_stream(device.index) if device.type == "cuda" else None


def empty_cache(device: torch.device) -> None:
    """Give back what torch's allocator keeps for later."""
    if device.type == "cuda":
        with torch.cuda.device(device):
            torch.cuda.empty_cache()


def upload(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A host array on the device. Does not wait for the device, as a copy from memory that is not pinned would."""
    host = torch.from_numpy(np.ascontiguousarray(array))
    if device.type == "cuda":
        host = host.pin_memory()  # from torch's cache; kept until the copy is done
    return host.to(device, non_blocking=True)
