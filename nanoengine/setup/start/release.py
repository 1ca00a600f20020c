"""Gives back what an engine holds on its device."""

from __future__ import annotations

import gc
import logging
from collections.abc import Sequence

import torch

from nanoengine.api.attention import AttentionBackend
from nanoengine.api.errors import described, is_failure
from nanoengine.api.model import Attention
from nanoengine.api.plugin_calls import name_of, place_and_fix
from nanoengine.kernels.device import empty_cache

_log = logging.getLogger(__name__)


def release_caches(layers: Sequence[Sequence[Attention]], backends: Sequence[AttentionBackend]) -> None:
    """Give the KV caches back; the layers are unbound."""
    for backend in backends:
        release(backend)
    for group in layers:
        for layer in group:
            layer.unbind()


def release(backend: AttentionBackend) -> None:
    """One that fails keeps no other from giving its memory back."""
    try:
        backend.release()
    except BaseException as error:
        if not is_failure(error):
            raise
        where = name_of(type(backend))
        _log.warning("%s.release failed: %s%s", where, described(error), place_and_fix(error, type(backend), where))


def free_unused(device: torch.device) -> None:
    """Give what is not referred to any more back to the device."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # graphs in flight live until they end
        gc.collect()
        empty_cache(device)
