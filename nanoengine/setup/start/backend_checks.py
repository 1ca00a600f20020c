"""What an attention backend says and gives, held against its contract at start."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from torch import Tensor

from nanoengine.api.attention import AttentionBackend, AttentionLayerSpec, KVCacheView, KVSpec
from nanoengine.api.errors import (
    ModelError,
    NanoEngineError,
    PluginError,
    described,
    forget_locals,
    is_failure,
    is_out_of_memory,
    shown,
)
from nanoengine.api.model import Attention
from nanoengine.api.plugin_calls import name_of, plugin_call, whose
from nanoengine.core.execution.results import LaunchedStep
from nanoengine.core.execution.slots import SlotTables
from nanoengine.core.step import StepPlan
from nanoengine.setup.start.largest_steps import one_token


def kv_block_bytes(backend: type[AttentionBackend], spec: KVSpec, block_size: int) -> int:
    """Its answer, if that is a size. Raises `PluginError`."""
    with plugin_call(f"{name_of(backend)}.kv_block_bytes failed", backend):
        found: object = backend.kv_block_bytes(spec, block_size)
    if not isinstance(found, int) or isinstance(found, bool) or found < 1:
        text = f"{name_of(backend)}.kv_block_bytes gave {shown(found)} for {spec}, not a number of bytes of at least 1"
        raise PluginError(text + whose(None, backend))
    return found


def dry_run(
    launch: Callable[[StepPlan], LaunchedStep],
    tables: SlotTables,
    layers: Sequence[tuple[Attention, AttentionBackend, int]],
) -> None:
    """One token in the dummy block: a model or backend that cannot be right is refused before the first request.

    `layers`: each with its backend, and its index there. Raises `ModelError` or `PluginError`.
    """
    for layer, backend, index in layers:
        layer.bind(cast(AttentionBackend, _Watched(backend)), index)
    try:
        one_token(launch, tables)
    except BaseException as error:
        if isinstance(error, NanoEngineError) or not is_failure(error):
            raise
        if is_out_of_memory(error):  # no plugin's fault: steps say what became of it, and try smaller parts
            forget_locals(error)
            return
        raise ModelError(f"a dry run of one token failed: {described(error)}") from error
    finally:
        for layer, backend, index in layers:
            layer.bind(backend, index)


class _Watched:
    """A backend whose outputs are looked at."""

    def __init__(self, backend: AttentionBackend) -> None:
        self._backend = backend

    def kv_cache(self, layer: int) -> KVCacheView | None:
        return self._backend.kv_cache(layer)

    def attend(self, layer: int, spec: AttentionLayerSpec, q: Tensor) -> Tensor:
        return self._checked("attend", q, self._backend.attend(layer, spec, q))

    def forward(self, layer: int, spec: AttentionLayerSpec, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        return self._checked("forward", q, self._backend.forward(layer, spec, q, k, v))

    def _checked(self, method: str, q: Tensor, out: object) -> Tensor:
        if not isinstance(out, Tensor):
            got = f"a {type(out).__name__}"
        elif (out.shape, out.dtype, out.device) == (q.shape, q.dtype, q.device):
            return out
        else:
            got = f"{out.dtype} {tuple(out.shape)} on {out.device}"
        cls = type(self._backend)
        wanted = f"{q.dtype} {tuple(q.shape)} on {q.device}, as the queries are"
        raise PluginError(f"{name_of(cls)}.{method} gave {got}, not {wanted}{whose(None, getattr(cls, method))}")
