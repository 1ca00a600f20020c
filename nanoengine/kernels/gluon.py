"""Where kernels in Gluon run. Gluon is experimental: another version of Triton may lack what one of them imports."""

from __future__ import annotations

import functools
import importlib
import logging

import torch

_log = logging.getLogger(__name__)


@functools.cache
def is_hopper(device: torch.device) -> bool:
    """Whether it is a GPU of compute capability 9.0, where these kernels were measured."""
    cuda = device.type == "cuda" and torch.version.hip is None
    return cuda and torch.cuda.get_device_capability(device) == (9, 0)


@functools.cache
def runs_gluon(device: torch.device, slower: str, *names: str) -> bool:
    """Whether the modules nanoengine.kernels.NAME run there. slower: what is logged, once, if only the version of
    Triton is in the way."""
    if not is_hopper(device):
        return False
    try:
        for name in names:
            importlib.import_module(f"nanoengine.kernels.{name}")
    except Exception as error:  # noqa: BLE001 - another version may raise anything
        _log.warning("%s, since this Triton has another Gluon: %s", slower, error)
        return False
    return True


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """How many a GPU has; 0: it is none."""
    return torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 0
